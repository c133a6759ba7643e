"""``exitlm chat``: lines through a pipe, keys at a terminal, and one sentence for each mistake."""

from __future__ import annotations

import functools
import io
import os
import select
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import exitlm
from tests.checkpoints import write_checkpoint
from tests.conftest import Run
from tests.serve.mock_server import Answer, Asked, events, said, serving

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=256)
    llm = exitlm.load(place)
    llm.add_exits([1, 3], kind="norm")
    llm.save_exits(place / "adapter")
    return place


@pytest.fixture
def chat(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``exitlm chat`` in this process; the first argument is what comes in."""

    def chat(typed: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
        return run("chat", *arguments)

    return chat


def test_lines_through_a_pipe(chat: Run, model: Path) -> None:
    code, out, err = chat(
        "hello\n/mode full\n\nand then?\n", model, "--adapter", model / "adapter", "--max-new-tokens", 5,
        "--system", "hm", "--set", "ignore_eos=true",
    )  # fmt: skip
    llm = exitlm.load(model)
    messages = [{"role": "system", "content": "hm"}, {"role": "user", "content": "hello"}]
    generate = functools.partial(llm.generate, mode="full", max_new_tokens=5, ignore_eos=True)
    first = generate(messages).text
    second = generate(
        [*messages, {"role": "assistant", "content": first}, {"role": "user", "content": "and then?"}]
    ).text
    assert (code, out) == (0, f"{first}\nmode: full\n{second}\n")
    lines = [line for line in err.splitlines() if line.startswith("5 tokens")]
    assert len(lines) == 2
    assert "lossless" in lines[0]
    assert "4.0 of 4 layers on average, full" in lines[1]


def test_a_mistake_ends_what_comes_through_a_pipe(chat: Run, model: Path) -> None:
    code, out, err = chat("/mode fast\nhello\n", model, "--max-new-tokens", 5)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "error: mode 'fast' is unknown; use one of full, threshold, lossless"


def test_a_server_is_talked_to_without_torch(model: Path) -> None:
    """In a process of its own, which says at the end what it has loaded."""

    def answer(asked: Asked) -> Answer:
        if asked.body is None:
            return Answer(body={"data": [{"id": "tiny"}]}) if asked.path == "/v1/models" else Answer(404, {})
        return Answer(chunks=[events(said(f"you said {asked.body['messages'][-1]['content']}", "stop"))])

    code = """
import sys
from exitlm.cli import main
code = main(["chat", "--url", sys.argv[1], "--temperature", "0.5"])
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
sys.exit(code)
"""
    with serving(answer) as server:
        done = subprocess.run(
            [sys.executable, "-c", code, server.url], input="one\ntwo\n", capture_output=True, text=True, check=False
        )
    assert (done.returncode, done.stdout) == (0, "you said one\nyou said two\n"), done.stderr
    assert server.bodies()[1]["temperature"] == 0.5
    assert [message["content"] for message in server.bodies()[1]["messages"]] == ["one", "you said one", "two"]


MISTAKES: list[tuple[list[str], str]] = [
    ([], "give a MODEL, or the address of a server by --url"),
    (["MODEL", "--url", "http://a"], "not both"),
    (["--url", "http://a", "--adapter", "x"], "--adapter is for a MODEL in this process"),
    (["--url", "http://a", "--dtype", "float64"], "--dtype is for a MODEL"),
    (["--url", "http://a", "--set", "engine.block_size=4"], "--set engine is for a MODEL"),
    (["--url", "a"], "is not the address of a server"),
    (["--url", "http://127.0.0.1:1"], "is the server running?"),
    (["MODEL", "--model", "x"], "--model is for --url"),
    (["MODEL", "--api-key", "x"], "--api-key is for --url"),
    (["MODEL", "--mode", "fast"], "mode 'fast' is unknown"),
    (["MODEL", "--set", "n=2"], "n has no place in a chat"),
    (["MODEL", "--set", "tempreature=1"], "did you mean 'temperature'"),
    (["MODEL", "--sytem", "x"], "did you mean '--system'"),
    (["none"], "none"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_sentence(chat: Run, model: Path, arguments: list[str], message: str) -> None:
    code, out, err = chat("hello\n", *(str(model) if word == "MODEL" else word for word in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of POSIX")
def test_at_a_terminal(model: Path, tmp_path: Path) -> None:
    """Typed, pasted and interrupted, as by a user: what is waited for is what is shown, however long it takes."""
    import pty

    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "XDG_STATE_HOME": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "exitlm", "chat", str(model), "--adapter", str(model / "adapter"),
         "--max-new-tokens", "4", "--set", "ignore_eos=true"],
        stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True,
        preexec_fn=functools.partial(_take_terminal, terminal),
    )  # fmt: skip
    os.close(terminal)
    seen = b""

    def until(words: bytes) -> bytes:
        nonlocal seen
        while words not in seen:
            ready, _, _ = select.select([controller], [], [], 60)
            assert ready, seen
            chunk = os.read(controller, 4096)
            assert chunk, seen
            seen += chunk
        found, _, seen = seen.partition(words)
        return found

    try:
        greeting = until(b"> ")
        assert b"4 layers, exits at 1, 3, mode lossless; /help lists the commands" in greeting
        assert b"layer 1" in greeting
        os.write(controller, b"hello\n")
        assert b"4 tokens" in until(b"> ")
        os.write(controller, b"\x1b[200~two\nlines\x1b[201~\n")
        assert b"4 tokens" in until(b"> ")
        os.write(controller, b"/mo\tfull\n")
        until(b"mode: full")
        until(b"> ")
        while b"Ctrl-C again leaves" not in seen:  # Python misses one that comes just before it waits for keys
            os.write(controller, b"\x03")
            while select.select([controller], [], [], 1)[0]:
                seen += os.read(controller, 4096)
        os.write(controller, b"\x04")
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    history = tmp_path / "exitlm" / "chat_history"
    assert history.read_text().splitlines() == ['"hello"', '"two\\nlines"', '"/mode full"']
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def _take_terminal(terminal: int) -> None:
    """Make a terminal that of this process, so that its keys are its signals."""
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
