"""Records of exits: what comes back from JSON is what went in, and nothing malformed is taken."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exitlm.errors import UserError
from exitlm.model import Calibration, ExitRecord

SHARES = st.floats(0, 1)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
UNKNOWN = st.dictionaries(st.text(min_size=1).map("x_".__add__), PLAIN, max_size=3)
CALIBRATIONS = st.integers(1, 4).flatmap(
    lambda n: st.builds(
        Calibration, **dict.fromkeys(("scores", "coverage", "precision"), st.tuples(*[SHARES] * n)), extra=UNKNOWN
    )
)
RECORDS = st.builds(
    ExitRecord,
    **dict.fromkeys(("agreement", "accuracy", "threshold", "coverage", "precision"), st.none() | SHARES),
    loss=st.none() | NUMBERS,
    tokens=st.none() | st.integers(0, 2**40),
    rule=st.none() | st.sampled_from(["gate", "probability"]),
    calibration=st.none() | CALIBRATIONS,
    tested=st.none() | st.booleans(),
    extra=UNKNOWN,
    training=st.none() | st.dictionaries(st.text(), PLAIN, max_size=3),
)

TUNED = """{
  "agreement": 0.611,
  "loss": 1.25,
  "tokens": 2048,
  "rule": "probability",
  "threshold": 0.8125,
  "coverage": 0.25,
  "precision": 0.953,
  "calibration": {
    "scores": [
      0.0,
      0.5
    ],
    "coverage": [
      1.0,
      0.4
    ],
    "precision": [
      0.611,
      0.9
    ]
  }
}"""


@given(record=RECORDS)
@settings(max_examples=200, deadline=None)
def test_what_comes_back_from_json_is_what_went_in(record: ExitRecord) -> None:
    assert ExitRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize("text", [TUNED, '{\n  "accuracy": 0.5,\n  "loss": 2.0\n}', "{}"])
def test_records_of_earlier_adapters_keep_every_byte(text: str) -> None:
    record = ExitRecord.from_json(json.loads(text))
    assert record.tested is None
    assert json.dumps(record.to_json(), indent=2) == text


def test_a_tuned_record_by_attribute() -> None:
    record = ExitRecord.from_json({**json.loads(TUNED), "tested": True, "novel": [1]})
    assert (record.rule, record.threshold, record.coverage, record.tested) == ("probability", 0.8125, 0.25, True)
    assert record.calibration == Calibration(scores=(0.0, 0.5), coverage=(1.0, 0.4), precision=(0.611, 0.9))
    assert (record.accuracy, record.extra) == (None, {"novel": [1]})


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    record = ExitRecord(agreement=np.float32(0.5), tokens=torch.tensor(7), tested=np.bool_(True))
    assert json.dumps(record.to_json()) == '{"agreement": 0.5, "tokens": 7, "tested": true}'


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"threshold": "abc"}, r"threshold is 'abc' \(str\), but must be a share from 0 to 1"),
        ({"threshold": 7}, "threshold is 7"),
        ({"threshold": True}, "threshold is True"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"threshold": None}, "threshold is None"),
        ({"coverage": -0.1}, "coverage is -0.1"),
        ({"coverage": None}, "coverage is None"),
        ({"rule": 3}, "rule is 3"),
        ({"rule": None}, "rule is None"),
        ({"agreement": [1]}, "agreement is"),
        ({"loss": "low"}, "loss is 'low'"),
        ({"tokens": 1.5}, "tokens is 1.5"),
        ({"tested": 1}, r"tested is 1 \(int\), but must be True or False"),
        ({"tested": "yes"}, "tested is 'yes'"),
        ({"training": 5}, "training is 5"),
        ({"calibration": [1]}, r"calibration is \[1\]"),
        ({"calibration": {"scores": [0.5]}}, "calibration has no coverage"),
        ({"calibration": {"scores": [], "coverage": [], "precision": []}}, "calibration.scores is empty"),
        ({"calibration": {"scores": [0.5], "coverage": [0.5, 0.5], "precision": [1.0]}}, "2 values for 1 scores"),
        ({"calibration": {"scores": [0.5], "coverage": [1.5], "precision": [1.0]}}, "calibration.coverage is 1.5"),
        ({"calibration": {"scores": [0.5], "coverage": "5", "precision": [1.0]}}, "calibration.coverage is '5'"),
    ],
)
def test_malformed_records_are_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ExitRecord.from_json({**json.loads(TUNED), **change})


@pytest.mark.parametrize(
    "name", ["agreement", "accuracy", "loss", "tokens", "precision", "calibration", "tested", "training"]
)
def test_null_is_what_was_not_measured(name: str) -> None:
    assert ExitRecord.from_json({name: None}) == ExitRecord()


def test_what_is_given_in_python_is_checked_too() -> None:
    with pytest.raises(UserError, match=r"threshold is 1\.5"):
        ExitRecord(threshold=1.5)
    with pytest.raises(UserError, match="must be a Calibration"):
        ExitRecord(calibration={"scores": [0.5]})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="extra holds 'threshold'"):
        ExitRecord(extra={"threshold": 0.5})
