"""`prefix-ds evaluate`: how good a run is on a split of its data.

Loss and perplexity of what people wrote, and scores of what the run writes itself; the same of the base with
nothing in front, or with the written instruction in front, to compare. What is wrong with the data comes to
light before the base is loaded.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from prefix_ds.config import RunConfig
from prefix_ds.data.examples import Examples, check_ids, load_examples, source_of
from prefix_ds.data.prompts import Prompt, read_prompts, tell_cut
from prefix_ds.dist import World, first_here_first, joined_world, on_first, peers_may_die, together
from prefix_ds.errors import ConfigError
from prefix_ds.evaluation import Evaluation, Front, RecordLosses, record_losses, table_of, write_evaluation
from prefix_ds.files import check_can_write
from prefix_ds.initial import initial_prefix
from prefix_ds.logs import configure_logging
from prefix_ds.opening import Opened, check_is_prefix, model_of, open_trained, tokenizer_of
from prefix_ds.prefix import num_positions
from prefix_ds.rows import limits_for
from prefix_ds.run_folder import RunFolder, open_run
from prefix_ds.scores import names_of, scored
from prefix_ds.tracking import (
    add_metrics,
    best_by,
    flattened,
    has_facts,
    histories_of,
    read_facts,
    read_metrics,
    summary,
    told_mark,
    without_secrets,
)
from prefix_ds.verdicts import Mark, keys_read
from prefix_ds.writing import check_prompts, tell_far, write_outputs

log = logging.getLogger(__name__)

Split = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class Request:
    """What to evaluate, and what stands in front of the texts."""

    split: Split = "test"
    front: Front = "trained"


def evaluate(run: Path, overrides: Sequence[str], request: Request) -> None:
    """Evaluates a run, and leaves files, metrics and a table. Raises PrefixError. Every rank calls this."""
    configure_logging()
    folder, config = open_run(run, overrides)
    check_request(config, request)
    with joined_world() as world, peers_may_die():
        started = time.monotonic()
        on_first(world, lambda: check_can_write(folder.path))
        tokenizer = together(lambda: tokenizer_of(folder, config))
        prompts = first_here_first(world, lambda: _prompts(request.split, config, tokenizer))
        examples = load_examples(request.split, config.data, tokenizer, world)
        log.info("%s", examples.report.line())
        if world.is_first:
            tell_cut(prompts, config.data.max_length)
        opened = _opened(folder, config, request, world)
        together(lambda: _check_reach(opened, examples, prompts, config))
        if world.is_first and config.evaluate.scores:
            tell_far(opened, prompts, config.generate)
        losses = record_losses(opened, examples, limits_for(opened.lm, config), world)
        outputs = _outputs(opened, prompts, config, world)
        on_first(
            world, lambda: _deliver(folder, config, request, opened.mark, prompts, losses, outputs, started)
        )


def check_request(config: RunConfig, request: Request) -> None:
    """Raises ConfigError for what makes no sense with this run."""
    source_of(request.split, config.data)
    if request.front != "trained":
        check_is_prefix(config)
    if request.front == "instruction" and config.prefix.init != "text":
        raise ConfigError(f"prefix.init: {config.prefix.init}: this run did not start from an instruction")
    if config.evaluate.scores and not config.data.prompt and config.data.messages is None:
        raise ConfigError(
            "evaluate.scores: there is no data.prompt to write for; evaluate.scores=[] gives the loss alone"
        )


def _prompts(split: Split, config: RunConfig, tokenizer: Any) -> list[Prompt]:
    data = config.data
    source, key = source_of(split, data), f"data.{split}"
    return read_prompts(source, key, data, tokenizer, data.max_length, references=True)


def _opened(folder: RunFolder, config: RunConfig, request: Request, world: World) -> Opened:
    """The run's model, behind what the request asks for, with its mark. Every rank calls this."""
    if config.train.method != "prefix":
        mark = on_first(world, lambda: _model_mark(folder.path))
        return replace(open_trained(folder, config, world), mark=mark)
    opened = open_trained(folder, config, world, with_prefix=request.front == "trained")
    if request.front != "instruction":
        return opened
    start = initial_prefix(opened.lm, config.prefix, opened.tokenizer, config.train.seed, world.device)
    return replace(opened, table_PD=start.table().detach().to(world.device), slots=start.slots)


def _model_mark(run: Path) -> Mark:
    """Of a run's model, which says nothing of itself, as its metrics have it."""
    params = read_facts(run).params if has_facts(run) else {}
    return told_mark(summary(histories_of(read_metrics(run)), None, best_by(params)))


def _check_reach(opened: Opened, examples: Examples, prompts: Sequence[Prompt], config: RunConfig) -> None:
    """Raises ConfigError or DataError for a position or a token that the base has not."""
    check_ids([examples], opened.tokenizer, opened.lm.vocab_size)
    longest = int(examples.lengths.max(initial=0)) + num_positions(opened.table_PD)
    opened.lm.check_length(longest, "data.max_length")
    if config.evaluate.scores:
        check_prompts(opened, prompts, config.generate)


def _outputs(opened: Opened, prompts: Sequence[Prompt], config: RunConfig, world: World) -> list[str] | None:
    """What the run writes; None where no score asks for it. Every rank calls this."""
    if not config.evaluate.scores:
        log.info("nothing is written for the records: evaluate.scores, or data.task, would say what to score")
        return None
    return [written.output for written in write_outputs(opened, prompts, config.generate, world)]


def _deliver(
    folder: RunFolder,
    config: RunConfig,
    request: Request,
    mark: Mark,
    prompts: Sequence[Prompt],
    losses: RecordLosses,
    outputs: Sequence[str] | None,
    started: float,
) -> None:
    """Scores, writes, shows and tells. Rank 0 calls this."""
    names = names_of(config.evaluate.scores or ())
    _, kept = open_run(folder.path)
    found = Evaluation(
        split=request.split,
        front=request.front,
        mark=mark,
        data=source_of(request.split, config.data),
        changed=_changed(folder, kept, config, request.front),
        prompts=prompts,
        losses=losses,
        outputs=outputs,
        scored=scored(names, outputs or (), [prompt.references for prompt in prompts]),
        generate=config.generate,
        seconds=time.monotonic() - started,
    )
    write_evaluation(folder.evaluate, found)
    Console().print(table_of(found))
    add_metrics(
        folder.path,
        mark.step or 0,
        found.metrics(),
        uri=_named_uri(kept, config),
        is_mirrored=config.mlflow.uri is not None,
    )


def _changed(folder: RunFolder, kept: RunConfig, config: RunConfig, front: Front) -> dict[str, str | None]:
    """The keys that the numbers come from and that are not those of run.yaml, without secrets."""
    own, now = (
        keys_read(_params(folder, keys), "" if front == "trained" else front) for keys in (kept, config)
    )
    return {key: now.get(key) for key in own | now if now.get(key) != own.get(key)}


def _params(folder: RunFolder, config: RunConfig) -> dict[str, str]:
    keys = config.model_copy(update={"model": model_of(folder, config)})
    return flattened(without_secrets(keys.model_dump(mode="json")))


def _named_uri(kept: RunConfig, config: RunConfig) -> str | None:
    """The server that an override names, maybe with the password that run.yaml has not; None: the run's."""
    return config.mlflow.uri if config.mlflow.uri != kept.mlflow.uri else None
