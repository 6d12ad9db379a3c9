"""Code of a card or of the README, run as whoever copies it would.

The README's is run by a new Python; the cards', of which there are many, where libraries are loaded already.
"""

import re
import subprocess
import sys

from tests.ranks import program


def snippet_of(text):
    (code,) = re.findall(r"```python\n(from peft.*?)```", text, re.DOTALL)
    return code


def outcome(code, folder):
    ended = program(code, folder)
    assert ended.code == 0, ended.err[-2000:]
    return ended.out


def outcome_anew(code, folder):
    """The same of a Python that has nothing loaded."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
