"""The playground: the page that a server shows at ``/``, and the headers that keep it what it is.

The page is one static file, ``index.html``: markup, style and script, and nothing from anywhere else. It talks to the
server that it came from, by relative addresses, so that it also works below a path of a reverse proxy. This package
answers no request.
"""

import hashlib
import re
from base64 import b64encode
from functools import cache
from importlib.resources import files


@cache
def page() -> bytes:
    """The page, UTF-8."""
    return files(__name__).joinpath("index.html").read_bytes()


@cache
def page_headers() -> dict[str, str]:
    """The headers to send with :func:`page`.

    The browser runs the script and the style of the file, known by their SHA-256, and no other; it connects to the
    page's own origin alone, and refuses to take any text as HTML.
    """
    policy = {
        "default-src": "'none'",
        "script-src": _hashes("script"),
        "style-src": _hashes("style"),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _hashes(element: str) -> str:
    """The sources of a policy that allow the page's own elements of this name."""
    found = re.findall(rf"<{element}>(.*?)</{element}>".encode(), page(), re.DOTALL)
    return " ".join(f"'sha256-{b64encode(hashlib.sha256(text).digest()).decode()}'" for text in found)
