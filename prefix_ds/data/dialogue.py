"""A conversation that waits for an answer, and what is left of it where it is too long.

The oldest turns go first, whole, and no more of them than must. What stands before the first turn of the
user's or the assistant's (the system turn) stays, and what is left begins with a turn of the user's, as
templates want it. Where the last of these is too long by itself, it loses the beginning of its content, as a
plain prompt does. What is left is written anew each time, so no header or special token is ever cut.

How much must go is found by bisection: of a thousand turns some ten parts are written, not a thousand.

Knows nothing of tokens, and of how turns are written.
"""

import bisect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Turn = Mapping[str, Any]


@dataclass(frozen=True)
class Dialogue:
    """Turns, and what writes turns as the text in front of an answer."""

    turns: Sequence[Turn]
    write: Callable[[Sequence[Turn]], str]

    @cached_property
    def text(self) -> str:
        """All of it. Raises what `write` raises."""
        return self.write(self.turns)

    def shortened(self, fits: Callable[[str], bool]) -> str | None:
        """The longest that can be left and `fits`; None if there is none. Raises what `write` raises."""
        head = list(itertools.takewhile(lambda turn: turn["role"] not in ("user", "assistant"), self.turns))
        starts = [n for n, turn in enumerate(self.turns) if turn["role"] == "user"]
        if not starts:
            return None
        last, behind = self.turns[starts[-1]], self.turns[starts[-1] + 1 :]

        def left(step: int) -> str:
            """The turns from one of the user's on; when these are used up, a character less each step."""
            if step < len(starts):
                return self.write([*head, *self.turns[starts[step] :]])
            content = last["content"][step - len(starts) + 1 :]
            return self.write([*head, {**last, "content": content}, *behind])

        steps = range(len(starts) + max(0, len(last["content"]) - 1))
        found = bisect.bisect_left(steps, True, key=lambda step: fits(left(step)))
        return left(found) if found < len(steps) else None
