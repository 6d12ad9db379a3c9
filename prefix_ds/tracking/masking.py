"""Passwords and tokens out of every text that leaves the process.

A tracking URI may hold `user:password@`, a command line `--token x`, an error message either. `masked` takes
out what looks like a secret anywhere in a text, and the exact secrets of a URI it is told about, also where a
library shows them decoded. It errs on the side of masking.

Knows nothing of where the text goes.
"""

import re
from urllib.parse import unquote

_STARS = "***"
_QUOTED_OR_WORD = r"""(?:"[^"]*"|'[^']*'|[^\s"',;&]+)"""
_SECRET_NAME = r"(?:token|password|passwd|pwd|secret|credentials?|api[_-]?key|access[_-]?key)"
_PATTERNS = [
    (re.compile(r"([A-Za-z][\w+.-]*://)(?!/)[^\s'\"]*@"), rf"\1{_STARS}@"),
    (re.compile(rf"(?i)(--[\w.-]*{_SECRET_NAME}\s+){_QUOTED_OR_WORD}"), rf"\1{_STARS}"),
    (re.compile(rf"""(?i)(\b[\w.-]*{_SECRET_NAME}["']?\s*[=:]\s*){_QUOTED_OR_WORD}"""), rf"\1{_STARS}"),
    (re.compile(r"(?i)\b((?:bearer|basic)\s+)[\w+/=.~-]{8,}"), rf"\1{_STARS}"),
    (re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|sk-|xox[abprs]-|AKIA|dapi)[\w-]{10,}"), _STARS),
]


def masked(text: str, uri: str | None = None) -> str:
    """The text without secrets; those of `uri` are found in any spelling."""
    for secret in _secrets(uri or ""):
        text = text.replace(secret, _STARS)
    for pattern, stars in _PATTERNS:
        text = pattern.sub(stars, text)
    return text


def _secrets(uri: str) -> list[str]:
    """What stands before the last @ of a URI, its password alone, and both decoded; longest first."""
    _, _, rest = uri.partition("://")
    user_and_password, at, _ = rest.rpartition("@")
    if not at:
        return []
    password = user_and_password.partition(":")[2]
    found = {user_and_password, password, unquote(user_and_password), unquote(password)}
    return sorted((s for s in found if s), key=len, reverse=True)


def is_masked(uri: str) -> bool:
    """Whether a URI had a password before it was written down."""
    return f"://{_STARS}@" in uri


def words_of(error: Exception, uri: str) -> str:
    """What an error says, on one line, without the secrets of `uri`."""
    return " ".join(masked(str(error), uri).split())
