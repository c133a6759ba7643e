"""What a user may ask of a generation: every wrong value is one sentence that says what to do."""

import dataclasses
import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from exitlm.decode.generation import Generation, GenerationConfig, Piece, Stats, TokenTrace, mean_depth, speed_of
from exitlm.decode.sampling.sampler import Sampler
from exitlm.errors import UserError
from exitlm.palette import palette

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"threshold": math.nan}, "threshold is nan"),
    ({"threshold": -1}, "between 0"),
    ({"threshold": 1.1}, "between 0"),
    ({"threshold": "0.5"}, r"threshold is '0\.5' \(str\), but must be a number"),
    ({"threshold": True}, r"threshold is True \(bool\)"),
    ({"threshold": 1.0000001}, r"threshold is 1\.0000001, but must lie between 0"),
    ({"threshold": {8: 2.0}}, "exit 8"),
    ({"threshold": [0.5, math.nan]}, "nan"),
    ({"mode": "lossles"}, "did you mean 'lossless'"),
    ({"mode": None}, r"mode is None \(NoneType\), but must be one of full"),
    ({"rule": "margn"}, "did you mean 'margin'"),
    ({"draft": ("exits", "look-up")}, "did you mean 'lookup'"),
    ({"draft": "exit"}, "did you mean 'exits'"),
    ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    ({"max_new_tokens": 1.5}, "whole number"),
    ({"max_new_tokens": "5"}, "whole number"),
    ({"patience": 0}, "patience"),
    ({"min_exit_tokens": -1}, "min_exit_tokens"),
    ({"max_pending": -1}, "max_pending"),
    ({"max_draft": 0.5}, "max_draft"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"max_new_tokens": None}, "max_new_tokens"),
    ({"stop": None}, "stop is None"),
    ({"draft": 5}, "draft is 5"),
    ({"stop": ("a", "")}, "stop string is empty"),
    ({"stop": (5,)}, "sequence of texts"),
    ({"stop_token_ids": 5}, "stop_token_ids is 5"),
    ({"stop_token_ids": ["5"]}, "whole numbers"),
    ({"exits": 8}, "exits is 8"),
    ({"exits": [8, 15, 8]}, "more than once"),
    ({"exits": [8.5]}, "whole numbers"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**64}, "64 bits"),
    ({"temperature": -0.1}, "temperature"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty is 2.5, but must be a number from -2 to 2"),
    ({"frequency_penalty": "1"}, "frequency_penalty"),
    ({"logit_bias": None}, "logit_bias is None"),
    ({"logit_bias": {5: 200}}, "logit_bias of token 5 is 200"),
    ({"logit_bias": {"the": 1}}, "token id in logit_bias is 'the'"),
    ({"bad_words": 5}, "bad_words is 5"),
    ({"bad_words": [5]}, "sequence in bad_words is 5"),
    ({"bad_words": [[]]}, "sequence in bad_words is empty"),
    ({"bad_words": ["a", ""]}, "text in bad_words is empty"),
    ({"bad_words": [np.array([1.5])]}, "sequence in bad_words"),
    ({"logits_processor": "upper"}, "logits_processor is 'upper'"),
]


@pytest.mark.parametrize(("settings", "says"), WRONG, ids=[str(settings) for settings, _ in WRONG])
def test_wrong_values_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as found:
        GenerationConfig(**settings)
    assert "\n" not in str(found.value)


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'temperature'"):
        GenerationConfig.of({"temprature": 1.0})
    assert GenerationConfig.of({"temperature": 1.0}).temperature == 1.0


def test_numbers_of_numpy_are_numbers() -> None:
    config = GenerationConfig(max_new_tokens=np.int64(5), threshold=np.float32(0.5), exits=np.array([1, 2]))
    assert config.max_new_tokens == 5


def test_one_word_stands_for_a_list_of_one() -> None:
    config = GenerationConfig(stop="END", draft="lookup", bad_words="damn")
    assert config.stop == ("END",)
    assert config.draft == ("lookup",)
    assert config.bad_words == ("damn",)


def test_the_sampler_has_all_that_is_set_for_it() -> None:
    def same(ids: list[int], logits: Tensor) -> Tensor:
        return logits

    given = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
    given |= {"presence_penalty": 0.3, "frequency_penalty": -0.3, "logit_bias": {3: -1.0}}
    config = GenerationConfig(**given, bad_words=["damn", np.array([1, 2])], logits_processor=same)  # type: ignore[arg-type, list-item]
    assert config.bad_words == ("damn", (1, 2))  # a tokenizer says what a text is
    assert config.sampler([[7, 8], [1, 2]]) == Sampler(**given, bad_words=[[7, 8], [1, 2]], processor=same)  # type: ignore[arg-type]
    assert GenerationConfig(logit_bias={"7": 2}).logit_bias == {7: 2.0}  # type: ignore[dict-item]
    assert GenerationConfig().sampler() == Sampler()


def test_a_setting_without_effect_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="no effect"):
        GenerationConfig(exit_layer=3, rule="margin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GenerationConfig(exit_layer=3, rule="fixed")
        GenerationConfig(mode="full")
        GenerationConfig(draft=("lookup",), max_draft=3)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mode": "full", "threshold": 0.5}, "threshold"),
        ({"mode": "full", "exits": [1]}, "exits"),
        ({"draft": "lookup", "rule": "margin"}, "rule"),
        ({"mode": "threshold", "max_draft": 2}, "max_draft"),
        ({"patience": 3}, "patience"),
        ({"top_p": 0.5}, "top_p"),
    ],
)
def test_the_setting_without_effect_is_named(settings: dict[str, Any], named: str) -> None:
    with pytest.warns(UserWarning, match=f"^{named} has no effect without"):
        GenerationConfig(**settings)


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationConfig().mode = "full"


def test_a_summary() -> None:
    trace = [TokenTrace(id=1, exit_layer=layer, source="exit") for layer in (4, 2, 3)]
    assert (speed_of(3, 0.5), mean_depth(trace)) == (4.0, 3.0)
    assert math.isnan(speed_of(1, 0.5))
    assert math.isnan(speed_of(3, 0.0))
    assert math.isnan(mean_depth([]))


def test_a_piece_and_a_generation_are_plain_data() -> None:
    trace = [TokenTrace(id=7, exit_layer=2, source="exit", confidence={2: 0.5}, text="a")]
    piece = Piece(text="a", tokens=trace)
    assert (piece.token_ids, piece.exit_layers) == ([7], [2])
    stats = Stats(mode="threshold", exits=[1, 2])
    out = Generation(text="a", token_ids=[7], exit_layers=[2], trace=trace, stats=stats, finish_reason="length")
    assert json.loads(json.dumps(dataclasses.asdict(out)))["trace"][0]["id"] == 7


def generation(words: list[str], layers: list[int], text: bool = True) -> Generation:
    """A finished generation of these words."""
    pairs = enumerate(zip(words, layers, strict=True))
    trace = [TokenTrace(id=i, exit_layer=layer, source="exit", text=word) for i, (word, layer) in pairs]
    return Generation(
        text="".join(words) if text else None,
        token_ids=[token.id for token in trace],
        exit_layers=layers,
        trace=trace,
        stats=Stats(mode="threshold", exits=[2, 3]),
        finish_reason="length",
    )


def test_a_generation_is_shown_in_one_line() -> None:
    assert repr(generation(["a", "b"], [4, 2])) == "<Generation 'ab': 2 tokens, 3.0 layers on average, mode threshold>"
    assert repr(generation(["a"], [4], text=False)) == (
        "<Generation [0]: 1 token, 4.0 layers on average, mode threshold>"
    )
    assert repr(generation([], [])) == "<Generation '': 0 tokens, mode threshold>"
    long = repr(generation(["line\n"] * 1000, [4] * 1000))
    assert len(long) < 150
    assert "1000 tokens" in long
    assert "\n" not in long


def test_a_notebook_shows_depth_in_the_colours_of_the_palette() -> None:
    found = generation(["<b>", " & ", "c"], [4, 2, 3])._repr_html_()
    colours = palette([2, 3], 4)
    for layer, text in ((2, " &amp; "), (3, "c")):
        assert f'<span style="color: {colours[layer]}; font-weight: bold" title="layer {layer}">{text}</span>' in found
    assert "&lt;b&gt;<span" in found
    assert "layer 4 (final head)" in found
    assert ">1 </span>" in generation(["a", "b"], [4, 2], text=False)._repr_html_()
    assert "final head" in generation([], [])._repr_html_()
