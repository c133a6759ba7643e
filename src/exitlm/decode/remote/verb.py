"""``exitlm stage``: a stage of a pipeline, of this machine or of another one."""

from __future__ import annotations

import argparse
import socket
import ssl
import sys
import time

from exitlm.errors import UserError

_RETRY, _PATIENCE = 1.0, 30.0  # seconds from one try to the next, and that one that tries once has


def add_stage(parser: argparse.ArgumentParser, model_help: str) -> None:
    """Its arguments."""
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help=f"the head's model on this machine: {model_help} (default: as there)")
    add("--join", required=True, metavar="HOST:PORT", help="where the head waits for its stages")
    add("--key-file", metavar="FILE", help="what the head and its stages know (default: EXITLM_STAGE_KEY)")
    add("--certificate", metavar="FILE", help="the head's certificate (PEM); the link is encrypted then")
    add("--once", action="store_true", help="end with the head, instead of waiting for the next one")


def stage(
    model: str | None = None, *, join: str, key_file: str | None = None, certificate: str | None = None,
    once: bool = False,
) -> int:  # fmt: skip
    """Run some layers of a model for a head that decodes with a pipeline; the head says which."""
    from exitlm.decode.kernels.ranks import RankLost
    from exitlm.decode.remote.frames import BadFrame
    from exitlm.decode.remote.hello import greet
    from exitlm.decode.remote.keys import key_of
    from exitlm.decode.remote.launch import address_of, client_context, is_loopback
    from exitlm.decode.remote.link import Closed, Link
    from exitlm.decode.remote.stage import OnDisk, serve_link

    host, port = address_of(join)
    key = key_of(key_file)
    if not is_loopback(host) and not (key and certificate):
        raise UserError(
            f"{host} is another machine, which needs the head's key (--key-file) and its certificate (--certificate)"
        )
    context = None if certificate is None else client_context(certificate)
    begun, told = time.monotonic(), False
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=10.0)
            if context is not None:
                connection = context.wrap_socket(connection, server_hostname=host)
        except ssl.SSLCertVerificationError as error:
            raise UserError(
                f"the head at {join} has another certificate than {certificate} ({error.verify_message}); give this "
                "stage the certificate of its head"
            ) from error
        except OSError as error:
            if once and time.monotonic() - begun > _PATIENCE:
                raise UserError(f"no head answers at {join}: {error}") from error
            if not told:
                print(f"no head answers at {join} yet ({error}); trying again", file=sys.stderr, flush=True)
            told = True
            time.sleep(_RETRY)
            continue
        link, told = Link(connection, f"the head at {join}"), False
        try:
            joined = False
            greet(link, (key or "").encode())
            joined = True
            if not once:
                print(f"joined the head at {join}", file=sys.stderr, flush=True)
            serve_link(link, OnDisk(model))
        except (Closed, RankLost, BadFrame) as closed:
            if once and joined:
                return 0
            if once:
                raise UserError(f"the head at {join} did not take this stage ({closed})") from closed
            print(f"{closed}; waiting for the next one", file=sys.stderr, flush=True)
            time.sleep(_RETRY)
        finally:
            link.close()
