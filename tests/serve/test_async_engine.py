"""The engine for asyncio: the texts of ``generate``, many at once; what is cancelled, refused, late or broken."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import exitlm
from exitlm import AsyncEngine, GenerationConfig, UserError
from exitlm.serve.async_engine import MAX_BROKEN_STEPS, Broken, Expired, Full
from tests.native.cases import needs_native
from tests.serve.conftest import run

PROMPTS = ["Once upon a time", "The sky is", "Call me", "In the beginning"]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., exitlm.LLM]) -> exitlm.LLM:
    return make_model()


def used(model: exitlm.LLM) -> int:
    return sum(allocator.used for allocator in model.engine.memory.pool.allocators)


@pytest.fixture(autouse=True)
def nothing_is_left(model: exitlm.LLM) -> Iterator[None]:
    yield
    assert used(model) == 0
    assert not model.engine.roster.running
    assert not model.engine.roster.waiting
    assert not model.engine._sinks


async def streamed(engine: AsyncEngine, prompt: str, **settings: Any) -> str:
    return "".join([piece.text async for piece in engine.stream(prompt, **settings)])


@pytest.mark.parametrize("mode", ["full", "threshold", "lossless"])
def test_texts_are_those_of_generate(model: exitlm.LLM, mode: str) -> None:
    settings: Any = {"mode": mode, "max_new_tokens": 24, "temperature": 0.8}
    if mode != "full":
        settings["threshold"] = 0.02

    async def ask() -> list[Any]:
        async with AsyncEngine(model) as engine:
            whole = [engine.generate(prompt, seed=i, **settings) for i, prompt in enumerate(PROMPTS)]
            parts = [streamed(engine, prompt, seed=i, **settings) for i, prompt in enumerate(PROMPTS)]
            return await asyncio.gather(*whole, *parts)

    found = run(ask())
    for i, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt, seed=i, **settings)
        assert found[i].token_ids == alone.token_ids
        assert found[len(PROMPTS) + i] == alone.text
        if mode != "lossless":
            assert found[i].exit_layers == alone.exit_layers


@needs_native
def test_texts_are_those_of_generate_natively(make_model: Callable[..., exitlm.LLM]) -> None:
    model = make_model("float32", quant="q8_0")

    async def ask() -> list[Any]:
        async with AsyncEngine(model) as engine:
            made = [engine.generate(p, seed=i, temperature=0.9, max_new_tokens=40) for i, p in enumerate(PROMPTS * 3)]
            return await asyncio.gather(*made)

    found = run(ask())
    for i, prompt in enumerate(PROMPTS * 3):
        alone = model.generate(prompt, seed=i, temperature=0.9, max_new_tokens=40)
        assert found[i].token_ids == alone.token_ids
        assert found[i].stats.exact


def test_choices(model: exitlm.LLM) -> None:
    settings: Any = {"n": 3, "temperature": 1.0, "seed": 2, "max_new_tokens": 9}

    async def ask() -> Any:
        async with AsyncEngine(model) as engine:
            pieces = [piece async for piece in engine.stream("Hello", **settings)]
            return await engine.generate("Hello", **settings), pieces

    found, pieces = run(ask())
    alone = model.generate("Hello", **settings)
    assert [choice.text for choice in found.choices] == [choice.text for choice in alone.choices]
    texts = ["".join(p.text for p in pieces if p.choice == i) for i in range(3)]
    assert texts == [choice.text for choice in alone.choices]


@pytest.mark.parametrize("how", ["cancel", "break"])
def test_who_leaves_gives_the_blocks_back(model: exitlm.LLM, how: str) -> None:
    async def ask() -> None:
        async with AsyncEngine(model) as engine:
            for _ in range(4):
                begun = asyncio.Event()

                async def read(begun: asyncio.Event = begun) -> None:
                    async for _piece in engine.stream("Once", max_new_tokens=1900, ignore_eos=True):
                        begun.set()
                        if how == "break":
                            break

                task = asyncio.create_task(read())
                await begun.wait()
                if how == "cancel":
                    task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                while engine.live:
                    await asyncio.sleep(0.001)
                assert used(model) == 0
            assert (await engine.generate("Once", max_new_tokens=3)).finish_reason == "length"

    run(ask())


def test_mistakes_are_told_and_leave_nothing(model: exitlm.LLM) -> None:
    async def ask() -> None:
        async with AsyncEngine(model) as engine:
            with pytest.raises(UserError, match="no exit at layer 2"):
                await engine.generate("Hi", exits=[2])
            with pytest.raises(UserError, match="empty"):
                await engine.generate([])
            with pytest.raises(UserError, match="no setting 'temperatur'"):
                await engine.generate("Hi", temperatur=1)  # type: ignore[call-arg]
            good, bad = ([5], GenerationConfig(max_new_tokens=4)), ([999], GenerationConfig())
            submission = engine.submit([good, bad], streams=False)
            with pytest.raises(UserError, match="999"):
                _ = [batch async for batch in submission.batches()]
            while engine.live:
                await asyncio.sleep(0.001)
            assert (await engine.generate("Hi", max_new_tokens=2)).finish_reason == "length"

    run(ask())


def test_one_too_many_is_refused(model: exitlm.LLM) -> None:
    async def ask() -> None:
        async with AsyncEngine(model, max_waiting=0) as engine:
            config = GenerationConfig(max_new_tokens=300, n=engine.engine.most, temperature=1.0, ignore_eos=True)
            submission = engine.submit([([5], config)], streams=False)
            with pytest.raises(Full, match="too many") as caught:
                await engine.generate("Hi")
            assert 1 <= caught.value.retry_after <= 60
            submission.close()
            while engine.live:
                await asyncio.sleep(0.001)
            await engine.generate("Hi", max_new_tokens=2)

    run(ask())


def test_a_deadline_ends_a_text(model: exitlm.LLM) -> None:
    async def ask() -> None:
        async with AsyncEngine(model) as engine:
            config = GenerationConfig(max_new_tokens=2000, ignore_eos=True)
            submission = engine.submit([([5], config)], streams=True, deadline=0.05)
            with pytest.raises(Expired, match=r"0\.05 seconds"):
                async for _ in submission.batches():
                    pass
            while engine.live:
                await asyncio.sleep(0.001)

    run(ask())


def test_a_broken_pass_ends_all_texts(model: exitlm.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that run and those that wait; the next ones are answered, if the engine can."""

    async def ask() -> None:
        async with AsyncEngine(model) as engine:
            real, broken = engine.engine.runner.run, True

            def breaks(*given: Any) -> Any:
                if broken:
                    raise RuntimeError("no such luck")
                return real(*given)

            monkeypatch.setattr(engine.engine.runner, "run", breaks)
            many = [engine.generate("Hi", max_new_tokens=4, seed=i) for i in range(engine.engine.most + 5)]
            found = await asyncio.gather(*many, return_exceptions=True)
            assert {type(error) for error in found} == {Broken}
            assert "RuntimeError" in str(found[0])
            for _ in range(MAX_BROKEN_STEPS):
                with pytest.raises(Broken):
                    await engine.generate("Hi")
            assert engine.is_broken
            broken = False
            assert (await engine.generate("Hi", max_new_tokens=4)).finish_reason == "length"
            assert not engine.is_broken

    run(ask())


def test_closing_ends_what_runs(model: exitlm.LLM) -> None:
    async def ask() -> None:
        engine = AsyncEngine(model)
        with pytest.raises(Broken, match="async with"):
            await engine.generate("Hi")
        engine.start()
        task = asyncio.create_task(engine.generate("Hi", max_new_tokens=2000, ignore_eos=True))
        while not model.engine.roster.running:
            await asyncio.sleep(0.001)
        await engine.close()
        with pytest.raises(Broken, match="closed"):
            await task

    run(ask())


def test_beside_a_stream_of_another_thread(model: exitlm.LLM) -> None:
    """The model may be used directly while the engine's thread runs."""

    async def ask() -> Any:
        async with AsyncEngine(model) as engine:
            beside = asyncio.to_thread(lambda: [model.generate(p, max_new_tokens=12).text for p in PROMPTS])
            mine = asyncio.gather(*(engine.generate(p, max_new_tokens=12) for p in PROMPTS))
            return await beside, [found.text for found in await mine]

    beside, mine = run(ask())
    assert beside == mine == [model.generate(p, max_new_tokens=12).text for p in PROMPTS]
