"""Links over real sockets, plain and encrypted, and certificates for them. Not a test."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from exitlm.decode.remote.launch import client_context, listen, server_context

PATIENCE = 60.0  # seconds after which a test is sure that something does not come any more


def make_certificate(directory: Path, name: str = "stages") -> Path:
    """A self-signed certificate and its private key in one PEM file; the test is skipped where nothing can make it."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("the program openssl is not there to make a certificate")
    file, key, certificate = (directory / f"{name}{end}" for end in (".pem", ".key", ".crt"))
    command = [program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
               "-subj", f"/CN={name}", "-days", "2", "-keyout", str(key), "-out", str(certificate)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    file.write_text(key.read_text() + certificate.read_text())
    return file


def public_part(certificate: Path) -> Path:
    """What the stages of a head with this certificate are given: the certificate without its key."""
    return certificate.with_suffix(".crt")


@contextlib.contextmanager
def connected(certificate: Path | None = None) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection over TCP, encrypted where there is a certificate."""
    with listen("127.0.0.1", 0) as listener:
        far = socket.create_connection(listener.getsockname()[:2], PATIENCE)
        near, _ = listener.accept()
    near.settimeout(PATIENCE)
    if certificate is not None:
        plain, ends = near, list[ssl.SSLSocket]()
        context = server_context(str(certificate))
        thread = threading.Thread(target=lambda: ends.append(context.wrap_socket(plain, server_side=True)))
        thread.start()
        far = client_context(str(public_part(certificate))).wrap_socket(far)
        thread.join()
        (near,) = ends
    with near, far:
        yield near, far
