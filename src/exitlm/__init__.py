"""Give an LLM early exits, train or tune them, and decode with as many layers as each token needs.

``exitlm.load`` returns an :class:`exitlm.LLM`, the facade over everything else. Importing is cheap: torch is
loaded with the first name that needs it, so that ``exitlm --help`` answers at once.
"""

from typing import TYPE_CHECKING, Any

from exitlm.errors import UserError

if TYPE_CHECKING:
    from exitlm.llm import LLM, load

__all__ = ["LLM", "UserError", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load the facade when one of its names is first asked for (PEP 562)."""
    if name in ("LLM", "load"):
        from exitlm import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'exitlm' has no attribute '{name}'")
