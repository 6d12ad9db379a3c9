"""What looks like a secret, where others can read: command lines, manifests, tags.

Knows nothing of where it is looked for.
"""

import re

_NAME = re.compile(r"(token|password|passwd|secret|api-?key|[_.-]key)$", re.IGNORECASE)
_LOGIN = re.compile(r"://[^/?#\s]*@")


def is_secret(name: str) -> bool:
    """Whether what has this name is not for others."""
    return bool(_NAME.search(name))


def has_login(value: str) -> bool:
    """Whether there is an address with a user, a password or a token in it."""
    return bool(_LOGIN.search(value))
