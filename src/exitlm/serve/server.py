"""``exitlm serve``: listen, load, answer, and end without cutting an answer off.

```
listen -> load the model (503 meanwhile) -> answer -> SIGTERM or Ctrl-C -> drain (503 for new ones) -> end
```
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from types import FrameType
from typing import Any, TextIO

import uvicorn

from exitlm.decode.generation import GenerationConfig
from exitlm.errors import UserError
from exitlm.serve.app import application
from exitlm.serve.config import ServeConfig
from exitlm.serve.connection import connections
from exitlm.serve.service import Served, Service, State

Load = Callable[[ServeConfig], Served]
"""Loads the model that a server offers."""

BACKLOG = 2048
KEEP_ALIVE = 75  # seconds that an idle connection stays open
LAST_WRITES = 3.0  # seconds for what is left to be written when no text is decoded any more

log = logging.getLogger("exitlm.serve")


def serve(config: ServeConfig, load: Load) -> int:
    """Serve until a signal ends it; the exit code.

    Raises:
        UserError: the address can't be listened on, nobody would be asked for a key, or the model can't be loaded.
    """
    config.http.check_reach()
    log_to_stderr()
    with warnings.catch_warnings(), listening(config) as listener:
        warnings.showwarning = _log_warning
        server = Server(config, load)
        host, port = listener.getsockname()[:2]
        print(f"serving {config.model.name} on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        server.run(sockets=[listener])
    if server.failure is not None:
        raise server.failure
    if server.loading:  # by a thread that can't be stopped; what it writes is put in place whole or not at all
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


@contextlib.contextmanager
def listening(config: ServeConfig) -> Iterator[socket.socket]:
    """A socket at the server's address.

    Raises:
        UserError: the address can't be had.
    """
    host, port = config.http.host, config.http.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except OSError as error:
            raise UserError(
                f"can't listen on {host} port {port}: {error.strerror or error}; choose another --port"
            ) from error
        listener.setblocking(False)
        yield listener
    finally:
        listener.close()


class Server(uvicorn.Server):
    """uvicorn, with the model's loading and a drain of its own. ``failure`` is why the model could not be loaded,
    ``loading`` whether it still is."""

    def __init__(self, config: ServeConfig, load: Load) -> None:
        self.state = State(config)
        self.failure: BaseException | None = None
        self.loading = False
        self._load, self._settings = load, config
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        super().__init__(
            uvicorn.Config(
                application(self.state),
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="off",
                timeout_keep_alive=KEEP_ALIVE,
                http=connections(config.limits.read_timeout, config.limits.write_timeout),
                timeout_graceful_shutdown=max(1, round(LAST_WRITES)),
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and load the model meanwhile."""
        await super().startup(sockets)
        self._spawn(self._ready())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close all connections, and stop the engine."""
        await super().shutdown(sockets)
        if self.state.service is not None:
            await self.state.service.engine.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the drain, the second one ends the server at once."""
        if self.state.drains:
            self.should_exit = self.force_exit = True
            return
        self.state.drains = True
        log.info(json.dumps({"event": "drain", "signal": signal.Signals(sig).name}))

    async def on_tick(self, counter: int) -> bool:
        """Look whether the drain has to begin; a signal can't start a task by itself."""
        if self.state.drains and not self._draining:
            self._draining = True
            self._spawn(self._drain())
        return await super().on_tick(counter)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ready(self) -> None:
        begun = time.monotonic()
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[Service] = loop.create_future()
        self.loading = True
        threading.Thread(target=self._load_service, args=(loop, loaded), name="load", daemon=True).start()
        try:
            service = await loaded
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.failure, self.should_exit = error, True
            return
        service.engine.start()
        self.state.service = service
        log.info(
            json.dumps(
                {
                    "event": "ready",
                    "models": list(service.models.by_name),
                    "seconds": round(time.monotonic() - begun, 2),
                }
            )
        )

    def _load_service(self, loop: asyncio.AbstractEventLoop, loaded: asyncio.Future[Service]) -> None:
        """In a thread of its own, which the server's end does not wait for."""
        found: Service | None = None
        error: BaseException | None = None
        try:
            found = made(self._settings, self._load(self._settings), self.state)
        except BaseException as caught:
            error = caught

        def tell() -> None:
            self.loading = False
            if loaded.done():
                return
            if found is not None:
                loaded.set_result(found)
            elif error is not None:
                loaded.set_exception(error)

        with contextlib.suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(tell)

    async def _drain(self) -> None:
        """Wait for the answers that are being written, as long as they may take."""
        until = time.monotonic() + self._settings.limits.drain
        service = self.state.service
        while service is not None and service.engine.live and time.monotonic() < until:
            await asyncio.sleep(0.05)
        if service is not None:
            if service.engine.live:
                log.warning(json.dumps({"event": "cut off", "texts": service.engine.live}))
            await service.engine.close()
        await asyncio.sleep(0)
        self.should_exit = True


def made(config: ServeConfig, model: Served, state: State) -> Service:
    """The service of a model that was loaded."""
    adapters = [name for name, exits in model.engine.intake.adapters.items() if exits.layers]
    service = Service(config, model, adapters, state.metrics)
    state.metrics.engine = service.engine.engine
    warm_up(service)
    return service


def warm_up(service: Service) -> None:
    """Decode a little, so that the first client does not wait for what is measured or built at the first use."""
    engine = service.engine.engine
    engine.generate([0], GenerationConfig(max_new_tokens=2, ignore_eos=True))


@contextlib.asynccontextmanager
async def running(config: ServeConfig, model: Served) -> AsyncIterator[Any]:
    """The application around a model that is loaded already, without a socket: for programs that mount it."""
    state = State(config)
    service = await asyncio.to_thread(made, config, model, state)
    async with service.engine:
        state.service = service
        yield application(state)


def log_to_stderr() -> None:
    """The log, one JSON object a line. Messages that are no objects, as libraries write, become one."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    for name, level in (("exitlm", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """A warning as a line of the log, without the place in the source that raised it."""
    log.warning(json.dumps({"event": "warning", "message": str(message)}))


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        message = record.getMessage()
        found: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
        }
        try:
            told = json.loads(message)
            found |= told if isinstance(told, dict) else {"message": message}
        except ValueError:
            found["message"] = message
        if record.exc_info is not None:
            found["traceback"] = self.formatException(record.exc_info)
        return json.dumps(found)
