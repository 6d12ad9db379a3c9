"""Code of a card or of the README, run as whoever copies it would."""

import re
import subprocess
import sys


def snippet_of(text):
    (code,) = re.findall(r"```python\n(from peft.*?)```", text, re.DOTALL)
    return code


def outcome(code, folder):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
