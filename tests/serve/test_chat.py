"""Chat completions by the official client: the same tokens as from ``generate``, whole and streamed."""

import json
from typing import Any
from unittest import mock

import openai
import pytest

from tests.serve.conftest import Served, run

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}]
NAME = "tiny:exits"


def expected(served: Served, **settings: Any) -> Any:
    """What the model writes by itself."""
    return served.model.generate(MESSAGES, **{"temperature": 1.0, **settings})


def text_of(chunks: list[Any], index: int = 0) -> str:
    """The text of one choice of a stream."""
    return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index)


@pytest.mark.parametrize(
    ("request_fields", "settings"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_p": 0.9, "seed": 5}, {"temperature": 0.7, "top_p": 0.9, "seed": 5}),
        ({"seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {"40": 5}},
         {"seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {40: 5.0}}),
        ({"seed": 4, "extra_body": {"min_p": 0.02, "repetition_penalty": 1.2, "top_k": 30}},
         {"seed": 4, "min_p": 0.02, "repetition_penalty": 1.2, "top_k": 30}),
        ({"seed": 6, "extra_body": {"exitlm": {"mode": "threshold", "threshold": 0.02}}},
         {"seed": 6, "mode": "threshold", "threshold": 0.02}),
        ({"seed": 7, "extra_body": {"exitlm": {"mode": "threshold", "threshold": {"1": 0.0, "3": 1}, "exits": [1]}}},
         None),
        ({"seed": 8, "extra_body": {"exitlm": {"mode": "full"}}}, {"seed": 8, "mode": "full"}),
    ],
)  # fmt: skip
def test_an_answer_is_what_generate_gives(
    served: Served, client: openai.OpenAI, request_fields: dict[str, Any], settings: dict[str, Any] | None
) -> None:
    ask = {"model": NAME, "messages": MESSAGES, "max_completion_tokens": 24, **request_fields}
    if settings is None:  # a threshold for an exit that is not among the active ones
        with pytest.raises(openai.BadRequestError, match="no active exit"):
            client.chat.completions.create(**ask)
        return
    found = served.model.generate(MESSAGES, **{"temperature": 1.0, "max_new_tokens": 24, **settings})
    answer = client.chat.completions.create(**ask)
    assert answer.choices[0].message.content == found.text
    assert answer.choices[0].finish_reason == found.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == found.stats.prompt_tokens
    assert answer.usage.completion_tokens == len(found.token_ids)
    assert answer.usage.exitlm["mode"] == found.stats.mode  # type: ignore[attr-defined]
    assert answer.usage.exitlm["exact"] is True  # type: ignore[attr-defined]
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert text_of(chunks) == found.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_usage_if_asked(client: openai.OpenAI) -> None:
    ask: Any = {"model": NAME, "messages": MESSAGES, "max_tokens": 5, "temperature": 0}
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert chunks[-1].usage.exitlm["layers"] == 4
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_a_seed(served: Served, client: openai.OpenAI, stream: bool) -> None:
    found = expected(served, n=3, seed=11, max_new_tokens=12)
    ask: Any = {"model": NAME, "messages": MESSAGES, "max_tokens": 12, "n": 3, "seed": 11}
    if stream:
        chunks = list(client.chat.completions.create(**ask, stream=True))
        texts = [text_of(chunks, index) for index in range(3)]
    else:
        texts = [choice.message.content for choice in client.chat.completions.create(**ask).choices]
    assert texts == [choice.text for choice in found.choices]
    assert len(set(texts)) == 3


def test_stop_strings_end_a_text(served: Served, client: openai.OpenAI) -> None:
    whole = expected(served, temperature=0.0, max_new_tokens=64).text
    stop = whole[9:11]
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=64, temperature=0, stop=[stop, "never"]
    )
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(served: Served, client: openai.OpenAI, stream: bool) -> None:
    found = expected(served, temperature=0.0, max_new_tokens=6, logprobs=3)
    ask: Any = {
        "model": NAME,
        "messages": MESSAGES,
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    if stream:
        chunks = list(client.chat.completions.create(**ask, stream=True))
        entries = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    else:
        entries = client.chat.completions.create(**ask).choices[0].logprobs.content
    assert [e.logprob for e in entries] == pytest.approx([token.logprob for token in found.trace])
    assert [len(e.top_logprobs) for e in entries] == [3] * 6
    assert entries[0].top_logprobs[0].logprob == pytest.approx(max(found.trace[0].top_logprobs.values()))
    assert bytes(b for e in entries for b in e.bytes).decode(errors="replace") == found.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_trace_tells_where_tokens_left(served: Served, client: openai.OpenAI, stream: bool) -> None:
    settings = {"mode": "threshold", "threshold": 0.02}
    found = expected(served, temperature=0.0, max_new_tokens=16, **settings)
    ask: Any = {"model": NAME, "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
    ask["extra_body"] = {"exitlm": {**settings, "trace": True}}
    if stream:
        chunks = list(client.chat.completions.create(**ask, stream=True))
        parts = [c.choices[0].exitlm for c in chunks if hasattr(c.choices[0], "exitlm")]
    else:
        parts = [client.chat.completions.create(**ask).choices[0].exitlm]
    assert [layer for part in parts for layer in part["exit_layers"]] == found.exit_layers
    assert set(found.exit_layers) > {4}, "no token left at an exit, and the test shows nothing"
    assert [source for part in parts for source in part["sources"]] == [token.source for token in found.trace]
    assert "".join(text for part in parts for text in part["tokens"]) == found.text
    tested = [tests for part in parts for tests in part["tested"]]
    assert [[t["layer"] for t in tests] for tests in tested] == [list(token.confidence) for token in found.trace]
    sure = [value for part in parts for value in part["confidences"]]
    assert [value is None for value in sure] == [layer == 4 for layer in found.exit_layers]


def test_a_trace_tells_which_drafts_were_refused(served: Served, client: openai.OpenAI) -> None:
    """A prediction that is right for two tokens, and then wrong."""
    found = expected(served, temperature=0.0, max_new_tokens=8, mode="full", ignore_eos=True)
    wrong = next(token for token in range(40, 60) if token != found.token_ids[2])
    drafts = [*found.token_ids[:2], wrong]
    drafting = {"mode": "lossless", "draft": ["prediction"], "adaptive": False}
    body = {"exitlm": {**drafting, "trace": True}, "ignore_eos": True}
    with mock.patch("exitlm.decode.intake.Intake._expected_ids", return_value=drafts):
        answer = client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=8, temperature=0, extra_body=body,
            prediction={"type": "content", "content": "anything"},
        )  # fmt: skip
    trace = answer.choices[0].exitlm  # type: ignore[attr-defined]
    assert trace["sources"][:3] == ["final", "prediction", "final"]
    told = {"token": served.model.tokenizer.decode([wrong]), "layer": 4, "source": "prediction"}
    assert trace["refused"] == [None, None, told, *[None] * 5]
    assert answer.choices[0].message.content == found.text


def test_parts_and_developers(served: Served, client: openai.OpenAI) -> None:
    parts: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        MESSAGES[1],
    ]
    answer = client.chat.completions.create(model=NAME, messages=parts, max_tokens=9, temperature=0)
    assert answer.choices[0].message.content == expected(served, temperature=0.0, max_new_tokens=9).text


def test_json_by_a_schema(client: openai.OpenAI) -> None:
    pytest.importorskip("xgrammar")
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    shape: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    ask: Any = {"model": NAME, "messages": MESSAGES, "max_tokens": 200, "seed": 1}
    answer = client.chat.completions.create(**ask, response_format=shape)
    assert json.loads(answer.choices[0].message.content or "")["n"] in (1, 2)
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(**ask, response_format={"type": "json_schema", "json_schema": {"name": "x"}})


def test_a_prediction_is_a_source_of_drafts(served: Served, client: openai.OpenAI) -> None:
    text = expected(served, temperature=0.0, max_new_tokens=40, mode="full").text
    ask: Any = {"model": NAME, "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
    answer = client.chat.completions.create(**ask, prediction={"type": "content", "content": text})
    assert answer.choices[0].message.content == text
    details = answer.usage.completion_tokens_details  # type: ignore[union-attr]
    assert details is not None
    assert details.accepted_prediction_tokens is not None
    assert details.rejected_prediction_tokens is not None
    # whether drafts pay is measured; without the scheduler's choice all that fits is drafted
    ask["extra_body"] = {"exitlm": {"adaptive": False}}
    answer = client.chat.completions.create(**ask, prediction={"type": "content", "content": "no" + text[3:]})
    assert answer.choices[0].message.content == text
    details = answer.usage.completion_tokens_details  # type: ignore[union-attr]
    assert details.rejected_prediction_tokens > 0  # type: ignore[union-attr,operator]


def test_asyncio_clients_share_passes(served: Served) -> None:
    async def ask_all() -> list[str | None]:
        import asyncio

        async with served.async_client() as client:

            async def ask(seed: int) -> str | None:
                if seed % 2:
                    parts = []
                    stream = await client.chat.completions.create(
                        model=NAME, messages=MESSAGES, max_tokens=20, seed=seed, stream=True
                    )
                    async for chunk in stream:
                        parts.append(chunk.choices[0].delta.content or "")
                    return "".join(parts)
                answer = await client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=20, seed=seed)
                return answer.choices[0].message.content

            return await asyncio.gather(*(ask(seed) for seed in range(12)))

    found = run(ask_all())
    assert found == [expected(served, seed=seed, max_new_tokens=20).text for seed in range(12)]
