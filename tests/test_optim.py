"""The learning rate's curve, and the warmup that a run has no time for."""

import pytest

from prefix_ds.config import TrainKeys
from prefix_ds.errors import ConfigError
from prefix_ds.optim import check_warmup, learning_rate


@pytest.mark.parametrize("warmup_steps", [0, 3, 6])
def test_a_warmup_that_is_taken_reaches_the_rate(warmup_steps):
    keys = TrainKeys(warmup_steps=warmup_steps, lr=0.5)
    check_warmup(6, keys)
    assert max(learning_rate(step, 6, keys) for step in range(6)) == 0.5


def test_a_warmup_that_never_reaches_the_rate_is_refused():
    keys = TrainKeys(warmup_steps=7)
    with pytest.raises(
        ConfigError, match=r"^train\.warmup_steps: 7, but the run has 6 steps, and would never"
    ):
        check_warmup(6, keys)
    check_warmup(0, keys)  # nothing is trained
