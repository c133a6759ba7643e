"""Texts that come with the package, to train on without a file of one's own; README.md says what they are.

Finds them, and reads nothing: what is trained on is read by :mod:`exitlm.train.data`.
"""

from importlib import resources
from pathlib import Path

from exitlm.errors import UserError


def packaged(name: str) -> Path:
    """The file of the packaged text ``name``, such as moby-dick.

    Raises:
        UserError: there is no such text; the sentence names those that there are.
    """
    home = Path(str(resources.files("exitlm.train") / "texts"))
    known = {file.stem: file for file in sorted(home.glob("*.txt"))}
    if name not in known:
        raise UserError(f"there is no packaged text '{name}'; the packaged texts are: {', '.join(known)}")
    return known[name]
