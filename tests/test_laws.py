"""Laws of training: what comes out does not depend on ranks, shards, micro-batches or interruptions."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from prefix_ds.checkpoint import latest, read_prefix
from prefix_ds.config import parse_config
from prefix_ds.config.reading import config_text
from prefix_ds.data.examples import tokenise_split
from prefix_ds.data.order import Order
from prefix_ds.dist import joined_world
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.sharding import whole_tensors
from prefix_ds.errors import Stopped
from prefix_ds.loading import load_tokenizer
from tests.ranks import on_ranks
from tests.reference import reference_prefix
from tests.workshop import records, run_config, write_jsonl


def changed(config, *overrides):
    return parse_config(config_text(config), overrides)


def trained(config, size=1):
    """Trains a run on some ranks; its training losses, validation losses and final prefix."""
    on_ranks(size, train_here, config)
    return outcome(config)


def train_here(config):
    from prefix_ds.train import train

    train(config)


def outcome(config):
    rows = metrics(config)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    valid = [row["valid/loss"] for row in rows if "valid/loss" in row]
    return losses, valid, last_prefix(config)


def metrics(config):
    return [json.loads(line) for line in (Path(config.run.folder) / "metrics.jsonl").read_text().splitlines()]


def last_prefix(config):
    """The table of the last checkpoint, trained to the end (the best prefix may be older)."""
    return latest(Path(config.run.folder)).tensors()["prefix.table_PD"]


def assert_same(one, two, tolerance):
    for mine, theirs in zip(one[:2], two[:2], strict=True):
        assert mine == pytest.approx(theirs, abs=tolerance)
    # Of the whole table: Adam divides by the gradient's size, so an element whose gradient is all rounding
    # may differ.
    assert (one[2] - two[2]).norm() <= tolerance * two[2].norm()


def test_one_two_and_four_ranks_walk_the_same_curve(tmp_path):
    config = run_config(tmp_path)
    alone = trained(config)
    assert alone[0][-1] < alone[0][0], "nothing was learned, so equality would say nothing"
    for size in (2, 4):
        assert_same(trained(changed(config, f"run.folder={tmp_path}/run{size}"), size), alone, 1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_the_number_of_micro_batches_changes_nothing(tmp_path, size):
    config = run_config(tmp_path, "data.max_length=32")
    whole = trained(changed(config, "train.micro_batch_tokens=4096"), size)
    pieces = changed(config, "train.micro_batch_tokens=32", f"run.folder={tmp_path}/pieces")
    assert_same(trained(pieces, size), whole, 1e-6)


def test_without_packing_training_is_the_same(tmp_path):
    config = run_config(tmp_path)
    packed = trained(config)
    apart = trained(changed(config, "data.packing=false", f"run.folder={tmp_path}/apart"))
    assert_same(apart, packed, 1e-6)


def test_recomputation_changes_nothing(tmp_path):
    config = run_config(tmp_path)
    again = changed(config, "model.recompute=true", f"run.folder={tmp_path}/again")
    assert_same(trained(again, 2), trained(config, 2), 1e-6)


def test_shards_and_packing_equal_plain_pytorch(tmp_path):
    config = run_config(tmp_path)
    losses, _, table = trained(config, 2)
    batches, start = reference_inputs(config)
    expected_losses, expected = reference_prefix(config.model.name, start, batches, config.train)
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    found = [tuple(read_prefix_table(table, config))]
    for mine, theirs in zip(found[0], expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-5)


def reference_inputs(config):
    """The global batches of every step, and the keys and values the prefix text starts from."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(config.model, config.data)
    examples = tokenise_split("train", config.data, tokenizer)
    order = Order(len(examples), config.train)
    batches = []
    for step in range(order.num_steps):
        chosen = order.batch(step)
        rows = zip(examples.ids(chosen), examples.num_targets[chosen], strict=True)
        batches.append([(ids[:-n].tolist(), ids[-n:].tolist()) for ids, n in rows])
    base = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    with torch.no_grad():
        cache = base(torch.tensor([tokenizer(config.prefix.text).input_ids])).past_key_values
    return batches, [[layer.keys[0], layer.values[0]] for layer in cache.layers]


def read_prefix_table(table, config):
    from prefix_ds.prefix import Slot, keys_values_of

    saved = read_prefix(Path(config.run.folder) / "prefix")
    slots = [Slot(name, k.shape[0], k.shape[2], v.shape[2]) for name, (k, v) in saved.slots.items()]
    return keys_values_of(table, slots)


def stop_after(config, steps):
    """Trains, and asks itself to stop (as a scheduler would) when some steps are done."""
    from prefix_ds import loop, train

    class Bell:
        def __init__(self, bar):
            self.bar = bar

        def at(self, done, **shown):
            self.bar.at(done, **shown)
            if done == steps:
                os.kill(os.getpid(), signal.SIGTERM)

    real = loop.fit
    train.fit = lambda run, *rest: real(loop.replace(run, bar=Bell(run.bar)), *rest)
    with pytest.raises(Stopped):
        train.train(config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reparam_dim", [0, 8])
def test_a_run_that_was_stopped_ends_as_if_it_never_was(tmp_path, dtype, reparam_dim):
    config = run_config(tmp_path, f"model.dtype={dtype}", f"prefix.reparam_dim={reparam_dim}")
    stopped = changed(config, f"run.folder={tmp_path}/stopped")
    on_ranks(2, train_here, config)
    on_ranks(2, stop_after, stopped, 3)
    assert len([row for row in metrics(stopped) if "train/loss" in row]) == 3
    assert [row["step"] for row in metrics(stopped) if "valid/loss" in row] == [0], "the one due waits"
    on_ranks(2, train_here, stopped)
    assert strip_times(metrics(stopped)) == strip_times(metrics(config))
    assert whole_state(stopped) == whole_state(config)
    assert bytes_of(stopped) == bytes_of(config)


def strip_times(rows):
    return [{k: v for k, v in row.items() if not k.startswith(("time", "memory"))} for row in rows]


def whole_state(config):
    """A digest of every tensor of the last checkpoint."""
    tensors = latest(Path(config.run.folder)).tensors()
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def bytes_of(config):
    saved = read_prefix(Path(config.run.folder) / "prefix")
    return [t.numpy().tobytes() for pair in saved.slots.values() for t in pair]


def stop_within_validation(config):
    """Trains, and is asked to stop while the first share of a later validation is read."""
    from prefix_ds import loop, train

    asked, real = [], loop._until_asked

    def asking(shares, stop):
        for number, share in enumerate(real(shares, stop)):
            if number == 0 and len(asked) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield share
        asked.append(1)

    loop._until_asked = asking
    with pytest.raises(Stopped, match="stopped at step 3 of 6"):
        train.train(config)


def test_a_run_that_was_stopped_while_it_validated_ends_as_if_it_never_was(tmp_path):
    write_jsonl(tmp_path / "valid.jsonl", records(60, 2))  # so that a validation has several shares
    config = run_config(tmp_path, "train.micro_batch_tokens=64")
    stopped = changed(config, f"run.folder={tmp_path}/stopped")
    on_ranks(1, train_here, config)
    on_ranks(1, stop_within_validation, stopped)
    assert [row["step"] for row in metrics(stopped) if "valid/loss" in row] == [0]
    on_ranks(1, train_here, stopped)
    assert strip_times(metrics(stopped)) == strip_times(metrics(config))
    assert whole_state(stopped) == whole_state(config)


def test_a_run_that_was_stopped_at_its_end_is_done_at_the_next_start(tmp_path):
    config = run_config(tmp_path)
    stopped = changed(config, f"run.folder={tmp_path}/stopped")
    on_ranks(1, train_here, config)
    on_ranks(1, stop_after, stopped, 6)
    for _ in range(2):  # and the start after that has nothing to do
        on_ranks(1, train_here, stopped)
        assert strip_times(metrics(stopped)) == strip_times(metrics(config))
        assert bytes_of(stopped) == bytes_of(config)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, before, after):
    config = run_config(tmp_path)
    moved = changed(config, f"run.folder={tmp_path}/moved")
    on_ranks(before, stop_after, moved, 3)
    assert_same(trained(moved, after), trained(config, after), 1e-6)


def look_at_frozen_and_optimizer(config):
    """Trains three steps by hand and looks at what happened to the base and to memory."""
    from prefix_ds.data.stream import Stream
    from prefix_ds.rows import limits_for
    from prefix_ds.train import _trained

    with joined_world() as world:
        tokenizer = load_tokenizer(config.model, config.data)
        made = _trained(config, deepspeed_settings(config, world.size), tokenizer, world)
        stream = Stream(
            tokenise_split("train", config.data, tokenizer), limits_for(made.lm, config), config.train, world
        )
        before = digests(made.base.module)
        start = made.engine.prefix.table().detach().clone()
        for step in range(3):
            made.engine.step(stream.share(step), 1e-2)
        state = made.engine.optimizer.state.values()
        return {
            "frozen": before == digests(made.base.module) and bool(before),
            "moved": not torch.equal(start, made.engine.prefix.table()),
            "state": sum(t.numel() for s in state for t in s.values() if t.dim()),
            "trained": sum(p.numel() for p in made.engine.trained),
            "base_grads": sum(p.grad is not None for p in made.base.module.parameters()),
            "base_trainable": sum(p.requires_grad for p in made.base.module.parameters()),
        }


def digests(module):
    whole = whole_tensors(module, keep=True) | {f"buffer {n}": b for n, b in module.named_buffers()}
    return {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in whole.items()}


@pytest.mark.parametrize("size", [1, 2])
def test_the_base_stays_frozen_and_costs_no_optimizer_memory(tmp_path, size):
    for found in on_ranks(size, look_at_frozen_and_optimizer, run_config(tmp_path)):
        assert found["frozen"], "a parameter or buffer of the base changed"
        assert found["moved"], "the prefix did not move, so a frozen base would say nothing"
        assert found["state"] == 2 * found["trained"]
        assert found["base_grads"] == found["base_trainable"] == 0
