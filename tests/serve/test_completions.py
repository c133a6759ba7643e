"""Completions by the official client, and tokens there and back."""

from typing import Any

import openai
import pytest

from tests.serve.conftest import Served

NAME = "tiny:exits"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["The sky", ["The sky", "Once", "I"], [40, 41, 42], [[40, 41], [50]]])
def test_each_prompt_is_continued(served: Served, client: openai.OpenAI, prompt: Any, stream: bool) -> None:
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    settings: Any = {"n": 2, "temperature": 0.9, "seed": 4}
    found = [served.model.generate(one, max_new_tokens=10, **settings) for one in prompts]
    texts = [choice.text for one in found for choice in one.choices]
    ask: Any = {"model": NAME, "prompt": prompt, "max_tokens": 10, **settings}
    if stream:
        got = [""] * len(texts)
        for chunk in client.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
            for choice in chunk.choices:
                got[choice.index] += choice.text
            usage = chunk.usage
    else:
        answer = client.completions.create(**ask)
        got, usage = [choice.text for choice in answer.choices], answer.usage
        assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    assert got == texts
    assert usage is not None
    assert usage.prompt_tokens == sum(one.stats.prompt_tokens for one in found)
    assert usage.completion_tokens == 10 * len(texts)


def test_sixteen_tokens_unless_asked(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt="The sky", temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 16


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [0, 5])
def test_echo_with_log_probabilities(served: Served, client: openai.OpenAI, tokens: int, stream: bool) -> None:
    prompt = "The sky is"
    found = served.model.generate(prompt, max_new_tokens=tokens, logprobs=2, prompt_logprobs=2)
    ask: Any = {
        "model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 2, "echo": True,
    }  # fmt: skip
    if stream:
        parts = [chunk.choices[0] for chunk in client.completions.create(**ask, stream=True)]
        text = "".join(part.text for part in parts)
        scores: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for part in parts:
            for name in scores:
                scores[name] += getattr(part.logprobs, name) if part.logprobs else []
    else:
        choice = client.completions.create(**ask).choices[0]
        text, scores = choice.text, choice.logprobs.model_dump()  # type: ignore[union-attr]
    assert text == prompt + (found.text or "")
    expected = [score for score, _ in found.prompt_logprobs] + [token.logprob for token in found.trace]
    assert scores["token_logprobs"][0] is None
    assert scores["token_logprobs"][1:] == pytest.approx(expected)
    assert scores["tokens"][: len(prompt)] == list(prompt)
    assert scores["text_offset"][: len(prompt)] == list(range(len(prompt)))
    assert scores["top_logprobs"][0] is None
    assert max(scores["top_logprobs"][1].values()) == pytest.approx(max(found.prompt_logprobs[0][1].values()))


def test_log_probabilities_without_alternatives(served: Served, client: openai.OpenAI) -> None:
    found = served.model.generate("The sky", max_new_tokens=4, logprobs=1)
    answer = client.completions.create(model=NAME, prompt="The sky", max_tokens=4, temperature=0, logprobs=0)
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx([token.logprob for token in found.trace])
    assert answer.choices[0].logprobs.top_logprobs is None


def test_the_base_uses_no_exits(served: Served, client: openai.OpenAI) -> None:
    ask: Any = {"prompt": "The sky", "max_tokens": 20, "temperature": 0, "extra_body": {"exitlm": {"trace": True}}}
    base = client.completions.create(model="tiny", **ask).choices[0]
    assert set(base.exitlm["exit_layers"]) == {4}  # type: ignore[attr-defined]
    assert not any(base.exitlm["tested"])  # type: ignore[attr-defined]
    assert base.text == served.model.generate("The sky", max_new_tokens=20, mode="full").text


def test_models_and_exits(served: Served, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", NAME]
    assert client.models.retrieve("tiny").owned_by == "exitlm"
    with served.http() as http:
        exits = http.get("/v1/exits").json()
    assert exits["tiny"]["exits"] == []
    assert exits["tiny"]["modes"] == ["full", "lossless"]
    assert [(e["layer"], e["kind"]) for e in exits[NAME]["exits"]] == [(1, "norm"), (3, "norm")]
    assert exits[NAME]["layers"] == 4
    assert exits[NAME]["exact"] is True
    assert "gate" not in exits[NAME]["rules"]


def test_tokens_there_and_back(served: Served) -> None:
    with served.http() as http:
        for text in ("The sky", "ü→𝄞", ""):
            found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
            assert found["count"] == len(found["tokens"]) == len(text.encode())
            assert found["max_model_len"] == 2048
            assert len(found["token_strs"]) == found["count"]
            assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
        messages = [{"role": "user", "content": "hi"}]
        found = http.post("/tokenize", json={"messages": messages}).json()
        assert found["tokens"] == served.model.encode(messages)
