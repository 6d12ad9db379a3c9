"""What `model.recompute: auto` comes to when a run starts: asked before its base is loaded.

The first rank plans the run with the lengths of its own examples, for the rank that has the least memory,
and all do as it says. The run folder keeps what was decided: a run that goes on does the same where it still
fits.

Knows nothing of training.
"""

import json
import logging

import numpy as np

from prefix_ds.config import RunConfig
from prefix_ds.data.examples import Examples
from prefix_ds.dist import World, gathered, on_first
from prefix_ds.errors import ModelError
from prefix_ds.files import write_text_atomically
from prefix_ds.plan import estimator, least_recomputed, recomputed
from prefix_ds.plan.base import prefix_length
from prefix_ds.plan.estimate import Job
from prefix_ds.plan.here import device_here, memory_here
from prefix_ds.run_folder import RunFolder

log = logging.getLogger(__name__)

Again = bool | int


def fitted(config: RunConfig, folder: RunFolder, examples: Examples, world: World) -> RunConfig:
    """The configuration, with a value in place of `auto`. Raises PrefixError. Every rank calls this."""
    if config.model.recompute != "auto":
        return config
    memory_bytes = min(gathered(memory_here(world)))
    return recomputed(
        config, on_first(world, lambda: _decided(config, folder, examples, world, memory_bytes))
    )


def _decided(
    config: RunConfig, folder: RunFolder, examples: Examples, world: World, memory_bytes: int
) -> Again:
    device = device_here(world, memory_bytes)
    try:
        estimated = estimator(device, prefix_length(config))
        choice = least_recomputed(config, job_of(config, examples, world), device, estimated, _had(folder))
    except ModelError as error:
        log.warning("model.recompute: auto: all layers are computed again, as %s", error)
        return True
    log.log(logging.INFO if choice.fits else logging.WARNING, "%s", choice.line())
    write_text_atomically(folder.recompute_file, json.dumps({"recompute": choice.again}) + "\n")
    return choice.again


def _had(folder: RunFolder) -> Again | None:
    """What the run did before; None for one that has not begun."""
    if not (folder.has_begun and folder.recompute_file.exists()):
        return None
    had: Again = json.loads(folder.recompute_file.read_text())["recompute"]
    return had


def job_of(config: RunConfig, examples: Examples, world: World) -> Job:
    """The run's job: examples of their mean length, and as many targets as its fullest micro-batches have.

    Examples of like lengths run together, so the part of targets is the largest of such groups.
    """
    order = np.argsort(examples.lengths, kind="stable")
    at_once = max(1, int(config.train.micro_batch_tokens // examples.lengths.mean()))
    starts = range(0, len(order), at_once)
    tokens, targets = (
        np.add.reduceat(numbers[order], starts) for numbers in (examples.lengths, examples.num_targets)
    )
    return Job(
        nodes=world.size // world.local_size,
        devices_per_node=world.local_size,
        example_tokens=round(float(examples.lengths.mean())),
        target_part=float((targets / tokens).max()),
    )
