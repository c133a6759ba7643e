"""``PUT /api``: the reference's client works, and what its server got wrong is right."""

import json
import time
from typing import Any

import pytest

from tests.serve.conftest import Served

PROMPTS = ["Once upon a time", "The sky is"]


def put(served: Served, status: int = 200, **body: Any) -> Any:
    with served.http() as http:
        response = http.put(
            "/api", headers={"Content-Type": "application/json; charset=UTF-8"}, content=json.dumps(body)
        )
    assert response.status_code == status, response.text
    return response.json()


def test_the_requests_of_its_client(served: Served) -> None:
    """The fields that request_client.py of EE-LLM sends, one prompt at a time."""
    for early, prompt in ((True, PROMPTS[0]), (False, PROMPTS[1])):
        body = {
            "prompts": [prompt], "tokens_to_generate": 20, "top_k": 1, "logprobs": True,
            "random_seed": int(time.time_ns()) % 16384, "echo_prompts": False, "early_exit_thres": 0.02,
        }  # fmt: skip
        if early:
            body |= {"use_early_exit": True, "print_max_prob": True}
        answer = put(served, **body)
        settings: dict[str, Any] = {"mode": "full"}
        if early:
            settings = {"mode": "threshold", "threshold": 0.02, "rule": "probability"}
        found = served.model.generate(prompt, max_new_tokens=20, logprobs=1, **settings)
        assert answer["text"] == [found.text]
        assert answer["logprobs"] == [pytest.approx([token.logprob for token in found.trace])]
        assert answer["exit_layers"] == [found.exit_layers]
        assert len(answer["segments"][0]) == 20
        assert answer["requst_time"] == answer["request_time"] > 0
        if early:
            assert min(found.exit_layers) < 4
            told = [entry["max_prob"] for entry in answer["max_probs"][0]]
            assert [{int(k): v for k, v in one.items()} for one in told] == [t.confidence for t in found.trace]
        else:
            assert "max_probs" not in answer


def test_false_is_false(served: Served) -> None:
    """To the reference, a field that is there is true."""
    answer = put(served, prompts=PROMPTS, tokens_to_generate=8, use_early_exit=False, print_max_prob=False)
    assert "max_probs" not in answer
    assert answer["exit_layers"] == [[4] * 8] * 2
    assert answer["logprobs"] is None
    found = [served.model.generate(prompt, max_new_tokens=8, mode="full").text for prompt in PROMPTS]
    assert answer["text"] == found


def test_exits_by_layer_and_thresholds_above_one(served: Served) -> None:
    ask: dict[str, Any] = {"prompts": PROMPTS[0], "tokens_to_generate": 16, "use_early_exit": True}
    layers = put(served, **ask, early_exit_thres=0.0, exit_layers=[3])["exit_layers"][0]
    assert set(layers[1:]) == {3}
    assert set(put(served, **ask, early_exit_thres=40.0)["exit_layers"][0]) == {4}


def test_scores_of_prompts(served: Served) -> None:
    """No tokens to generate means that the prompt is scored."""
    answer = put(served, prompts=PROMPTS[:1], tokens_to_generate=0)
    scored = served.model.generate(PROMPTS[0], max_new_tokens=0, prompt_logprobs=0)
    assert answer["logprobs"] == [pytest.approx([score for score, _ in scored.prompt_logprobs])]
    assert "".join(answer["segments"][0]) == PROMPTS[0] == answer["text"][0]
    echoed = put(served, prompts=PROMPTS[:1], tokens_to_generate=3, echo_prompts=True, logprobs=True)
    assert len(echoed["logprobs"][0]) == len(echoed["segments"][0]) - 1
    assert echoed["text"][0].startswith(PROMPTS[0])


def test_sampling_and_stops(served: Served) -> None:
    ask: dict[str, Any] = {"prompts": PROMPTS[0], "tokens_to_generate": 24, "temperature": 0.8, "top_p": 0.9}
    found = served.model.generate(PROMPTS[0], max_new_tokens=24, temperature=0.8, top_p=0.9, seed=5, mode="full")
    assert put(served, **ask, random_seed=5)["text"] == [found.text]
    text = found.text or ""
    stop = text[6:8]
    assert put(served, **ask, random_seed=5, stop_sequences=[stop])["text"] == [text[: text.index(stop)]]
    begun = put(served, prompts="", add_BOS=True, tokens_to_generate=4)
    assert begun["text"] == [served.model.generate([1], max_new_tokens=4, mode="full").text]


def test_no_line_follows_a_colon(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    colon, newline = (served.model.encode(text)[0] for text in ":\n")
    engine = served.server.state.service.engine  # type: ignore[union-attr]
    submit, seen = engine.submit, []

    def noted(jobs: Any, **more: Any) -> Any:
        seen.append(jobs[0][1].bad_words)
        return submit(jobs, **more)

    monkeypatch.setattr(engine, "submit", noted)
    for asked in (False, True):
        put(served, prompts="List:", tokens_to_generate=1, prevent_newline_after_colon=asked)
    assert seen == [(), ((colon, newline),)]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "prompts"),
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [1]}, "prompts"),
        ({"prompts": ["x"] * 129}, "at most 128"),
        ({"prompts": "x", "max_len": 5}, "tokens_to_generate"),
        ({"prompts": "x", "sentences": ["y"]}, "prompts"),
        ({"prompts": "x", "tokens_to_generate": -1}, "tokens_to_generate"),
        ({"prompts": "x", "tokens_to_generate": "5"}, "tokens_to_generate"),
        ({"prompts": "x", "logprobs": 1}, "logprobs"),
        ({"prompts": "x", "early_exit_thres": "high"}, "early_exit_thres"),
        ({"prompts": "x", "exit_layers": [1.5]}, "exit_layers"),
        ({"prompts": "x", "use_early_exit": True, "exit_layers": [2]}, "no exit at layer 2"),
        ({"prompts": "x", "use_early_exit": "yes"}, "use_early_exit"),
        ({"prompts": "x", "top_k": 3, "top_p": 0.5}, "top_p"),
        ({"prompts": "x", "top_k": 1001}, "top_k"),
        ({"prompts": "x", "top_p_decay": 0.5}, "top_p_decay"),
        ({"prompts": "x", "temperature": 101}, "temperature"),
        ({"prompts": ""}, "add_BOS"),
        ({"prompts": "x", "stop_sequences": "s"}, "stop_sequences"),
        ({"prompts": "x", "random_seed": -1}, "random_seed"),
        ({"prompts": "x", "beam_width": 4}, "beam"),
        ({"prompts": "x", "early_exit_thresh": 0.5}, "did you mean 'early_exit_thres'"),
    ],
)
def test_mistakes_have_status_400(served: Served, body: dict[str, Any], says: str) -> None:
    assert says in put(served, 400, **body)["error"]["message"]
