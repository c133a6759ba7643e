"""The key that a head and its stages share: what proves that they belong together."""

from __future__ import annotations

import os
from pathlib import Path

from exitlm.errors import UserError

VARIABLE = "EXITLM_STAGE_KEY"
_SHORTEST = 16


def key_of(file: str | None) -> str | None:
    """The key in a file, or in the environment; None where there is none.

    Raises:
        UserError: the file can't be read, or the key could be guessed.
    """
    found = os.environ.get(VARIABLE)
    if file is not None:
        try:
            found = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the key of the stages can't be read from {file}: {error}") from error
    if found is not None and len(found) < _SHORTEST:
        raise UserError(
            f"the key of the stages has {len(found)} characters, which can be guessed; make one of {_SHORTEST} or "
            "more: openssl rand -hex 32"
        )
    return found
