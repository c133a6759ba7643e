"""API keys: whether a request brings one of them, in a time that does not tell how near it came."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable


class Keys:
    """The keys that open a server. Without any, everybody may ask."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._digests)

    def opens(self, authorization: bytes | None) -> bool:
        """Whether the value of a request's Authorization header opens the server. All keys are compared, as digests of
        one length."""
        if not self._digests:
            return True
        scheme, _, given = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            given = b""
        digest = hashlib.sha256(given.strip()).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found
