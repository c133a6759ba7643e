"""Several adapters of one base as names of models: each has its own exits, and its text is the one it gives alone."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import exitlm
from exitlm import UserError
from tests.serve.conftest import Served, serving

EARLY: dict[str, Any] = {"mode": "threshold", "rule": "probability", "threshold": 0.0}
LAYERS = {"code": [1, 3], "chat": [1, 2]}


@pytest.fixture(scope="module")
def adapters(
    tiny: Path, make_model: Callable[..., exitlm.LLM], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Two adapters with unlike exits behind layer 1."""
    place, found = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, layers) in enumerate(LAYERS.items()):
        model = exitlm.load(tiny, dtype="float64")
        model.add_exits(layers, kind="norm", output="own", init="random", seed=seed)
        found[name] = model.save_exits(place / name)
    return found


@pytest.fixture(scope="module")
def alone(tiny: Path, adapters: dict[str, Path]) -> dict[str, exitlm.LLM]:
    """The base with each of them, and without."""
    found = {name: exitlm.load(tiny, adapter=place, dtype="float64") for name, place in adapters.items()}
    return {**found, "": exitlm.load(tiny, dtype="float64")}


@pytest.fixture(scope="module")
def server(tiny: Path, adapters: dict[str, Path]) -> Iterator[Served]:
    model = exitlm.load(tiny, adapter=list(adapters.values()), dtype="float64")
    assert model.adapters == LAYERS
    with serving(model) as found:
        yield found


def ask(server: Served, model: str | None, **settings: Any) -> httpx.Response:
    """The answer to a short prompt, greedily."""
    with server.http() as http:
        body = {"prompt": "Once", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "exitlm": settings}
        return http.post("/v1/completions", json=body if model is None else {**body, "model": model})


def test_each_name_has_its_own_exits(server: Served) -> None:
    with server.http() as http:
        names = [entry["id"] for entry in http.get("/v1/models").json()["data"]]
        exits = http.get("/v1/exits").json()
    assert names == list(exits) == ["tiny", "tiny:code", "tiny:chat"]
    layers = {name: [one["layer"] for one in found["exits"]] for name, found in exits.items()}
    assert layers == {"tiny": [], "tiny:code": [1, 3], "tiny:chat": [1, 2]}
    assert exits["tiny"]["modes"] == ["full", "lossless"]
    assert exits["tiny:chat"]["modes"] == ["full", "threshold", "lossless"]


def test_two_adapters_share_a_layer_and_nothing_else(server: Served, alone: dict[str, exitlm.LLM]) -> None:
    """Side by side, and in every mode: what the base writes with that adapter alone."""
    cases = [(name, settings) for name in LAYERS for settings in (EARLY, {"mode": "lossless"}, {"mode": "full"})]
    cases += [("", {"mode": "lossless"}), ("", {"mode": "full"})]
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(
            pool.map(lambda case: ask(server, f"tiny:{case[0]}" if case[0] else "tiny", trace=True, **case[1]), cases)
        )
    texts = {}
    for (name, settings), answer in zip(cases, answers, strict=True):
        assert answer.status_code == 200, answer.text
        (choice,) = answer.json()["choices"]
        expected = alone[name].generate("Once", max_new_tokens=12, ignore_eos=True, **settings)
        assert choice["text"] == expected.text
        if settings["mode"] != "lossless":
            assert choice["exitlm"]["exit_layers"] == expected.exit_layers
        texts[name, settings["mode"]] = choice["text"]
    assert texts["code", "threshold"] != texts["chat", "threshold"]
    assert len({text for (_, mode), text in texts.items() if mode != "threshold"}) == 1


def test_without_a_name_the_first_adapter_answers(server: Served, alone: dict[str, exitlm.LLM]) -> None:
    answer = ask(server, None, **EARLY).json()
    expected = alone["code"].generate("Once", max_new_tokens=12, ignore_eos=True, **EARLY)
    assert (answer["model"], answer["choices"][0]["text"]) == ("tiny:code", expected.text)


@pytest.mark.parametrize(
    ("model", "settings", "says"),
    [
        ("tiny:code", {"exits": [2]}, "adapter 'code' has no exit at layer 2 (it has: 1, 3)"),
        ("tiny:chat", {"exits": [3]}, "adapter 'chat' has no exit at layer 3 (it has: 1, 2)"),
        ("tiny:code", {"threshold": {"2": 0.5}}, "the active ones of adapter 'code' are [1, 3]"),
        ("tiny", {"threshold": 0.5}, "model 'tiny' has no exits"),
    ],
)
def test_a_layer_of_another_adapter_is_refused(server: Served, model: str, settings: dict[str, Any], says: str) -> None:
    answer = ask(server, model, **{"mode": "threshold", **settings})
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert ask(server, model, mode="lossless", **settings).status_code == 400


def test_a_name_that_no_adapter_has(server: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="did you mean 'tiny:chat'"), server.client() as client:
        client.completions.create(model="tiny:chats", prompt="x")
    assert ask(server, "tiny:code", adapter="chat").status_code == 400  # a name of a model says it, and nothing else


def test_two_directories_of_one_name_are_refused(tiny: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    other = exitlm.load(tiny, adapter=adapters["chat"]).save_exits(tmp_path / "code")
    with pytest.raises(UserError, match=r"would both be called 'code'.*rename one of the directories"):
        exitlm.load(tiny, adapter=[adapters["code"], other])


def test_exits_beside_the_model(tiny: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    place = exitlm.load(tiny, adapter=adapters["chat"]).export(tmp_path / "whole")
    model = exitlm.load(place)
    assert model.adapters == {"exits": [1, 2]}
    with serving(model) as found, found.client() as client:
        assert [entry.id for entry in client.models.list()] == ["tiny", "tiny:exits"]
