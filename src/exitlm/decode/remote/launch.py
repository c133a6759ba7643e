"""Where stages come from: processes of this machine that are started here, or stages that join by an address.

Either way a stage connects to the head, greets it (``hello.py``), and is then one :class:`~link.Link`. A stage that
can't greet is refused by name, and the next one may come.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import ssl
import subprocess
import sys
import time
import warnings
from typing import Protocol

from exitlm.decode.remote.frames import BadFrame
from exitlm.decode.remote.hello import Refused, receive
from exitlm.decode.remote.keys import VARIABLE
from exitlm.decode.remote.link import Closed, Link
from exitlm.errors import UserError

_START, _END = 120.0, 1.0  # seconds that a process of this machine has to come up, and to end


class Launcher(Protocol):
    """Gives a head its stages. ``others``: whether another one may come where one was refused."""

    others: bool

    def start(self, number: int) -> Link:
        """A new stage, greeted, for the place ``number``. Raises :class:`UserError` where none comes."""

    def stop(self, number: int) -> None:
        """The stage at this place is not needed any more, or can't be trusted."""

    def close(self) -> None:
        """None is needed any more."""


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises :class:`UserError` where it can't be had."""
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(64)
    except OSError as error:
        found.close()
        raise UserError(
            f"stages can't join at {host}:{port}: {error.strerror or error}; choose another address"
        ) from error
    return found


def admitted(listener: socket.socket, key: bytes, until: float, context: ssl.SSLContext | None = None) -> Link | None:
    """The next stage that greets as it should; None if none does in time."""
    while (left := until - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connection, address = listener.accept()
        except TimeoutError:
            return None
        link: Link | None = None
        place = f"{address[0]}:{address[1]}"
        try:
            if context is not None:
                connection.settimeout(10.0)
                connection = context.wrap_socket(connection, server_side=True)
            link = Link(connection, place)
            link.peer = receive(link, key).place
            return link
        except (Refused, Closed, BadFrame, OSError) as error:
            where = "" if isinstance(error, Refused | Closed) else f" at {place}"  # these name it already
            warnings.warn(f"a stage{where} was refused: {error}", stacklevel=2)
            (link or connection).close()
    return None


class Children:
    """Stages that are processes of this machine, started with this interpreter."""

    others = False

    def __init__(self) -> None:
        self._key = secrets.token_hex(32)
        self._listener = listen("127.0.0.1", 0)
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, number: int) -> Link:
        """See :class:`Launcher`."""
        self.stop(number)
        host, port = self._listener.getsockname()[:2]
        command = [sys.executable, "-m", "exitlm", "stage", "--join", f"{host}:{port}", "--once"]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env={**os.environ, VARIABLE: self._key}, start_new_session=True
        )
        self.processes[number] = process
        until = time.monotonic() + _START
        while process.poll() is None and time.monotonic() < until:
            if (link := admitted(self._listener, self._key.encode(), time.monotonic() + 0.5)) is not None:
                link.peer = f"stage {number + 1} (process {process.pid})"
                return link
        code = process.poll()
        self.stop(number)
        raise UserError(
            f"stage {number + 1} did not start ({f'exit code {code}' if code is not None else 'it did not answer'}); "
            "what it printed says why"
        )

    def stop(self, number: int) -> None:
        """See :class:`Launcher`."""
        process = self.processes.pop(number, None)
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END)  # its link is closed, which ends it; what it has to say is said first
            process.kill()
            process.wait()

    def close(self) -> None:
        """See :class:`Launcher`."""
        for number in list(self.processes):
            self.stop(number)
        self._listener.close()


class Joining:
    """Stages of any machine that join at an address: ``exitlm stage --join HOST:PORT``."""

    others = True

    def __init__(self, address: str, key: str | None, certificate: str | None, patience: float) -> None:
        """``key``: what stages must know. ``certificate``: a PEM file with the head's certificate and private key; both
        are needed where other machines can reach the address. ``patience``: seconds to wait for a stage that replaces
        one that is gone.

        Raises:
            UserError: the address can't be had, or nothing would protect it.
        """
        host, port = address_of(address)
        if not is_loopback(host) and not (key and certificate):
            raise UserError(
                f"stages that join at {host} are on other machines, which needs a key (--stage-key-file) and a "
                "certificate (--stage-certificate); only 127.0.0.1 goes without"
            )
        self._context = None if certificate is None else server_context(certificate)
        self._key, self._patience, self._gone = (key or "").encode(), patience, set[int]()
        self._listener = listen(host, port)
        self.address = "{}:{}".format(*self._listener.getsockname()[:2])

    def start(self, number: int) -> Link:
        """See :class:`Launcher`."""
        first = number not in self._gone
        if first:
            print(f"waiting for stage {number + 1} at {self.address}", file=sys.stderr, flush=True)
        until = float("inf") if first else time.monotonic() + self._patience
        while time.monotonic() < until:
            turn = min(until, time.monotonic() + 1.0)
            if (link := admitted(self._listener, self._key, turn, self._context)) is not None:
                link.peer = f"stage {number + 1} ({link.peer})"
                return link
        raise UserError(
            f"no other process joined as stage {number + 1} within {self._patience:g} s; start one with: "
            f"exitlm stage --join {self.address}"
        )

    def stop(self, number: int) -> None:
        """See :class:`Launcher`: its link was closed, which it notices."""
        self._gone.add(number)

    def close(self) -> None:
        """See :class:`Launcher`."""
        self._listener.close()


def address_of(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``. Raises :class:`UserError` for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"'{text}' is no address; write HOST:PORT, such as 127.0.0.1:7070")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: 127.example.org may be anywhere
        return host == "localhost"


def server_context(certificate: str) -> ssl.SSLContext:
    """TLS of a head. Raises :class:`UserError` for a file that has no certificate and key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate)
    except (OSError, ssl.SSLError) as error:
        raise UserError(
            f"{certificate} can't be used ({error}); give a PEM file with a certificate and its private key"
        ) from error
    return context


def client_context(authority: str) -> ssl.SSLContext:
    """TLS of a stage that trusts the certificates of a PEM file alone. Raises :class:`UserError` for no such file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the certificate itself is trusted, by whatever name its machine is called
    try:
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"{authority} can't be used ({error}); give the head's certificate as a PEM file") from error
    return context
