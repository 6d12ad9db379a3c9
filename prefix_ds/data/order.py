"""Which examples step s trains on: a pure function of the seed, s, and two sizes.

The examples of all epochs form one stream: a fresh permutation an epoch, one after another. Step s takes the
slice [s G, (s + 1) G) of it, G the global batch size. Nothing is remembered between steps, so a run resumes
anywhere, on any number of ranks, and no checkpoint carries a sampler. A batch may reach over the border of
two epochs; only the last one is smaller, where train.epochs ends.

The permutation of an epoch is drawn from Philox, a counter-based generator (Salmon et al. 2011) whose key
is the pair (seed, epoch): no two pairs share a sequence, and none depends on the epochs before it.

Knows nothing of tokens and ranks.
"""

import functools
import math

import numpy as np
from numpy.typing import NDArray

from prefix_ds.config import TrainKeys

Ints = NDArray[np.int64]


class Order:
    """The order of `num_examples` examples."""

    def __init__(self, num_examples: int, train: TrainKeys) -> None:
        """Reads seed, global_batch_size, epochs and max_steps."""
        self.num_examples = num_examples
        self.batch_size = train.global_batch_size
        self.seed = train.seed
        by_epochs = max(1, math.ceil(round(train.epochs * num_examples, 6)))  # 0.1 x 30 is a little above 3
        by_steps = None if train.max_steps is None else train.max_steps * self.batch_size
        self.length = by_epochs if by_steps is None else by_steps  # of the stream

    @property
    def num_steps(self) -> int:
        """Steps to the end of the stream."""
        return -(-self.length // self.batch_size)

    def batch(self, step: int) -> Ints:
        """The examples of a step, 0 being the first."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        start = step * self.batch_size
        end = min(start + self.batch_size, self.length)
        n = self.num_examples
        parts = [
            permutation(self.seed, epoch, n)[max(start - epoch * n, 0) : end - epoch * n]
            for epoch in range(start // n, (end - 1) // n + 1)
        ]
        return np.concatenate(parts)


@functools.lru_cache(maxsize=2)  # a step needs one, or two at a border
def permutation(seed: int, epoch: int, size: int) -> Ints:
    """The order of one epoch."""
    # Philox's key is two words of 64 bits: both numbers fit, no hashing
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    order = generator.permutation(size)
    order.setflags(write=False)  # it is handed out by the cache
    return order
