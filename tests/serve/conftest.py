"""A served model and the clients that talk to it: the real application behind a real socket."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import exitlm
from exitlm.serve.config import ServeConfig, merged
from exitlm.serve.server import Server, listening
from tests.checkpoints import write_checkpoint
from tests.model.families import native_sizes

KEY = "sk-test"


@dataclass
class Served:
    """A server that runs in a thread of this process."""

    server: Server
    model: exitlm.LLM
    url: str

    def client(self, **options: Any) -> openai.OpenAI:
        """The official client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, **{"max_retries": 0, "timeout": 60, **options})

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        """The official client for asyncio."""
        given = {"max_retries": 0, "timeout": 60, **options}
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, **given)

    def http(self) -> httpx.Client:
        """Plain HTTP."""
        return httpx.Client(base_url=self.url, timeout=60)

    @property
    def used_blocks(self) -> int:
        """Blocks for keys and values that texts hold."""
        return sum(allocator.used for allocator in self.model.engine.memory.pool.allocators)


@contextlib.contextmanager
def serving(model: exitlm.LLM, /, **sections: dict[str, Any]) -> Iterator[Served]:
    """Serve a model that is loaded, on a free port, until the end of the block."""
    config = ServeConfig.of(merged({"model": {"source": "tiny"}, "http": {"port": 0}}, sections))
    with listening(config) as listener:
        server = Server(config, lambda found: model)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while server.state.service is None and thread.is_alive():
                thread.join(0.01)
            if server.failure is not None:
                raise server.failure
            yield Served(server, model, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer and a chat template, and a context long enough to be interrupted in."""
    return write_checkpoint(tmp_path_factory.mktemp("served"), max_position_embeddings=2048, **native_sizes("llama"))


@pytest.fixture(scope="session")
def make_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., exitlm.LLM]:
    """Loads it with two exits."""
    patch = pytest.MonkeyPatch()
    patch.setenv("EXITLM_CACHE", str(tmp_path_factory.mktemp("cache")))

    def make(dtype: str = "float64", **options: Any) -> exitlm.LLM:
        model = exitlm.load(tiny, dtype=dtype, **options)
        model.add_exits([1, 3], kind="norm")
        return model

    return make


@pytest.fixture(scope="session")
def served(make_model: Callable[..., exitlm.LLM]) -> Iterator[Served]:
    """One server for all tests that leave it as it is."""
    with serving(make_model()) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as client:
        yield client


def run(coroutine: Any) -> Any:
    """Run a coroutine to its end."""
    return asyncio.run(coroutine)
