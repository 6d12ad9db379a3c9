"""Scores while a run trains: what it writes now for a few records of data.valid.

The records are the first of a permutation drawn from train.seed, the same at every step and on any number of
ranks, so the scores of two steps differ by what was learnt between them. Knows nothing of time, or of what is
done with the scores.
"""

from collections.abc import Callable, Sequence

from prefix_ds.config import RunConfig
from prefix_ds.data.order import permutation
from prefix_ds.data.prompts import Prompt
from prefix_ds.dist import World, on_first
from prefix_ds.scores import names_of, values_of
from prefix_ds.writing import Writer, write_outputs


def sampled(config: RunConfig, count: int) -> list[int]:
    """The numbers of the records that are written for, out of `count`."""
    return [int(number) for number in permutation(config.train.seed, 0, count)[: config.evaluate.sample]]


class Sample:
    """The records that are written for, and how."""

    def __init__(
        self, prompts: Sequence[Prompt], config: RunConfig, writer: Callable[[], Writer], world: World
    ) -> None:
        """`prompts`: of the `sampled` records. `writer` gives the model as it is when it is called."""
        keys = config.evaluate
        self.prompts = prompts
        self.names = names_of([*(keys.scores or ()), *([keys.best_by] if keys.best_by != "loss" else ())])
        self._generate, self._writer, self._world = config.generate, writer, world

    def scores(self) -> dict[str, float]:
        """The scores of what is written now, 0 to 100, by name. Every rank calls this."""
        written = write_outputs(self._writer(), self.prompts, self._generate, self._world, is_shown=False)
        outputs, references = [w.output for w in written], [w.references for w in written]
        return on_first(self._world, lambda: values_of(self.names, outputs, references))
