"""What looks like a secret, where others can read: command lines, manifests, tags.

Knows nothing of where it is looked for.
"""

import re

_NAME = re.compile(r"(token|password|passwd|secret|api-?key|[_.-]key)$", re.IGNORECASE)
# Of a page anybody may be the user's name: a token. A database's user alone is no secret.
_LOGIN = re.compile(r"https?://[^/?#\s]*@|://[^/\s@]*:[^\s@]*@", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether what has this name is not for others."""
    return bool(_NAME.search(name))


def has_login(value: str) -> bool:
    """Whether there is an address with a password or a token in it."""
    return bool(_LOGIN.search(value))
