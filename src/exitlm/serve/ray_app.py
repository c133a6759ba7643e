"""Replicas of the server on Ray Serve (the extra ``ray``).

```
client -> Ray's proxy -> Front: guard, session -> Replica: the application of ``app.py`` and its engine
                         |                     -> Replica
                         └ the request router: whose prefix, whose turn
```
``serve run exitlm.serve.ray_app:build model.source=smollm2 replicas.number=2`` starts it on a cluster, and so does
``exitlm serve smollm2 --replicas 2`` on a cluster of its own. What is decided here is which processes there are; who
gets a request, and what happens to it when a process dies, is in :mod:`exitlm.serve.replicas`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import os
import random
import re
import signal
import threading
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, WorkerCrashedError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.request_router import RequestRouter

from exitlm.assignments import assignments
from exitlm.errors import UserError
from exitlm.serve.app import guarded
from exitlm.serve.config import KEY_VARIABLE, SECTIONS, HttpConfig, ServeConfig, merged, read_tree
from exitlm.serve.guard import Application, Message
from exitlm.serve.replicas.asked import Asked, answer
from exitlm.serve.replicas.forward import POLL_TIMEOUT, Forward, mounted
from exitlm.serve.replicas.session import ranked
from exitlm.serve.server import listening, log_to_stderr, running
from exitlm.weights.source import resolve

APP = "exitlm"  # the application's name in Ray Serve
LOADER = "exitlm.llm:served"  # by its path, since the facade lies above this package, and each replica finds it itself
LOST = (RayActorError, WorkerCrashedError, ReplicaUnavailableError, DeploymentUnavailableError)
BUILD_TRIES = 3  # times that Ray tries to start a replica before it gives up
HEALTH_PERIOD = 5.0  # seconds between checks of a replica's /health
FULL = "exitlm.full"  # the type of the only message of a replica that has no room for a request
FULL_PAUSE = 0.05  # seconds until it is offered again
DRAIN_PERIOD = 0.5  # seconds between looks whether a replica that ends has written its last answer
QUIET = {"log_level": "WARNING", "enable_access_log": False}  # of Ray Serve; the server has a log of its own
SPARE = 16  # places of a process beyond its requests: for figures, checks and refusals, also when it is full


class Replica:
    """One copy of the server's application, with the model loaded."""

    def __init__(self, config: ServeConfig, loader: str) -> None:
        """``loader``: MODULE:FUNCTION, which loads the model by the settings."""
        self._config, self._loader = config, loader
        self._name = serve.get_replica_context().replica_id.unique_id
        self._app: Application | None = None
        self._held = contextlib.AsyncExitStack()
        self._starts, self._busy = asyncio.Lock(), 0
        log_to_stderr()
        module, _, name = loader.partition(":")
        self._model = getattr(importlib.import_module(module), name)(config)

    async def answer(self, asked: Asked) -> AsyncGenerator[list[Message], None]:
        """Answer a request: the messages of ASGI, as they come. The answer names the replica in a header."""
        if self._busy >= ongoing_of(self._config):  # routers know late what was sent; places for figures stay free
            yield [{"type": FULL}]
            return
        self._busy += 1
        try:
            async with contextlib.aclosing(answer(await self._started(), asked)) as batches:
                async for batch in batches:
                    for message in batch:
                        if message["type"] == "http.response.start":
                            message["headers"] = [*message["headers"], (b"exitlm-replica", self._name.encode())]
                    yield batch
        finally:
            self._busy -= 1

    async def figures(self) -> tuple[str, str]:
        """The replica's name and its ``/metrics``."""
        return self._name, (await self._whole("/metrics"))[1]

    async def check_health(self) -> None:
        """Ray starts another replica in place of one that fails this."""
        status, said = await self._whole("/health")
        if status != 200:
            raise RuntimeError(f"the application's /health has status {status}: {said}")

    async def __del__(self) -> None:
        """End the engine when the last answers are written, for which Ray waits."""
        await self._held.aclose()

    async def _started(self) -> Application:
        """The application, whose engine runs in the event loop of the requests."""
        async with self._starts:
            if self._app is not None:
                return self._app
            app: Application = await self._held.enter_async_context(running(self._config, self._model))
            self._app = app
            return app

    async def _whole(self, path: str) -> tuple[int, str]:
        status, parts = 0, []
        async with contextlib.aclosing(answer(await self._started(), Asked(path=path))) as batches:
            async for batch in batches:
                for message in batch:
                    status = message.get("status", status)
                    parts.append(message.get("body", b""))
        return status, b"".join(parts).decode()


class Front:
    """Takes requests and hands them to replicas; it has no model."""

    def __init__(self, config: ServeConfig, replicas: Any) -> None:
        """``replicas``: the handle of the deployment."""
        self._config, self._replicas = config, replicas.options(stream=True)
        log_to_stderr()

    def __serve_build_asgi_app__(self) -> Application:
        limits = self._config.limits
        forward = Forward(
            self._ask, self._figures, self._number, deadline=limits.deadline, lost=LOST, full=(BackPressureError,)
        )  # fmt: skip
        # Replicas log all requests, and know for themselves whether they are closed.
        return mounted(guarded(forward, self._config, all_requests=False, closed=lambda: None))

    async def _ask(self, asked: Asked) -> AsyncGenerator[list[Message], None]:
        full = True
        while full:
            full = ended = False
            response = self._replicas.answer.remote(asked)
            try:
                async for batch in response:
                    full = batch[0]["type"] == FULL
                    if not full:
                        yield batch
                ended = True
            except Exception:
                ended = True
                raise
            finally:
                if not ended:  # the client has left
                    response.cancel()
            if full:
                await asyncio.sleep(FULL_PAUSE)

    async def _figures(self) -> Mapping[str, str]:
        found = self._replicas.options(stream=False).broadcast("figures")
        results = await found.results_async(timeout_s=POLL_TIMEOUT, return_exceptions=True)
        return dict(result for result in results if not isinstance(result, Exception))

    async def _number(self) -> int:
        """How many replicas run, as Ray has found by their ``check_health``."""
        status = await asyncio.to_thread(serve.status)
        states = status.applications[serve.get_replica_context().app_name].deployments["Replica"].replica_states
        return int(states.get("RUNNING", 0))


class SessionRouter(RequestRouter):  # type: ignore[misc]  # ray is optional, and without types here
    """Sends a session to the replica that has its prefix, by :func:`~exitlm.serve.replicas.session.ranked`. Each
    request gets the replica that was chosen for it, which Ray's first-in-first-out routers don't promise."""

    def initialize_state(self, **options: Any) -> None:
        """``ongoing``: requests that a replica may have."""
        self._ongoing: int = options["ongoing"]

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Groups of replicas with room, those to be tried first before the others; none where all are full, and Ray
        asks again after a pause."""
        session = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Ray would ask again without the pause
            session = next((given.session for given in pending_request.args if isinstance(given, Asked)), None)
        loads = {
            replica.replica_id: self.replica_queue_len_cache.get(replica.replica_id) for replica in candidate_replicas
        }
        unsure = [r for r in candidate_replicas if (n := loads[r.replica_id]) is None or n >= self._ongoing]
        if len(unsure) == len(candidate_replicas):  # what is known may be old
            loads = {replica.replica_id: load for replica, load in await self._probe_queue_lens(unsure, 0)}
        free = {
            replica.replica_id.unique_id: (replica, load)
            for replica in candidate_replicas
            if (load := loads[replica.replica_id]) is not None and load < self._ongoing
        }
        groups = ranked(session, {name: load for name, (_, load) in free.items()}, random.Random())
        return [[free[name][0] for name in group] for group in groups]


def build(args: dict[str, Any]) -> Any:
    """The application for ``serve run`` and ``serve deploy``.

    ``args`` are sections of settings, as in a file of ``exitlm serve`` (``{"model": {"source": "smollm2"}}``), words
    of the command line (``model.source=smollm2``), and ``config``, such a file, which counts less than both.

    Raises:
        UserError: what can't be read, an unknown setting, a value that is none, or no key is asked for: it is Ray that
            says who can reach its proxies.
    """
    config = config_of(args)
    standard = HttpConfig()
    if (config.http.host, config.http.port) != (standard.host, standard.port):
        raise UserError("Ray says where it listens; leave out http.host and http.port, and give them to serve start")
    if not config.http.api_keys and not config.http.without_key:
        raise UserError(
            f"no API key is set, and Ray may listen beyond this machine; give one with {KEY_VARIABLE} or "
            "http.api_key_file, or allow everybody with http.without_key=true"
        )
    return application_of(config)


def config_of(args: Mapping[str, Any]) -> ServeConfig:
    """The settings that :func:`build` is given; one replica where no number is."""
    file = args.get("config")
    sections = {name: value for name, value in args.items() if name != "config" and isinstance(value, Mapping)}
    words = [f"{name}={value}" for name, value in args.items() if name != "config" and name not in sections]
    plain, parts = assignments(words, SECTIONS)
    if plain:
        word = next(iter(plain))
        raise UserError(f"'{word}' is not a setting of the server; write config=FILE or SECTION.KEY=VALUE")
    given = merged({} if file is None else read_tree(file), sections, parts)
    if os.environ.get(KEY_VARIABLE) and not {"api_keys", "api_key_file"} & set(given.get("http", {})):
        given.setdefault("http", {})["api_keys"] = [os.environ[KEY_VARIABLE]]
    config = ServeConfig.of(given)
    return config if config.replicas.number else _with_replicas(config, number=1)


def application_of(config: ServeConfig, loader: str = LOADER) -> Any:
    """The deployments: one of fronts, one of replicas."""
    r, limits = config.replicas, config.limits
    ongoing = ongoing_of(config)
    most = r.most or r.number
    scale: dict[str, Any] = {"num_replicas": r.number}
    if most > r.number:
        target = r.target or ongoing / 2
        scale = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=r.number, max_replicas=most, target_ongoing_requests=target
            )
        }  # fmt: skip
    drain: dict[str, Any] = {
        "graceful_shutdown_timeout_s": limits.drain, "graceful_shutdown_wait_loop_s": DRAIN_PERIOD,
        "logging_config": QUIET,
    }  # fmt: skip
    replica = serve.deployment(
        Replica, name="Replica", **scale, **drain, max_ongoing_requests=ongoing + SPARE,
        max_queued_requests=max(1, limits.queue), max_constructor_retry_count=BUILD_TRIES,
        health_check_period_s=HEALTH_PERIOD, ray_actor_options={"num_cpus": r.cpus, "num_gpus": _gpus(config)},
        request_router_config=RequestRouterConfig(
            request_router_class=f"{__name__}:{SessionRouter.__name__}", request_router_kwargs={"ongoing": ongoing}
        ),
    )  # fmt: skip
    front = serve.deployment(
        serve.ingress()(Front), name="Front", num_replicas=r.fronts, ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=most * (ongoing + SPARE) + limits.queue + SPARE, **drain,
    )  # fmt: skip
    return front.bind(config, replica.bind(_of_replica(config), loader))


def serve_replicas(config: ServeConfig, loader: str = LOADER) -> int:
    """Serve by replicas until a signal ends it; the exit code. The cluster is that of ``RAY_ADDRESS``, else a new one
    on this machine.

    Raises:
        UserError: the address can't be listened on, the cluster is too small, or the model can't be loaded.
    """
    config.http.check_reach()
    with listening(config) as listener:
        host, port = listener.getsockname()[:2]
    owns = not os.environ.get("RAY_ADDRESS")
    if owns:  # what is missing is told at once, and not by each replica
        for source in (config.model.source, *config.model.adapters):
            resolve(source)
    ray.init(logging_level="warning", **({"include_dashboard": False} if owns else {}))
    ready, ends = threading.Event(), threading.Event()

    def end(*_: Any) -> None:
        """The first signal begins the drain; a second one, or one while the model is loaded, ends it all at once."""
        if ends.is_set() or not ready.is_set():
            raise KeyboardInterrupt
        ends.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    try:
        _check_room(config, ray.cluster_resources())
        serve.start(
            proxy_location="HeadOnly" if owns else "EveryNode", http_options={"host": host, "port": port},
            logging_config=QUIET,
        )  # fmt: skip
        try:
            serve.run(application_of(config, loader), name=APP)
        except RuntimeError as error:
            raise _failure() or error from None
        ready.set()
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"serving {config.model.name} on {where} by {config.replicas.number} replicas", flush=True)
        ends.wait()
        serve.delete(APP)
    finally:
        if owns:
            serve.shutdown()
            ray.shutdown()
    return 0


def ongoing_of(config: ServeConfig) -> int:
    """Requests that a replica has at a time."""
    return config.replicas.ongoing or config.engine.max_sequences


def _failure() -> UserError | None:
    """Why the replicas could not start, where that is a mistake of the user."""
    found = serve.status().applications.get(APP)
    said = "" if found is None else "\n".join([found.message, *(d.message for d in found.deployments.values())])
    sentence = re.search(r"^(?:exitlm\.errors\.)?UserError: (.+)$", said, re.MULTILINE)
    return None if sentence is None else UserError(sentence[1])


def _check_room(config: ServeConfig, resources: Mapping[str, float]) -> None:
    for name, each in (("CPU", config.replicas.cpus), ("GPU", _gpus(config))):
        needed, found = config.replicas.number * each, resources.get(name, 0.0)
        if needed > found:
            raise UserError(
                f"{config.replicas.number} replicas of {each:g} {name} each need {needed:g}, but the cluster has "
                f"{found:g}; lower --replicas or replicas.{name.lower()}s, or add machines"
            )


def _gpus(config: ServeConfig) -> float:
    found = config.replicas.gpus
    return found if found is not None else float(str(config.model.device) != "cpu")


def _of_replica(config: ServeConfig) -> ServeConfig:
    """A replica's own settings: the front answers browsers, and a share of the machine is the replica's."""
    engine = config.engine
    if engine.threads is None:
        processes = engine.pipeline * engine.tensor  # each of which has so many threads
        engine = dataclasses.replace(engine, threads=max(1, int(config.replicas.cpus) // processes))
    return dataclasses.replace(config, engine=engine, http=dataclasses.replace(config.http, cors_origins=()))


def _with_replicas(config: ServeConfig, **changes: Any) -> ServeConfig:
    return dataclasses.replace(config, replicas=dataclasses.replace(config.replicas, **changes))
