"""Prompts to continue, with what people would have written: records encoded without their targets.

The ids are those that training put in front of a target, cut in the same way when they are too long.

Knows nothing of how text is generated or scored.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prefix_ds.config import DataKeys
from prefix_ds.data.chat import chat_of
from prefix_ds.data.encode import Asked, Encoder, Policy, encoder_of
from prefix_ds.data.source import Source, read_records
from prefix_ds.data.tokenise import asked_of, templates_of
from prefix_ds.errors import DataError, is_unicode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One text to continue."""

    text: str
    ids: tuple[int, ...]
    was_cut: bool
    references: tuple[str, ...] = ()  # as the template made them; none if none were asked for
    record: dict[str, Any] = field(default_factory=dict)  # all of its fields


def read_prompts(
    source: Source,
    key: str,
    data: DataKeys,
    tokenizer: Any,
    max_tokens: int,
    *,
    references: bool,
    choose: Callable[[int], Iterable[int]] = range,
) -> list[Prompt]:
    """The prompts of a source's records, in order; `key` names it in messages (data.test, --input).

    `choose` gives the numbers of the records that are wanted, out of so many.

    `max_tokens` bounds a prompt's ids: a longer one loses its start, or is a DataError if data.too_long is
    error. With `references` the records must hold what data.references (or data.target) needs. Raises
    DataError as `read_records` and the templates do. Makes no collective call: of a node's ranks let the
    first go first.
    """
    records = read_records(source, key)
    chat = chat_of(tokenizer, data)
    prompt, target = templates_of("train" if key == "data.train" else "test", data, chat)
    prompt.check(records[0], records.place(0))
    encoder = encoder_of(tokenizer, chat)
    found = []
    for index in choose(len(records)):
        record, where = records[index], records.place(index)
        asked, name = asked_of(prompt, record, where), f"{where}: the prompt"
        read = _prompt(encoder, asked, max_tokens, data.too_long, name)
        wanted = tuple(target.texts(record, where)) if references else ()
        found.append(replace(read, references=wanted, record=record))
    return found


def prompt_of_text(text: str, data: DataKeys, tokenizer: Any) -> Prompt:
    """A prompt that is given as it is, not through data.prompt; in a chat it is what a user says.

    Raises DataError.
    """
    if not is_unicode(text):
        raise DataError(f"{text!r}: not UTF-8")
    chat = chat_of(tokenizer, data)
    asked = text if chat is None else chat.asked(text, "the prompt")
    return _prompt(encoder_of(tokenizer, chat), asked, data.max_length, data.too_long, "the prompt")


def tell_cut(prompts: Sequence[Prompt], max_tokens: int) -> None:
    """A warning, where some of them lost their start. Rank 0 calls this."""
    if count := sum(prompt.was_cut for prompt in prompts):
        log.warning(
            "%d of %d prompts have more than %d tokens and lost their start: raise data.max_length",
            count,
            len(prompts),
            max_tokens,
        )


def _prompt(encoder: Encoder, asked: Asked, max_tokens: int, too_long: Policy, where: str) -> Prompt:
    (read,) = encoder.prompts([asked])
    was_cut = len(read.ids) > max_tokens
    if was_cut and too_long == "error":
        raise DataError(f"{where} is longer than {max_tokens} tokens, and data.too_long is error")
    kept = encoder.cut_prompt(read, max_tokens)
    if not kept:
        raise DataError(f"{where}: {max_tokens} tokens have no room for {read.least}; raise data.max_length")
    text = asked if isinstance(asked, str) else asked.text
    return Prompt(text, tuple(kept), was_cut=was_cut)
