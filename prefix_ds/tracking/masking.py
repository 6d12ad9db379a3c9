"""Passwords and tokens out of every text that leaves the process.

A tracking URI may hold `user:password@`, a command line `--token x`, an error message either. `masked` takes
out what looks like a secret anywhere in a text, and the exact secrets of a URI it is told about, also where a
library shows them decoded. It errs on the side of masking.

Knows nothing of where the text goes.
"""

import re
from urllib.parse import unquote

from prefix_ds.config.secrets import SECRET_NAME

STARS = "***"
WITH_PASSWORD = (
    "no password is kept: give the server's whole URI (--uri), or MLFLOW_TRACKING_USERNAME and so on"
)
_LONG = 8  # characters of a password that stands in no text by chance
_QUOTED_OR_WORD = r"""(?:"[^"]*"|'[^']*'|[^\s"',;&]+)"""
_BY_THEMSELVES = [
    (re.compile(r"([A-Za-z][\w+.-]*://)(?!/)[^\s'\"]*@"), rf"\1{STARS}@"),
    (re.compile(r"(?i)\b((?:bearer|basic)\s+)[\w+/=.~-]{8,}"), rf"\1{STARS}"),
    (re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|sk-|xox[abprs]-|AKIA|dapi)[\w-]{10,}"), STARS),
]
_BY_NAME = [
    (re.compile(rf"(?i)(--[\w.-]*{SECRET_NAME}\s+){_QUOTED_OR_WORD}"), rf"\1{STARS}"),
    (re.compile(rf"""(?i)(\b[\w.-]*{SECRET_NAME}["']?\s*[=:]\s*){_QUOTED_OR_WORD}"""), rf"\1{STARS}"),
]


def masked(text: str, uri: str | None = None, *, is_template: bool = False) -> str:
    """The text without secrets; those of `uri` are found in any spelling.

    A template may say `Token: {word}`: there only what looks like a secret by itself is one.
    """
    for secret in _secrets(uri or ""):
        text = secret.sub(STARS, text)
    for pattern, stars in _BY_THEMSELVES + ([] if is_template else _BY_NAME):
        text = pattern.sub(stars, text)
    return text


def _secrets(uri: str) -> list[re.Pattern[str]]:
    """What stands before the last @ of a URI, its password alone, and both decoded; longest first.

    A short password is looked for as a word of its own, and not at all where it is the user's name too; so is
    what stands there alone, if it is long: `mlflow` stands in every text. A path has no password.
    """
    _, _, rest = uri.partition("://")
    user_and_password, at, _ = rest.rpartition("@")
    if not at or rest.startswith("/"):
        return []
    user, colon, password = user_and_password.partition(":")
    if not colon:
        return [re.compile(rf"(?<!\w){re.escape(user)}(?!\w)")] if len(user) >= _LONG else []
    both = {user_and_password, unquote(user_and_password)}
    alone = {password, unquote(password)} - {"", user, unquote(user)}

    def pattern(secret: str) -> re.Pattern[str]:
        is_found_anywhere = secret in both or len(secret) >= _LONG
        return re.compile(re.escape(secret) if is_found_anywhere else rf"(?<!\w){re.escape(secret)}(?!\w)")

    return [pattern(secret) for secret in sorted(both | alone, key=len, reverse=True)]


def is_masked(uri: str) -> bool:
    """Whether a URI had a password before it was written down."""
    return f"://{STARS}@" in uri


def words_of(error: Exception, uri: str) -> str:
    """What an error says, on one line, without the secrets of `uri`."""
    return " ".join(masked(str(error), uri).split())
