"""Stages that are threads of this process: the whole protocol over a socket pair, without starting interpreters. Not a
test."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Sequence

import torch

from exitlm.decode.kernels.packed import rounds_exits
from exitlm.decode.options import EngineConfig
from exitlm.decode.remote.engine import PipelinedEngine
from exitlm.decode.remote.frames import BadFrame
from exitlm.decode.remote.hello import greet, receive
from exitlm.decode.remote.job import Weights
from exitlm.decode.remote.link import Closed, Link
from exitlm.decode.remote.pipeline import Pipeline
from exitlm.decode.remote.stage import serve_link
from exitlm.errors import UserError
from exitlm.model.decoder import EarlyExitModel
from exitlm.weights.adapter import backbone_tensors
from tests.decode.models import some_costs

KEY = b"a key of tests"
Serve = Callable[[Link, "InMemory"], None]


class InMemory:
    """Weights that are in memory already."""

    def __init__(self, model: EarlyExitModel) -> None:
        self._model = model

    def place(self, source: str) -> str:
        """Nowhere."""
        return source

    def digest(self, source: str) -> str:
        """Of the model; no two of a test are called alike."""
        return f"digest {id(self._model)}"

    def load(self, weights: Weights, layers: range) -> EarlyExitModel:
        """Some layers, without exits."""
        with torch.device("meta"):
            found = EarlyExitModel(self._model.config, layers)
        held = backbone_tensors(self._model)
        mine = {name: held[name] for name in found.state_dict() if name in held}
        found.load_state_dict(mine, strict=False, assign=True)
        found.tie_weights()
        return found.eval()


class InThreads:
    """A launcher whose stages are threads. ``serve`` is what each does once it is greeted."""

    others = False

    def __init__(self, model: EarlyExitModel, serve: Serve = serve_link) -> None:
        self._model, self._serve = model, serve
        self.started: list[int] = []
        self.far: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []

    def start(self, number: int) -> Link:
        """A stage."""
        near, far = socket.socketpair()
        self.started.append(number)
        self.far[number] = far
        self._threads.append(threading.Thread(target=self._run, args=(Link(far, "the head"),), daemon=True))
        self._threads[-1].start()
        link = Link(near, f"stage {number + 1}")
        receive(link, KEY)
        return link

    def _run(self, link: Link) -> None:
        with contextlib.suppress(Closed, UserError, BadFrame):
            greet(link, KEY)
            self._serve(link, InMemory(self._model))
        link.close()

    def kill(self, number: int) -> None:
        """As when a process dies: its end of the link is shut."""
        with contextlib.suppress(OSError):
            self.far[number].shutdown(socket.SHUT_RDWR)

    def stop(self, number: int) -> None:
        """Nothing is left to stop."""

    def close(self) -> None:
        """Wait until all have ended, which they do with their links: one that is within torch when the interpreter ends
        would abort it."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(10.0)


def weights_of_model(model: EarlyExitModel, quant: str, options: EngineConfig) -> Weights:
    """Weights that are in memory."""
    return Weights(
        source="a model of a test", digest=InMemory(model).digest(""), dtype=str(model.dtype).removeprefix("torch."),
        device="cpu", quant=quant, compile="none", rounds=rounds_exits(model, quant), options=options,
    )  # fmt: skip


def pipelined(
    model: EarlyExitModel, counts: Sequence[int], *, quant: str = "none", options: EngineConfig | None = None,
    serve: Serve = serve_link, timeout: float = 60.0, launcher: InThreads | None = None, **given: object,
) -> PipelinedEngine:  # fmt: skip
    """An engine whose stages have so many layers each, and that measures nothing."""
    options = options or EngineConfig()
    pipeline = Pipeline(
        model, weights_of_model(model, quant, options), launcher or InThreads(model, serve), stages=len(counts),
        layers_per_stage=counts, timeout=timeout,
    )  # fmt: skip
    costs = given.pop("costs", some_costs(model))
    return PipelinedEngine(model, pipeline, options=options, costs=costs, **given)
