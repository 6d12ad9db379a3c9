"""What is a secret, by its name or in an address: nothing that others can read may show it.

Knows nothing of where it is looked for.
"""

import re

# `key` and `pass` are everyday words: they count behind another (SSH_KEY, DB_PASS) and in an address's query.
SECRET_NAME = (
    r"(?:token|password|passphrase|passwd|pwd|secret|credentials?|(?:api|access)[_-]?key"
    r"|(?<=[_.?&;#-])(?:key|pass))"
)
_NAME = re.compile(rf"{SECRET_NAME}$", re.IGNORECASE)
# Of a page anybody may be the user's name: a token. A database's user alone is no secret.
_LOGIN = re.compile(r"https?://[^/?#\s]*@|://[^/\s@]*:[^\s@]*@", re.IGNORECASE)
_QUERY = re.compile(rf"[?&;#][\w.-]*{SECRET_NAME}=[^\s&;]", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether what has this name is not for others."""
    return bool(_NAME.search(name))


def has_login(value: str) -> bool:
    """Whether there is an address with a password or a token in it, also behind its question mark."""
    return bool(_LOGIN.search(value) or _QUERY.search(value))
