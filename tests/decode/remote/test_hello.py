"""Who may be a stage: every other one is refused in one sentence that says which it was, and the next one is taken."""

import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exitlm.decode.remote import hello
from exitlm.decode.remote.frames import HEADER, MAGIC, Frame, Kind
from exitlm.decode.remote.hello import VERSIONS, Refused, greet
from exitlm.decode.remote.launch import admitted, client_context, listen, server_context
from exitlm.decode.remote.link import Closed, Link
from tests.decode.remote.sockets import PATIENCE, make_certificate, public_part

KEY = b"a key that all know"
ME = f"{socket.gethostname()}:{os.getpid()}"
Stage = Callable[[Link], object]


class Head:
    """A head that listens, and what it says of those who come."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.listener = listen("127.0.0.1", 0)
        self.context = None if certificate is None else server_context(str(certificate))
        self.trusted = None if certificate is None else public_part(certificate)
        self.said: list[str] = []  # to stages

    def come(self, stage: Stage, encrypted: bool = True) -> threading.Thread:
        """A stage that connects at once and does as it likes."""
        connection = socket.create_connection(self.listener.getsockname()[:2], PATIENCE)
        trusted = None if not encrypted else self.trusted

        def run() -> None:
            try:
                end = connection if trusted is None else client_context(str(trusted)).wrap_socket(connection)
                stage(Link(end, "the head"))
            except (Refused, Closed, OSError) as error:
                self.said.append(str(error))
            connection.close()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def admit(self) -> Link | None:
        """The next one that is taken."""
        return admitted(self.listener, KEY, time.monotonic() + PATIENCE, self.context)


@pytest.fixture
def head() -> Iterator[Head]:
    found = Head()
    with found.listener:
        yield found


def right(link: Link) -> None:
    """A stage that knows the key, and says so."""
    greet(link, KEY)
    link.say(right=True)
    link.close()


def refused(head: Head, stage: Stage, encrypted: bool = True) -> list[str]:
    """What is said of a stage that comes before a right one, which has to be taken."""
    threads = [head.come(stage, encrypted), head.come(right)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        link = head.admit()
    assert link is not None
    assert link.peer == ME
    assert link.hear(PATIENCE) == {"right": True}
    link.close()
    for thread in threads:
        thread.join()
    return [str(one.message) for one in caught if issubclass(one.category, UserWarning)]


def other(**versions: object) -> Stage:
    """A stage with other versions."""
    return lambda link: greet(link, KEY, {**VERSIONS, **versions})


KEYS = {"a wrong key": b"another key, which is wrong", "no key": b""}


@pytest.mark.parametrize("what", KEYS)
def test_who_does_not_know_the_key(head: Head, what: str) -> None:
    (found,) = refused(head, lambda link: greet(link, KEYS[what]))
    assert found == f"a stage was refused: stage {ME} does not know the key; give it the --key-file of this head"
    assert head.said == ["the head does not know the key of this stage; give both the same --key-file"]


@pytest.mark.parametrize(("name", "value"), [
    ("exitlm", "0.0.1"), ("kernels", "1.1"), ("protocol", 99), ("protocol", None), ("byteorder", "middle"),
])  # fmt: skip
def test_who_is_of_another_version(head: Head, name: str, value: object) -> None:
    (found,) = refused(head, other(**{name: value}))
    sentence = f"stage {ME} has {name} {value!r}, but this head has {VERSIONS[name]}; install the same exitlm"
    assert found == f"a stage was refused: {sentence}"
    assert head.said == [sentence]  # the stage's own user reads it, too


def bytes_of(data: bytes) -> Stage:
    """A stage that sends some bytes, and reads what comes."""

    def stage(link: Link) -> None:
        link._socket.setblocking(True)
        link._socket.sendall(data)
        while link._socket.recv(4096):
            pass

    return stage


def words(*said: dict[str, Any]) -> Stage:
    """A stage that says some things, each after an answer to the one before."""

    def stage(link: Link) -> None:
        for one in said:
            link.say(**one)
            link.hear(PATIENCE)

    return stage


GREETING: dict[str, Any] = {"hello": VERSIONS, "number": "1", "place": "here"}
NONSENSE: dict[str, tuple[Stage, str]] = {
    "another protocol": (bytes_of(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" + b" " * 64), "what came is no frame"),
    "too much": (bytes_of(HEADER.pack(MAGIC, Kind.TEXT, 0, 0, 0, 4 << 30)), "a frame of 4294967296 bytes came"),
    "an unknown kind": (bytes_of(HEADER.pack(MAGIC, 99, 0, 0, 0, 0)), "a frame of kind 99"),
    "a tensor": (
        lambda link: (link.send(Frame(Kind.TENSOR, [0, 0, 0], [], [torch.ones(3)])), link.hear(PATIENCE)),
        "something else came",
    ),
    "a list": (
        lambda link: (
            link.send(Frame(Kind.TEXT, [], [], [torch.tensor(list(b"[]"), dtype=torch.uint8)])), link.hear(PATIENCE)
        ),
        "no JSON object",
    ),
    "nothing at all": (lambda link: link.close(), "ended"),
    "no versions": (words({}), "has protocol None"),
    "versions that are none": (words({**GREETING, "hello": "me"}), "stage here has protocol None"),
    "a proof of other letters": (words(GREETING, {"proof": "pröof"}), "stage here does not know the key"),
    "a proof that is no text": (words(GREETING, {"proof": [{}]}), "stage here does not know the key"),
    "letters that are none": (
        words({**GREETING, "number": "\ud800", "place": "x\ud800\n\x1b[31m" + "y" * 99}, {"proof": "\udfff"}),
        "stage x [31m" + "y" * 54 + " does not know the key",
    ),
    "half a greeting": (
        lambda link: (link.say(**GREETING), link.hear(PATIENCE), link.close()), "127.0.0.1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", NONSENSE)
def test_who_talks_nonsense(head: Head, what: str) -> None:
    stage, sentence = NONSENSE[what]
    (found,) = refused(head, stage)
    assert found.startswith("a stage")
    assert sentence in found
    assert "127.0.0.1:" in found or "stage here" in found or "stage x" in found  # which one
    assert found.isprintable()


def test_who_says_nothing(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    threads = [head.come(lambda link: done.wait(PATIENCE))]
    with monkeypatch.context() as patch:
        patch.setattr(hello, "PATIENCE", 0.2)
        with pytest.warns(UserWarning, match=r"a stage was refused: 127.0.0.1:\d+ did not answer in time"):
            assert admitted(head.listener, KEY, time.monotonic() + 0.1) is None
    threads.append(head.come(right))
    link = head.admit()
    assert link is not None
    assert link.peer == ME
    done.set()
    for thread in threads:
        thread.join()
    link.close()


def test_nobody_comes(head: Head) -> None:
    assert admitted(head.listener, KEY, time.monotonic() + 0.01) is None


# ---- the stage's side


def said_by_stage(head: Head, *answers: dict[str, Any]) -> str:
    """What a stage with the right key says to a head that answers so."""
    thread = head.come(lambda link: greet(link, KEY))
    connection, _ = head.listener.accept()
    link = Link(connection, "a stage")
    for answer in answers:
        link.hear(PATIENCE)
        link.say(**answer)
    thread.join()
    link.close()
    (found,) = head.said
    return found


@pytest.mark.parametrize("proof", ["0" * 64, "", "ü", "\ud800", None, 7])
def test_a_head_that_does_not_know_the_key(head: Head, proof: Any) -> None:
    found = said_by_stage(head, {"number": "\ud800", "proof": proof})
    assert found == "the head does not know the key of this stage; give both the same --key-file"


def test_a_head_that_sends_back_what_it_heard(head: Head) -> None:
    """The proofs of head and stage differ, so that nobody can use the one as the other."""
    other = head.come(lambda link: greet(link, KEY))
    connection, _ = head.listener.accept()
    link = Link(connection, "a stage")
    number = link.hear(PATIENCE)["number"]
    link.say(number=number, proof=hello._proof(KEY, "stage", number, number))
    other.join()
    link.close()
    assert head.said == ["the head does not know the key of this stage; give both the same --key-file"]


def test_what_a_head_says_is_one_line(head: Head) -> None:
    assert said_by_stage(head, {"refused": "no\x1b[2J\nnot you" + "!" * 999}) == "no[2J not you" + "!" * 487


# ---- certificates


def test_who_does_not_encrypt_or_trusts_another_certificate(tmp_path: Path) -> None:
    mine, theirs = (make_certificate(tmp_path, name) for name in ("mine", "theirs"))
    head = Head(mine)
    with head.listener:
        (found,) = refused(head, lambda link: greet(link, KEY), encrypted=False)
        assert found.startswith("a stage at 127.0.0.1:")
        head.said.clear()
        trusted, head.trusted = head.trusted, public_part(theirs)
        wrong = head.come(lambda link: greet(link, KEY))
        head.trusted = trusted
        thread = head.come(right)
        with pytest.warns(UserWarning, match=r"a stage at 127.0.0.1:\d+ was refused: "):
            link = head.admit()
        wrong.join()
        thread.join()
        assert link is not None
        assert "certificate verify failed" in head.said[0]
        link.close()
