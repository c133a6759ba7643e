"""``exitlm generate --prompts``: every line is answered in order, whatever stopped the run before."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import exitlm
from exitlm import UserError, prompts_file
from exitlm.atomic import locked
from exitlm.prompts_file import answer, answered, in_order, read_prompts
from tests.conftest import Run

pytestmark = pytest.mark.usefixtures("cache")
SHORT = {"max_new_tokens": 3, "mode": "full", "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> exitlm.LLM:
    model = exitlm.load(checkpoint)
    model.add_exits([1, 3], kind="norm")
    return model


@pytest.fixture
def run(run: Run) -> Run:
    """Run ``exitlm generate`` in this process."""
    return functools.partial(run, "generate")


def write(path: Path, *lines: Any) -> Path:
    """A file of JSON lines; texts and bytes go in as they are."""
    rows = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
            for line in lines]  # fmt: skip
    path.write_bytes(b"".join(row + b"\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of answers."""
    text = path.read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


PROMPTS: list[dict[str, Any]] = [
    {"prompt": "hello", "id": "a"},
    {"prompt": [5, 9, 77], "max_new_tokens": 5, "id": 7},
    {"messages": [{"role": "user", "content": "hi"}], "mode": "threshold", "threshold": {"1": 0.0, "3": 1.0}},
    {"prompt": "hello", "temperature": 1.0, "seed": 3, "logprobs": 2},
    {"prompt": "x", "max_new_tokens": 1},
]


def test_each_line_is_what_generate_returns(llm: exitlm.LLM, tmp_path: Path) -> None:
    lines = read_prompts(write(tmp_path / "p.jsonl", *PROMPTS), SHORT)
    done = answer(llm, lines, tmp_path / "new" / "a.jsonl")
    found = read(tmp_path / "new" / "a.jsonl")
    assert (done.done, done.failed, done.size) == (5, 0, (tmp_path / "new" / "a.jsonl").stat().st_size)
    for index, (answered_line, given_line) in enumerate(zip(found, PROMPTS, strict=True)):
        own = {name: value for name, value in given_line.items() if name not in ("prompt", "messages", "id")}
        if "threshold" in own:
            own["threshold"] = {1: 0.0, 3: 1.0}
        expected = llm.generate(given_line.get("prompt") or given_line["messages"], **{**SHORT, **own})
        assert answered_line["index"] == index
        assert answered_line.get("id") == given_line.get("id")
        for name in ("text", "token_ids", "exit_layers", "finish_reason"):
            assert answered_line[name] == getattr(expected, name)
        assert answered_line["mode"] == own.get("mode", "full")
        assert answered_line["stats"]["tokens"] == len(expected.token_ids)
        assert answered_line["stats"]["prompt_tokens"] == expected.stats.prompt_tokens
        assert ("logprobs" in answered_line) == ("logprobs" in own)
    assert found[2]["exit_layers"] == [4, 1, 1]
    assert [len(entry["top"]) for entry in found[3]["logprobs"]] == [2, 2, 2]


WRONG: list[tuple[Any, str]] = [
    ({"promt": "x"}, "unknown field 'promt'; did you mean 'prompt'"),
    ({"prompt": "x", "tempreature": 1}, "unknown field 'tempreature'; did you mean 'temperature'"),
    ({"prompt": "x", "threshold": 2}, "threshold is 2"),
    ({"prompt": "x", "mode": "fast"}, "mode 'fast' is unknown"),
    ({"prompt": "x", "exits": [2], "mode": "threshold"}, "no exit at layer 2"),
    ({"prompt": "x", "messages": []}, "both prompt and messages"),
    ({"id": 1}, "there is no prompt; give prompt or messages"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": []}, "the prompt is empty"),
    ({"prompt": 5}, "prompt is 5 (int), but must be a text or a list of token ids"),
    ({"prompt": None}, "prompt is None"),
    ({"prompt": [{"role": "user", "content": "x"}]}, "chat messages are called messages"),
    ({"prompt": ["a"]}, "the prompt is ['a'] (list)"),
    ({"prompt": [9999]}, "9999"),
    ({"prompt": "x" * 99}, "99 tokens"),
    ({"messages": "x"}, "messages is 'x' (str), but must be a list of objects"),
    ({"messages": []}, "messages is [] (list)"),
    ({"messages": [5]}, "messages is [5] (list)"),
    ({"messages": [{"role": "user"}]}, "message 1 has no content"),
    ({"prompt": "x", "id": [1]}, "id is [1] (list), but must be a text or a whole number"),
    ({"prompt": "x", "id": True}, "id is True (bool)"),
    ("{", "this is not valid JSON (Expecting property name enclosed in double quotes, at character 2)"),
    ("[" * 99999, "this is not valid JSON"),
    ("9" * 5000, "this is not valid JSON"),
    ("[1]", "this is [1] (list), but must be an object"),
    ('"x"', "this is 'x' (str)"),
    (b'{"prompt": "\xff"}', "this is not UTF-8 text"),
    ('{"prompt": "\\ud800"}', "not valid UTF-8"),
]


def test_a_wrong_line_fails_alone(llm: exitlm.LLM, tmp_path: Path) -> None:
    good = {"prompt": "x"}
    lines = [line for wrong, _ in WRONG for line in (good, wrong)]
    out = tmp_path / "a.jsonl"
    source = write(tmp_path / "p.jsonl", *lines)
    done = answer(llm, read_prompts(source, SHORT), out)
    assert (done.done, done.failed) == (len(lines), len(WRONG))
    found = read(out)
    assert all("error" not in line and line["token_ids"] == found[0]["token_ids"] for line in found[::2])
    for number, (line, (wrong, says)) in enumerate(zip(found[1::2], WRONG, strict=True)):
        assert line["error"].startswith(f"line {2 * number + 2}: ")
        assert says in line["error"]
        assert "\n" not in line["error"]
        assert set(line) - {"id"} == {"index", "digest", "error"}, wrong


def test_empty_lines_and_marks_are_skipped(tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", b'\xef\xbb\xbf{"prompt": "a"}', "", "  ", '{"prompt": "b"}\r', b"\t")
    found = read_prompts(source, {})
    assert [(line.index, line.number) for line in found] == [(0, 1), (1, 4)]
    assert all(isinstance(line, prompts_file.PromptLine) for line in found)
    with pytest.raises(
        UserError, match=r'holds no prompt; write one JSON object a line, such as \{"prompt": "Hello"\}'
    ):
        read_prompts(write(tmp_path / "p.jsonl", "", " "), {})
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="cannot be read"):
            read_prompts(place, {})


class Interrupting:
    """Decodes as ``decode_many``, counts the prompts that it is given, and is interrupted after some answers."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.prompts = at, 0
        self.decode = prompts_file.decode_many

    def __call__(self, llm: exitlm.LLM, prompts: Sequence[Any]) -> Iterator[Any]:
        """Outcomes in the order of the prompts."""
        self.prompts += len(prompts)
        found = dict(self.decode(llm, prompts))
        for count, line in enumerate(prompts):
            if count == self.at:
                raise KeyboardInterrupt
            yield line.index, found[line.index]


def answer_with(decode: Interrupting, *arguments: Any) -> prompts_file.Answered:
    """``answer`` with another way of decoding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts_file, "decode_many", decode)
        return answer(*arguments)


@given(cut=st.floats(0, 1))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_anywhere_is_finished_to_the_same_bytes(llm: exitlm.LLM, tmp_path: Path, cut: float) -> None:
    out = tmp_path / "a.jsonl"
    lines = read_prompts(write(tmp_path / "p.jsonl", *PROMPTS, "{", {"prompt": "y"}), SHORT)
    if not out.exists():
        answer(llm, lines, out)
    whole = out.read_bytes()
    kept = whole[: int(cut * len(whole))]
    out.write_bytes(kept)
    before = answered(out, lines)
    assert (before.done, before.size) == (kept.count(b"\n"), kept.rfind(b"\n") + 1)
    counting = Interrupting()
    done = answer_with(counting, llm, lines, out)
    assert out.read_bytes() == whole
    assert (done.done, done.failed) == (7, 1)
    assert counting.prompts == sum(line.index != 5 for line in lines[before.done :])


@pytest.mark.parametrize("at", range(5))
def test_an_interrupt_leaves_whole_lines(
    llm: exitlm.LLM, tmp_path: Path, at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, out = read_prompts(write(tmp_path / "p.jsonl", *PROMPTS), SHORT), tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_with(Interrupting(at), llm, lines, out)
    assert f"stopped after {at} of 5 prompts; the same command continues\n" in capsys.readouterr().err
    assert len(read(out)) == at
    counting = Interrupting()
    assert answer_with(counting, llm, lines, out).done == 5
    assert counting.prompts == 5 - at
    assert [line["index"] for line in read(out)] == [0, 1, 2, 3, 4]


def test_a_defect_leaves_whole_lines_too(llm: exitlm.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, out = read_prompts(write(tmp_path / "p.jsonl", *PROMPTS), SHORT), tmp_path / "a.jsonl"

    def broken(llm: object, prompts: Sequence[Any]) -> Iterator[Any]:
        yield prompts[0].index, UserError("no")
        raise RuntimeError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(prompts_file, "decode_many", broken)
        with pytest.raises(RuntimeError, match="a defect"):
            answer(llm, lines, out)
    assert answered(out, lines).done == answered(out, lines).failed == 1
    assert answer(llm, lines, out).failed == 1  # what failed is not tried again


@given(order=st.permutations(range(6)))
def test_answers_keep_the_order_of_the_prompts(order: list[int]) -> None:
    lines: list[prompts_file.Line] = []
    for index in range(8):
        place: dict[str, Any] = {"index": index, "number": index + 1, "digest": ""}
        wrong = index in (2, 7)
        more = {"error": UserError("no")} if wrong else {"prompt": "x", "chat": False, "config": None}
        lines.append((prompts_file.WrongLine if wrong else prompts_file.PromptLine)(**place, **more))
    closed = []

    def out_of_order(llm: object, prompts: Sequence[prompts_file.PromptLine]) -> Iterator[Any]:
        try:
            for i in order:
                yield prompts[i].index, f"text {prompts[i].index}"
        finally:
            closed.append(True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts_file, "decode_many", out_of_order)
        found = list(in_order(None, lines))  # type: ignore[arg-type]
        assert [line for line, _ in found] == lines
        assert [what for line, what in found if line.index not in (2, 7)] == [f"text {i}" for i in (0, 1, 3, 4, 5, 6)]
        some = in_order(None, lines)  # type: ignore[arg-type]
        next(some)
        some.close()  # type: ignore[attr-defined]
    assert closed == [True, True]


def test_answers_to_other_prompts_are_not_continued(llm: exitlm.LLM, tmp_path: Path) -> None:
    source, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    model = {"names": ["a"], "dtype": "auto"}

    def lines(*prompts: Any, changes: Any = None, chat: bool = False, of: Any = model) -> list[prompts_file.Line]:
        return read_prompts(write(source, *prompts), {**SHORT, **(changes or {})}, chat=chat, model=of)

    answer(llm, lines(*PROMPTS[:2]), out)
    before = out.read_bytes()
    assert answered(out, lines(*PROMPTS)).done == 2  # a file that has grown goes on
    others = {
        "line 1 .* line 1 of the prompts": [
            lines({"prompt": "other"}, *PROMPTS),
            lines(*PROMPTS, changes={"max_new_tokens": 4}),
            lines(*PROMPTS, chat=True),
            lines(*PROMPTS, of={**model, "names": ["b"]}),
            lines(*PROMPTS[::-1]),
        ],
        "line 2 .* line 3 of the prompts": [lines(PROMPTS[0], "", PROMPTS[2])],
        "more than the answers to these 1 prompts": [lines(PROMPTS[0])],
    }
    for says, cases in others.items():
        for case in cases:
            with pytest.raises(UserError, match=rf"{says}.*delete .* to start again"):
                answered(out, case)
            with pytest.raises(UserError, match="to start again"):
                answer(llm, case, out)
            assert out.read_bytes() == before


@pytest.mark.parametrize(
    "held", [b"notes\n", b"notes", b'{"index": 0, "digest": "x', b"\0" * 50, b'{"a": 1}\n', b"\n", b"{}\n"]
)
def test_a_file_that_holds_something_else_is_left_alone(llm: exitlm.LLM, tmp_path: Path, held: bytes) -> None:
    out = tmp_path / "a.jsonl"
    out.write_bytes(held)
    lines = read_prompts(write(tmp_path / "p.jsonl", *PROMPTS), SHORT)
    with pytest.raises(UserError, match="choose another file"):
        answer(llm, lines, out)
    assert out.read_bytes() == held


def test_a_damaged_line_is_named(llm: exitlm.LLM, tmp_path: Path) -> None:
    lines, out = read_prompts(write(tmp_path / "p.jsonl", *PROMPTS), SHORT), tmp_path / "a.jsonl"
    answer(llm, lines, out)
    rows = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([*rows[:2], rows[2][:60] + b"\n", *rows[3:]]))
    with pytest.raises(UserError, match="line 3 of"):
        answered(out, lines)


def test_two_writers_do_not_meet(llm: exitlm.LLM, tmp_path: Path) -> None:
    lines, out = read_prompts(write(tmp_path / "p.jsonl", *PROMPTS), SHORT), tmp_path / "a.jsonl"
    out.touch()
    with locked(out), pytest.raises(UserError, match=r"another process writes to .*a\.jsonl; wait for it, or choose"):
        answer(llm, lines, out)
    assert out.read_bytes() == b""
    assert answer(llm, lines, out).done == 5


def test_a_place_that_cannot_be_written(llm: exitlm.LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = read_prompts(write(tmp_path / "p.jsonl", *PROMPTS), SHORT)
    with pytest.raises(UserError, match="is not a file; choose another place"):
        answered(tmp_path, lines)
    with pytest.raises(UserError, match=r"cannot write .*: (Not a directory|File exists)"):
        answer(llm, lines, tmp_path / "p.jsonl" / "a.jsonl")
    out, real = tmp_path / "a.jsonl", os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) < 50:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[:50])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(UserError, match="No space left on device; the same command continues"):
            answer(llm, lines, out)
    assert answered(out, lines).done == 0
    assert out.stat().st_size > 0  # a torn line
    assert answer(llm, lines, out).done == 5
    assert len(read(out)) == 5


def test_the_command_answers_then_says_so(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    source, out = (
        write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b", "temperature": 1.0}),
        tmp_path / "a.jsonl",
    )
    command = (checkpoint, "--prompts", source, "--out", out, "--mode", "full", "--max-new-tokens", 2,
               "--set", "top_k=5", "seed=1", "--quant", "none")  # fmt: skip
    code, printed, said = run(*command)
    assert (code, printed) == (0, f"{out}\n")
    assert "a.jsonl: 2/2" in said
    before = out.stat().st_mtime_ns
    assert run(*command) == (0, f"{out}\n", "")  # and without loading the model: nothing else is said
    assert out.stat().st_mtime_ns == before
    code, _, said = run(*command, "--dtype", "float64")
    assert code == 2
    assert said.startswith("error: line 1 of ")
    assert said.count("\n") == 1


def test_the_command_says_how_many_failed(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    source, out = write(tmp_path / "p.jsonl", {"prompt": "a"}, "{", {"prompt": ""}), tmp_path / "a.jsonl"
    command = (checkpoint, "--prompts", source, "--out", out, "--mode", "full", "--max-new-tokens", 2)
    for _ in range(2):  # a finished file fails again
        code, printed, said = run(*command)
        assert (code, printed) == (1, f"{out}\n")
        assert said.splitlines()[-1] == f"error: 2 of 3 prompts failed; their lines in {out} say why"
    assert ["error" in line for line in read(out)] == [False, True, True]


@pytest.mark.filterwarnings("default")
def test_a_setting_that_acts_with_those_of_a_line_is_not_idle(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", {"prompt": "a", "temperature": 0.5}, {"prompt": "b", "temperature": 0.7})
    common = (checkpoint, "--prompts", source, "--set", "top_k=5", "mode=full", "max_new_tokens=1", "seed=0")
    assert "warning" not in run(*common, "--out", tmp_path / "a.jsonl")[2]
    write(source, {"prompt": "a"}, {"prompt": "b"})
    assert run(*common, "--out", tmp_path / "b.jsonl")[2].count("warning: top_k has no effect") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompts", "FILE"], "--prompts FILE and --out FILE go together"),
        (["--prompt", "x", "--out", "OUT"], "--prompts FILE and --out FILE go together"),
        (["--prompt", "x", "--prompts", "FILE", "--out", "OUT"], "not allowed with argument"),
        (["--prompts", "FILE", "--out", "OUT", "--json"], "JSON lines already; leave --json out"),
        (["--prompts", "FILE", "--out", "FILE"], "is the file of the prompts; choose another file"),
        (["--prompts", "OUT", "--out", "OUT"], "cannot be read"),
        (["--prompts", "FILE", "--out", "OUT", "--set", "tempreature=1"], "did you mean 'temperature'"),
        (["--prompts", "FILE", "--out", "OUT", "--set", "engine.max_row=1"], "the engine has no setting 'max_row'"),
        (["--prompts", "FILE", "--out", "TMP"], "is not a file"),
        (["--prompts", "FILE", "--out", "OUT", "--adapter", "OUT"], "adapter"),
    ],
)
def test_mistakes_leave_no_file(run: Run, checkpoint: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    places = {"FILE": write(tmp_path / "p.jsonl", *PROMPTS), "OUT": tmp_path / "a.jsonl", "TMP": tmp_path}
    before = places["FILE"].read_bytes()
    code, printed, said = run(checkpoint, *(places.get(word, word) for word in arguments))
    assert (code, printed, said.count("\n")) == (2, "", 1)
    assert says in said
    assert not places["OUT"].exists()
    assert places["FILE"].read_bytes() == before


@pytest.mark.slow
def test_a_killed_command_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    """Interrupted, killed and terminated in turn, it ends with the file that it writes in one go."""
    source, out = write(tmp_path / "p.jsonl", *({"prompt": f"{i}"} for i in range(500))), tmp_path / "a.jsonl"
    command = [sys.executable, "-m", "exitlm", "generate", str(checkpoint), "--mode", "full", "--max-new-tokens", "8",
               "--set", "ignore_eos=true", "--prompts", str(source), "--out"]  # fmt: skip
    for lines, number in ((40, signal.SIGINT), (90, signal.SIGKILL), (140, signal.SIGTERM)):
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < lines):
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate()[1]
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        assert ("the same command continues" in said) == (number == signal.SIGINT)
    for place in (out, tmp_path / "alone.jsonl"):
        subprocess.run([*command, str(place)], check=True, capture_output=True)
    assert len(read(out)) == 500
    assert out.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
