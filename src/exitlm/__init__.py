"""Give an LLM early exits, train or tune them, and decode with as many layers as each token needs.

``exitlm.load`` returns an :class:`exitlm.LLM`, the facade over everything else. Importing is cheap: torch is
loaded with the first name that needs it, so that ``exitlm --help`` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from exitlm.errors import UserError
from exitlm.version import __version__

if TYPE_CHECKING:
    from exitlm.decode.generation import Generation, GenerationConfig
    from exitlm.llm import LLM, load
    from exitlm.serve.async_engine import AsyncEngine
    from exitlm.train import train, tune

__all__ = ["LLM", "AsyncEngine", "Generation", "GenerationConfig", "UserError", "__version__", "load", "train", "tune"]

_PLACES = {
    "AsyncEngine": "exitlm.serve.async_engine",
    "Generation": "exitlm.decode.generation",
    "GenerationConfig": "exitlm.decode.generation",
    "LLM": "exitlm.llm",
    "load": "exitlm.llm",
    "train": "exitlm.train",
    "tune": "exitlm.train",
}


if not TYPE_CHECKING:  # a type checker would take any name for one of the package's

    def __getattr__(name: str) -> Any:
        """Load the module of a public name when it is first asked for (PEP 562)."""
        if name not in _PLACES:
            raise AttributeError(f"module 'exitlm' has no attribute '{name}'")
        module = import_module(_PLACES[name])
        return module if module.__name__ == f"exitlm.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return list(__all__)
