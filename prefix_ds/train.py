"""`prefix-ds train`: a run from its configuration to its result.

Reads like a table of contents: the world, the run folder, tokenizer and data, the base in shards and what is
trained on it, where the run goes on, the loop. Each line names the room that does the work.
"""

import contextlib
import importlib.metadata
import json
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefix_ds import __version__
from prefix_ds.config import RunConfig
from prefix_ds.data.ahead import Ahead
from prefix_ds.data.examples import Examples, check_ids, load_examples, source_of
from prefix_ds.data.order import Order
from prefix_ds.data.packing import Limits
from prefix_ds.data.prompts import Prompt, read_prompts
from prefix_ds.data.stream import Stream, Sweep
from prefix_ds.data.texts import read_texts
from prefix_ds.dist import (
    World,
    first_here_first,
    joined_world,
    on_first,
    peers_may_die,
    together,
    wait_for_all,
)
from prefix_ds.engine.filling import in_shards
from prefix_ds.engine.full_engine import FullEngine
from prefix_ds.engine.prefix_engine import PrefixEngine
from prefix_ds.engine.settings import Settings, deepspeed_settings
from prefix_ds.engine.sharding import Sharded, sharded, sharded_construction, sharded_with_optimizer
from prefix_ds.engine.vetting import vet
from prefix_ds.engine.whole import whole_if_alone
from prefix_ds.evaluation import Sample, sampled
from prefix_ds.files import whole_folder, write_text_atomically
from prefix_ds.initial import initial_prefix
from prefix_ds.loading import load_base, load_tokenizer, new_base
from prefix_ds.logs import configure_logging
from prefix_ds.loop import Run, fit
from prefix_ds.memory import RunMemory
from prefix_ds.model import PrefixLM
from prefix_ds.new_tokenizer import opened_tokenizer, trained_tokenizer
from prefix_ds.opening import Opened
from prefix_ds.optim import adamw, check_warmup
from prefix_ds.plan.fitting import fitted
from prefix_ds.progress import Progress
from prefix_ds.result import prefix_writer
from prefix_ds.rows import limits_for
from prefix_ds.run_folder import RunFolder, claim, publishable
from prefix_ds.speed import Cost, Gauge, Products, cost_of, medians, peak_flops
from prefix_ds.stop import StopRequest
from prefix_ds.suitability import check_base, check_lengths
from prefix_ds.tracking import (
    DatasetFacts,
    Facts,
    flattened,
    open_tracker,
    process_tags,
    progress_bar,
    read_metrics,
)

log = logging.getLogger(__name__)

_TOLD_PACKAGES = ("torch", "deepspeed", "transformers")


@dataclass(frozen=True)
class Trained:
    """What is trained, on what: an engine, and the shards behind it."""

    engine: PrefixEngine | FullEngine
    lm: PrefixLM
    base: Sharded
    num_trained: int  # elements
    num_frozen: int
    cost: Cost


def train(config: RunConfig) -> Progress:
    """Trains a run to its end, from where it stands. Every rank calls this.

    Raises PrefixError; Stopped when asked to stop, with a checkpoint written; PeerLost.
    """
    configure_logging()
    with joined_world() as world, peers_may_die():
        return _train(config, world, StopRequest())


def _train(config: RunConfig, world: World, stop: StopRequest) -> Progress:
    folder, settings, skeleton = together(lambda: _prepared(config, world))
    tokenizer = _tokenizer(config, folder, world)
    warning = together(lambda: check_lengths(config, tokenizer, skeleton))
    if warning and world.is_first:
        log.warning("%s", warning)
    examples = {split: load_examples(split, config.data, tokenizer, world) for split in _splits(config)}
    together(lambda: check_warmup(Order(len(examples["train"]), config.train).num_steps, config.train))
    memory = RunMemory(folder, world, config, examples["train"].digest)
    found = memory.newest()
    trained = _trained(fitted(config, folder, examples["train"], world), settings, tokenizer, world)
    on_first(world, lambda: _write_settings(folder, trained.base.settings))
    together(lambda: check_ids(examples.values(), tokenizer, trained.lm.vocab_size))
    start = memory.restore(trained.engine, found)
    limits = limits_for(trained.lm, config)
    stream = Stream(examples["train"], limits, config.train, world)
    ahead = Ahead(stream.share, stream.num_steps, world.device)
    sweep = _sweep(examples["valid"], limits, world) if "valid" in examples else None
    sample = _sample(config, trained, tokenizer, world) if config.evaluate.every else None
    gauge = Gauge(trained.cost, peak_flops(world, getattr(torch, config.model.dtype)), world.device)
    _tell(world, trained, examples.values(), start)
    told = examples.values() if world.is_first else ()  # a digest reads all of the data: once is enough
    facts = _facts(config, folder, told)
    tracker = together(
        lambda: open_tracker(
            folder.path,
            facts,
            uri=config.mlflow.uri,
            resume_step=start.step or None,
            is_first=world.is_first,
        )
    )
    bar = progress_bar("training", stream.num_steps, done=start.step, is_visible=world.is_first)
    with tracker, bar as shown, ahead, sweep or contextlib.nullcontext(), whole_if_alone(trained.base, world):
        run = Run(trained.engine, ahead, sweep, sample, tracker, shown, memory, stop, gauge)
        end = fit(run, config.train, config.run, config.evaluate, start)
        wait_for_all()
    log.info("%s", _farewell(memory, config, end))
    new = [r for r in read_metrics(folder.path) if r.step > start.step] if world.is_first else []
    if line := medians(new):
        log.info("medians: %s", line)
    return end


def _prepared(config: RunConfig, world: World) -> tuple[RunFolder, Settings, Any]:
    """The run folder, what DeepSpeed's file and run.yaml say of its settings, the base without weights."""
    settings = deepspeed_settings(config, world.size)
    vet(settings, config.engine.deepspeed)
    skeleton = check_base(config)
    return claim(config) if world.is_first else RunFolder(Path(config.run.folder)), settings, skeleton


def _write_settings(folder: RunFolder, settings: Settings) -> None:
    write_text_atomically(folder.deepspeed_file, json.dumps(settings, indent=2) + "\n")


def _splits(config: RunConfig) -> list[str]:
    return ["train", "valid"] if config.data.valid else ["train"]


def _tokenizer(config: RunConfig, folder: RunFolder, world: World) -> Any:
    """The base's tokenizer; a pretraining without one makes its own and keeps it in the run folder."""
    if config.model.name or config.model.tokenizer:
        return together(lambda: load_tokenizer(config.model, config.data))
    on_first(world, lambda: _make_tokenizer(config, folder))  # no other rank looks for it before it is there
    return together(lambda: opened_tokenizer(folder.tokenizer))


def _make_tokenizer(config: RunConfig, folder: RunFolder) -> None:
    if folder.tokenizer.exists():
        return
    log.info("training a tokenizer")
    vocab_size = int(config.model.config.get("vocab_size", 8192))
    made = trained_tokenizer(read_texts(config.data), vocab_size)
    with whole_folder(folder.tokenizer) as temporary:
        made.save_pretrained(temporary)


def _trained(config: RunConfig, settings: Settings, tokenizer: Any, world: World) -> Trained:
    """The base in shards and the engine that trains it, or a prefix on it. Every rank calls this."""
    base = _base(config, settings, tokenizer, world)
    if config.train.method == "prefix":
        return _prefix_on(sharded(base, settings), config, tokenizer, world)
    shards = sharded_with_optimizer(base, settings, adamw(base.parameters(), config.train))
    lm, tried_flops = _wrapped(shards, config, world)
    lm.check_length(config.data.max_length, "data.max_length")
    engine = FullEngine(lm, shards, config.train, world, tokenizer)
    cost = cost_of(lm, tried_flops, (), 0)
    return Trained(engine, lm, shards, shards.num_parameters(), 0, cost)


def _base(config: RunConfig, settings: Settings, tokenizer: Any, world: World) -> nn.Module:
    if config.model.name:
        return in_shards(first_here_first(world, lambda: load_base(config.model)), settings)
    with sharded_construction(settings):
        return new_base(config.model, tokenizer, config.train.seed)


def _prefix_on(shards: Sharded, config: RunConfig, tokenizer: Any, world: World) -> Trained:
    lm, tried_flops = _wrapped(shards, config, world)
    prefix = initial_prefix(lm, config.prefix, tokenizer, config.train.seed, world.device)
    lm.check_length(len(prefix.table()) + config.data.max_length, "data.max_length")
    write = prefix_writer(config.model, lm, prefix.slots)
    engine = PrefixEngine(lm, shards, prefix, config.train, world, write)
    cost = cost_of(lm, tried_flops, prefix.slots, len(prefix.table()))
    num_trained = sum(p.numel() for p in engine.trained)
    return Trained(engine, lm, shards, num_trained, shards.num_parameters(), cost)


def _wrapped(shards: Sharded, config: RunConfig, world: World) -> tuple[PrefixLM, int]:
    """The base as a model that sees a prefix, and the operations of the products in a pass of its trial."""
    keys = config.model
    assert keys.recompute != "auto"
    with Products() as products:
        lm = PrefixLM(shards.module, attention=keys.attention, recompute=keys.recompute, device=world.device)
    for line in lm.limits if world.is_first else ():
        log.warning("%s", line)
    return lm, products.flops // lm.num_tries


def _sweep(examples: Examples, limits: Limits, world: World) -> Ahead:
    sweep = Sweep(examples, limits, world)
    return Ahead(sweep.share, len(sweep), world.device)


def _sample(config: RunConfig, trained: Trained, tokenizer: Any, world: World) -> Sample:
    """What is written for while the run trains, and by what. Every rank calls this."""
    data = config.data

    def read() -> list[Prompt]:
        source = source_of("valid", data)
        some = partial(sampled, config)
        return read_prompts(
            source, "data.valid", data, tokenizer, data.max_length, references=True, choose=some
        )

    return Sample(first_here_first(world, read), config, _writer(trained, tokenizer), world)


def _writer(trained: Trained, tokenizer: Any) -> Callable[[], Opened]:
    """What is trained, as it is when it is asked for."""
    engine = trained.engine

    def opened() -> Opened:
        if not isinstance(engine, PrefixEngine):
            return Opened(trained.lm, None, (), tokenizer, trained.base)
        table_PD = engine.prefix.table().detach()
        return Opened(trained.lm, table_PD, engine.prefix.slots, tokenizer, trained.base)

    return opened


def _facts(config: RunConfig, folder: RunFolder, examples: Iterable[Examples]) -> Facts:
    """What MLflow is told about the run, apart from its numbers."""
    shown, uri = publishable(config), config.mlflow.uri
    return Facts(
        experiment=config.mlflow.experiment,
        name=config.mlflow.name or folder.path.name,
        params=flattened(shown.model_dump(mode="json")),
        tags=process_tags(sys.argv, uri) | {"prefix_ds.method": config.train.method} | shown.mlflow.tags,
        datasets=tuple(_dataset_facts(e) for e in examples),
    )


def _dataset_facts(examples: Examples) -> DatasetFacts:
    report, source = examples.report, ", ".join(examples.records.names)
    name, digest = Path(source).name or report.split, examples.records.identity()
    return DatasetFacts(name, digest, report.split, source, report.examples, report.targets)


def _tell(world: World, trained: Trained, examples: Iterable[Examples], start: Progress) -> None:
    """The first lines of the log: versions, world, data, what is trained and what this rank holds."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _TOLD_PACKAGES)
    log.info("prefix-ds %s, %s; %d ranks on %s", __version__, versions, world.size, world.device.type)
    for e in examples:
        log.info("%s", e.report.line())
    log.info(
        "trained %s, frozen %s elements%s; %s",
        f"{trained.num_trained:,}",
        f"{trained.num_frozen:,}",
        f" ({in_8_bits:,} in 8 bits)" if (in_8_bits := trained.base.num_in_8_bits()) else "",
        _resident(trained.base, world.device),
    )
    if start.step:
        log.info("going on after step %d", start.step)


def _resident(base: Sharded, device: torch.device) -> str:
    total, here = base.resident_bytes(), base.resident_bytes(device)
    elsewhere = f" ({(total - here) / 2**20:,.1f} of them in the host's memory)" if here < total else ""
    on_disk = f", {disk / 2**20:,.1f} MiB on its disk" if (disk := base.bytes_on_disk()) else ""
    return f"{total / 2**20:,.1f} MiB{elsewhere} resident on each rank{on_disk}"


def _farewell(memory: RunMemory, config: RunConfig, end: Progress) -> str:
    best = ""
    if end.best_score is not None:
        best = f"; best validation {config.evaluate.best_by} {end.best_score:.2f} at step {end.best_step}"
    elif end.best_loss is not None:
        best = f"; best validation loss {end.best_loss:.4f} at step {end.best_step}"
    return f"done after {end.step} steps{best}: {memory.result}"
