"""`prefix-ds check`: says everything that is wrong with a run, and shows what the model will see.

Runs in one process and loads no weights: the base's folder, DeepSpeed's preset, the tokenizer and the start
of the prefix are looked at, then every split is tokenised as training would do it, and is in the cache when
it does. Problems are collected, so that one reading tells all of them.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.text import Text

from prefix_ds.config import RunConfig
from prefix_ds.data.examples import (
    Examples,
    check_ids,
    length_marks,
    lengths_text,
    source_of,
    tokenise_split,
)
from prefix_ds.data.order import Order
from prefix_ds.data.source import Records, named_files, read_records
from prefix_ds.data.template import Template, parse_template
from prefix_ds.data.tokenise import template_keys
from prefix_ds.engine.settings import deepspeed_settings
from prefix_ds.engine.vetting import vet
from prefix_ds.errors import PrefixError
from prefix_ds.loading import load_tokenizer
from prefix_ds.optim import check_warmup
from prefix_ds.suitability import check_base, check_lengths

Answer = TypeVar("Answer")

_SHOWN_EXAMPLES = 3
_SHOWN_CHARACTERS = 400  # at the beginning of a prompt or target, and at its end


class Problems:
    """What was found wrong, each line once."""

    def __init__(self) -> None:
        """None so far."""
        self.lines: list[str] = []

    def of(self, work: Callable[[], Answer]) -> Answer | None:
        """What `work` answers; None, and its line noted, if it raises a PrefixError."""
        try:
            return work()
        except PrefixError as error:
            self.lines += [line for line in error.args if line not in self.lines]
            return None

    def about(self, key: str) -> bool:
        """Whether a line begins with the key."""
        return any(line.startswith(f"{key}: ") for line in self.lines)


def check_run(config: RunConfig, console: Console) -> None:
    """Shows a run's data on the console. Raises PrefixError, with a line for everything that is wrong."""
    problems = Problems()
    problems.of(lambda: vet(deepspeed_settings(config, world_size=1), config.engine.deepspeed))
    base = problems.of(lambda: check_base(config))
    problems.of(lambda: source_of("train", config.data))
    has_tokenizer = bool(config.model.tokenizer or config.model.name)
    tokenizer = None
    if config.model.tokenizer or (has_tokenizer and not problems.about("model.name")):
        tokenizer = problems.of(lambda: load_tokenizer(config.model, config.data))
    if tokenizer is not None:
        warning = problems.of(lambda: check_lengths(config, tokenizer, base))
        if warning:
            console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    if not has_tokenizer:
        console.print("The run will make its own tokenizer; until then lengths are in characters.")
    for split in ("train", "valid", "test"):
        if getattr(config.data, split):
            for line in _split_view(split, config, tokenizer, base, problems):
                console.print(line, soft_wrap=True)
    if problems.lines:
        raise PrefixError(f"{len(problems.lines)} to mend:", *(f"  {line}" for line in problems.lines))
    console.print("Nothing is wrong.", style="green")


def _split_view(split: str, config: RunConfig, tokenizer: Any, base: Any, problems: Problems) -> list[Text]:
    """What there is to show of a split; nothing where it has problems."""
    records = _records(split, config, problems)

    def in_tokens() -> list[Text]:
        examples = tokenise_split(split, config.data, tokenizer)
        if split == "train":
            check_warmup(Order(len(examples), config.train).num_steps, config.train)
        if base is not None:
            check_ids([examples], tokenizer, base.get_input_embeddings().weight.shape[0])
        return _in_tokens(examples, tokenizer)

    if config.data.messages:
        return (problems.of(in_tokens) if tokenizer is not None and records is not None else None) or []
    templates = _templates(split, config, records, problems)
    if records is None or len(templates) < 2:
        return []
    in_characters = partial(_in_characters, split, records, *templates)
    return problems.of(in_characters if tokenizer is None else in_tokens) or []


def _records(split: str, config: RunConfig, problems: Problems) -> Records | None:
    source, key = getattr(config.data, split), f"data.{split}"
    items = [source] if isinstance(source, str) else source
    found = [problems.of(partial(named_files, item, key)) for item in items]
    return None if None in found else problems.of(lambda: read_records(source, key))


def _templates(split: str, config: RunConfig, records: Records | None, problems: Problems) -> list[Template]:
    """The templates that fit the first record; two if all is well."""

    def fitting(key: str, text: str) -> Template:
        template = parse_template(text, key)
        if records is not None:
            template.check(records[0], records.place(0))
        return template

    tried = [problems.of(partial(fitting, *pair)) for pair in template_keys(split, config.data)]
    return [template for template in tried if template is not None]


def _in_tokens(examples: Examples, tokenizer: Any) -> list[Text]:
    view = [Text(examples.report.line(), style="bold")]
    if examples.report.split == "train":
        shown = range(min(_SHOWN_EXAMPLES, len(examples)))
        view += [_example(examples, index, tokenizer) for index in shown]
    return view


def _example(examples: Examples, index: int, tokenizer: Any) -> Text:
    """One example: its prompt in one colour, its target in another and between brackets."""
    (ids,) = examples.ids([index])
    border = len(ids) - int(examples.num_targets[index])
    place = examples.records.place(int(examples.record_of[index]))
    return _shown(
        f"{place}: {border} tokens are read, {len(ids) - border} learnt",
        *(_shortened(tokenizer.decode(part.tolist())) for part in (ids[:border], ids[border:])),
    )


def _in_characters(split: str, records: Records, prompt: Template, target: Template) -> list[Text]:
    lengths = np.array([len(read) + len(learnt) for _, read, learnt in _texts(records, prompt, target)])
    marks = lengths_text(length_marks(lengths))
    view = [Text(f"{split}: {len(lengths):,} examples; {marks} characters", style="bold")]
    if split == "train":
        first = itertools.islice(_texts(records, prompt, target), _SHOWN_EXAMPLES)
        view += [_shown(place, _shortened(read), _shortened(learnt)) for place, read, learnt in first]
    return view


def _texts(records: Records, prompt: Template, target: Template) -> Iterator[tuple[str, str, str]]:
    """Place, prompt and target of every example."""
    for index, record in enumerate(records):
        place = records.place(index)
        read = prompt.text(record, place)
        for learnt in target.texts(record, place):
            yield place, read, learnt


def _shown(head: str, read: str, learnt: str) -> Text:
    return Text.assemble((f"  {head}\n", "dim"), (read, "cyan"), "⟦", (learnt, "bold green"), "⟧")


def _shortened(text: str) -> str:
    if len(text) <= 2 * _SHOWN_CHARACTERS:
        return text
    return f"{text[:_SHOWN_CHARACTERS]} [...] {text[-_SHOWN_CHARACTERS:]}"
