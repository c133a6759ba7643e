"""A link over real sockets, plain and encrypted: frames come whole and in order however the bytes arrive, and the end
of the other end is told by its name."""

import random
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from exitlm.decode.remote.frames import HEADER, MAGIC, BadFrame, Frame, Kind, encode
from exitlm.decode.remote.launch import client_context, server_context
from exitlm.decode.remote.link import SAID, Closed, Late, Link
from exitlm.errors import UserError
from tests.decode.remote.sockets import PATIENCE, connected, make_certificate, public_part

MEGABYTES = 5


@pytest.fixture(scope="module", params=["plain", "encrypted"])
def certificate(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    return make_certificate(tmp_path_factory.mktemp("tls")) if request.param == "encrypted" else None


@pytest.fixture
def ends(certificate: Path | None) -> Iterator[tuple[Link, socket.socket]]:
    """A link, and the socket at its other end, which writes and reads bytes."""
    with connected(certificate) as (near, far):
        yield Link(near, "the stage"), far


def frame(number: int, values: int = 7) -> Frame:
    """A frame that says which one it is."""
    return Frame(Kind.DONE, [number], [number / 2], [torch.arange(values) + number])


def same(found: Frame, expected: Frame) -> bool:
    """Whether all of two frames is alike."""
    pairs = zip(found.tensors, expected.tensors, strict=True)
    heads = (found.kind, list(found.ints), list(found.floats)) == (expected.kind, expected.ints, expected.floats)
    return heads and all(torch.equal(*pair) for pair in pairs)


def bytes_of(*frames: Frame) -> bytes:
    """What goes over the wire."""
    return b"".join(bytes(piece) for one in frames for piece in encode(one))


def test_a_frame_in_pieces_is_there_with_its_last_byte(ends: tuple[Link, socket.socket]) -> None:
    link, far = ends
    rng = random.Random(0)
    for number in range(20):
        data = bytes_of(frame(number))
        cuts = sorted(rng.sample(range(1, len(data)), 5 if number else len(data) - 1))  # the first: byte by byte
        for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
            assert link.poll() is None
            far.sendall(data[start:stop])
        assert same(link.receive(PATIENCE), frame(number))
        assert link.poll() is None


def test_many_frames_at_once_come_one_after_the_other(ends: tuple[Link, socket.socket]) -> None:
    link, far = ends
    link.trust()
    sizes = [random.Random(i).choice([0, 1, 7, 5000, 20_000]) for i in range(200)]
    thread = threading.Thread(target=far.sendall, args=(bytes_of(*(frame(i, n) for i, n in enumerate(sizes))),))
    thread.start()
    for number, size in enumerate(sizes):
        assert same(link.receive(PATIENCE), frame(number, size))
    thread.join()
    assert link.poll() is None


def test_large_frames_arrive_whole(certificate: Path | None) -> None:
    with connected(certificate) as sockets:
        near, far = (Link(end, name) for end, name in zip(sockets, ("near", "far"), strict=True))
        for sender, receiver in ((near, far), (far, near)) * 2:
            receiver.trust()
            large = frame(3, MEGABYTES << 17)
            thread = threading.Thread(target=sender.send, args=(large,))
            thread.start()
            assert same(receiver.receive(PATIENCE), large)
            thread.join()


def test_large_frames_go_both_ways_at_once() -> None:
    """Each end sends in one thread and reads in another, so that neither waits for the other."""
    with connected() as sockets:
        links, large = [Link(end, "other") for end in sockets], [frame(i, MEGABYTES << 17) for i in range(3)]

        def send(link: Link) -> None:
            for each in large:
                link.send(each, PATIENCE)

        threads = [threading.Thread(target=send, args=(link,)) for link in links]
        for link in links:
            link.trust()
        for thread in threads:
            thread.start()
        for each in large:
            for link in links:
                assert same(link.receive(PATIENCE), each)
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("sent", [0, 5, HEADER.size, HEADER.size + 9])
def test_the_end_of_the_other_end_has_its_name(ends: tuple[Link, socket.socket], sent: int) -> None:
    """Between two frames and within one."""
    link, far = ends
    far.sendall(bytes_of(frame(1)) + bytes_of(frame(2))[:sent])
    far.close()
    assert same(link.receive(PATIENCE), frame(1))
    with pytest.raises(Closed, match="the stage"):
        link.receive(PATIENCE)
    large = frame(3, 8 << 20)  # more than a network holds
    with pytest.raises(Closed, match="the stage"):
        link.send(large)


def test_a_reset_has_its_name(ends: tuple[Link, socket.socket]) -> None:
    link, far = ends
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.socket(fileno=far.detach()).close()
    with pytest.raises(Closed, match=r"the link to the stage broke \(.*reset|the stage ended"):  # the latter by TLS
        link.receive(PATIENCE)


def test_a_link_that_was_closed_here_says_so(ends: tuple[Link, socket.socket]) -> None:
    link, _ = ends
    link.close()
    for use in (link.poll, lambda: link.send(frame(1)), lambda: link.receive(PATIENCE)):
        with pytest.raises(Closed, match="the link to the stage broke"):
            use()


def test_a_slow_end_is_late(ends: tuple[Link, socket.socket]) -> None:
    """It neither writes nor reads; what it has written in part is not lost."""
    link, far = ends
    link.trust()
    data = bytes_of(frame(1))
    far.sendall(data[:30])
    with pytest.raises(Late, match="the stage did not answer in time"):
        link.receive(0.05)
    far.sendall(data[30:])
    assert same(link.receive(PATIENCE), frame(1))
    with pytest.raises(Late, match="the stage did not answer in time"):
        link.send(frame(2, 8 << 20), 0.2)


def test_what_an_end_may_say_before_it_is_trusted(ends: tuple[Link, socket.socket]) -> None:
    link, far = ends
    far.sendall(HEADER.pack(MAGIC, Kind.TEXT, 0, 0, 0, SAID + 1))
    with pytest.raises(BadFrame, match=f"a frame of {SAID + 1} bytes came"):
        link.receive(PATIENCE)


def test_words_come_as_they_went(ends: tuple[Link, socket.socket]) -> None:
    link, far = ends
    Link(far, "the head").say(hello={"a": [1, None, "ü\ud800"]}, n=1.5)
    assert link.hear(PATIENCE) == {"hello": {"a": [1, None, "ü\ud800"]}, "n": 1.5}
    for nonsense in (b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b""):
        text = torch.tensor(list(nonsense), dtype=torch.uint8)
        Link(far, "the head").send(Frame(Kind.TEXT, tensors=[text]))
        with pytest.raises(BadFrame, match="no JSON object"):
            link.hear(PATIENCE)
    Link(far, "the head").send(frame(1))
    with pytest.raises(BadFrame, match="something else"):
        link.hear(PATIENCE)


# ---- certificates


def refused(certificate: Path, trusted: Path) -> tuple[str, str]:
    """What a head with a certificate and a stage that trusts another one say."""
    near, far = socket.socketpair()
    said: list[str] = []

    def head() -> None:
        with pytest.raises(OSError) as caught, near:  # noqa: PT011  # as much as ``admitted`` looks at
            server_context(str(certificate)).wrap_socket(near, server_side=True).recv(1)
        said.append(str(caught.value))

    near.settimeout(PATIENCE)
    far.settimeout(PATIENCE)
    thread = threading.Thread(target=head)
    thread.start()
    with pytest.raises(ssl.SSLCertVerificationError) as caught, far:
        client_context(str(trusted)).wrap_socket(far)
    thread.join()
    return str(caught.value), said[0]


def test_a_head_with_another_certificate_is_refused(tmp_path: Path) -> None:
    mine, other = (make_certificate(tmp_path, name) for name in ("mine", "other"))
    stage, head = refused(mine, public_part(other))
    assert "self-signed certificate" in stage or "self signed certificate" in stage
    assert head
    with connected(mine):
        pass


def test_files_that_are_no_certificates(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing")
    for file in (nothing, tmp_path / "absent.pem"):
        with pytest.raises(UserError, match=r"can't be used \(.*; give a PEM file with a certificate and its private"):
            server_context(str(file))
        with pytest.raises(UserError, match=r"can't be used \(.*; give the head's certificate as a PEM file"):
            client_context(str(file))
