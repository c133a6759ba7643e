"""What every test needs: one thread per process (or EXITLM_TEST_THREADS), no network, and no chatter of libraries. And
what the tests of the facade and of the command line share: a cache of their own, a tiny model on disk, a command."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# A store of torch looks up the names of the addresses that connect to it, and answers nobody while it waits for them.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
torch.set_num_threads(int(os.environ.get("EXITLM_TEST_THREADS", "1")))
os.environ.setdefault("EXITLM_THREADS", os.environ.get("EXITLM_TEST_THREADS", "1"))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a shell has put into the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

Run = Callable[..., tuple[int, str, str]]
"""Runs a command line: its exit code, stdout and stderr."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What exitlm keeps between runs stays out of the user's cache, in a module that says ``usefixtures("cache")``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXITLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.checkpoints import write_checkpoint  # transformers takes a while

    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""
    from exitlm import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
