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


@pytest.mark.parametrize(
    ("schedule", "half", "last"), [("cosine", 0.5, 0.00245), ("linear", 0.5, 0.03125), ("constant", 1.0, 1.0)]
)
def test_the_way_down(schedule, half, last):
    """Of 40 steps the first 8 are warmup, and the 24th is half way down; the last still learns."""
    keys = TrainKeys(schedule=schedule, warmup_steps=8, lr=2.0)
    rates = [learning_rate(step, 40, keys) / keys.lr for step in range(40)]
    assert rates[:8] == pytest.approx([(step + 1) / 8 for step in range(8)])
    assert (rates[8], rates[24], rates[39]) == pytest.approx((1.0, half, last), rel=0.02)


def test_a_warmup_that_never_reaches_the_rate_is_refused():
    keys = TrainKeys(warmup_steps=7)
    with pytest.raises(
        ConfigError, match=r"^train\.warmup_steps: 7, but the run has 6 steps, and would never"
    ):
        check_warmup(6, keys)
    check_warmup(0, keys)  # nothing is trained
