"""Records to a table of ids on disk, made once.

`datasets` runs a `Recipe` over the records in data.workers processes and keeps the result; another run, or
another rank of the node, maps the same file. The table has a row for every example, also for the dropped
ones, with what became of it: so all there is to report can be read from a cached table too.

Knows nothing of what the table is for.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

from prefix_ds import dist
from prefix_ds.config import DataKeys
from prefix_ds.data import chat as chats
from prefix_ds.data import dialogue, encode, template
from prefix_ds.data.cache import (
    code_fingerprint,
    fingerprint,
    quiet_library,
    telling_cache_errors,
    tokenizer_fingerprint,
)
from prefix_ds.data.chat import Chat, Conversation, LastTurn, Question
from prefix_ds.data.encode import Asked, Encoded, Encoder, Ids, Policy, Read
from prefix_ds.data.source import Records, place
from prefix_ds.data.template import Template, parse_template
from prefix_ds.errors import DataError

Columns = dict[str, list[Any]]
Prompted = Template | Question | Conversation  # what makes a prompt of a record
Learnt = Template | LastTurn  # and a target

_COLUMNS = {"prompt_length": "int32", "fate": "int8", "record": "int64"}  # and ids, lists of int32


@dataclass(frozen=True)
class Recipe:
    """All that the ids of a record depend on."""

    encoder: Encoder
    prompt: Prompted
    target: Learnt
    max_length: int
    policy: Policy

    def fingerprint(self) -> str:
        """Differs when the ids might."""
        rules = (self.prompt.rules, self.target.rules, self.max_length, self.policy)
        code = code_fingerprint(sys.modules[__name__], chats, dialogue, encode, template)
        return fingerprint(rules, tokenizer_fingerprint(self.encoder.tokenizer), code)

    def __call__(self, batch: Columns, indices: list[int], names: tuple[str, ...]) -> Columns:
        """Some records as rows of the table; runs in a worker process. Raises DataError."""
        records = [json.loads(text) for text in batch["record"]]
        places = [place(names[f], number) for f, number in zip(batch["file"], batch["number"], strict=True)]
        located = list(zip(records, places, strict=True))
        prompts = self.encoder.prompts([asked_of(self.prompt, *each) for each in located])
        texts = [self.target.texts(*each) for each in located]
        targets = iter(self.encoder.targets([text for entries in texts for text in entries]))
        columns: Columns = {"ids": [], **{name: [] for name in _COLUMNS}}
        for index, where, prompt, entries in zip(indices, places, prompts, texts, strict=True):
            for target in [next(targets) for _ in entries]:
                _append(columns, index, self._fitted(prompt, target, where))
        return columns

    def _fitted(self, prompt: Read, target: Ids, where: str) -> list[Encoded]:
        try:
            return self.encoder.fit(prompt, target, self.max_length, self.policy)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None


def asked_of(prompt: Prompted, record: dict[str, Any], source: str) -> Asked:
    """What is read of a record before its target. Raises DataError."""
    if isinstance(prompt, Template):
        return prompt.text(record, source)
    return prompt.dialogue(record, source)


def templates_of(split: str, data: DataKeys, chat: Chat | None) -> tuple[Prompted, Learnt]:
    """What makes a prompt and a target; valid and test may have their own, data.references."""
    if chat is not None and data.messages:
        return Conversation(data.messages, chat), LastTurn(data.messages)
    (prompt_key, prompt), (target_key, target) = template_keys(split, data)
    asked = parse_template(prompt, prompt_key)
    return asked if chat is None else Question(asked, chat), parse_template(target, target_key)


def template_keys(split: str, data: DataKeys) -> tuple[tuple[str, str], tuple[str, str]]:
    """The keys of run.yaml that hold a split's templates, prompt and target, each with its text."""
    if split != "train" and data.references is not None:
        return ("data.prompt", data.prompt), ("data.references", data.references)
    return ("data.prompt", data.prompt), ("data.target", data.target)


def tokenised(records: Records, recipe: Recipe, workers: int) -> Any:
    """The table (a `datasets.Dataset`) with the columns ids, prompt_length, fate and record."""
    import datasets

    if workers > 1:  # a process forked after the tokenizer's threads have run would warn, and run alone
        dist.set_default_environment(TOKENIZERS_PARALLELISM="false")
    features = {name: datasets.Value(kind) for name, kind in _COLUMNS.items()}
    try:
        with quiet_library(), telling_cache_errors(records.key):
            return records.table.map(
                recipe,
                fn_kwargs={"names": records.names},
                batched=True,
                with_indices=True,
                remove_columns=records.table.column_names,
                features=datasets.Features({"ids": datasets.List(datasets.Value("int32"))} | features),
                num_proc=workers if workers > 1 else None,
                new_fingerprint=fingerprint(records.table._fingerprint, recipe.fingerprint()),
                desc=f"Tokenising {records.key}",
            )
    except DataError as error:
        raise DataError(str(error)) from None  # without the traceback a worker process hangs on it


def _append(columns: Columns, index: int, examples: list[Encoded]) -> None:
    for example in examples:
        columns["ids"].append(example.ids)
        columns["prompt_length"].append(example.prompt_length)
        columns["fate"].append(int(example.fate))
        columns["record"].append(index)
