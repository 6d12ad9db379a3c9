"""Prompts to continue, with what people would have written: records encoded without their targets.

The ids are those that training put in front of a target, cut from the start in the same way when they are
too long.

Knows nothing of how text is generated or scored.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefix_ds.config import DataKeys
from prefix_ds.data.chat import chat_of
from prefix_ds.data.encode import Encoder, Policy, encoder_of
from prefix_ds.data.examples import check_id
from prefix_ds.data.source import Source, read_records
from prefix_ds.data.tokenise import templates_of
from prefix_ds.errors import DataError, is_unicode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One text to continue."""

    text: str
    ids: tuple[int, ...]
    references: tuple[str, ...]  # as the template made them; none if none were asked for
    record: dict[str, Any]  # all of its fields
    was_cut: bool


def read_prompts(
    source: Source, key: str, data: DataKeys, tokenizer: Any, max_tokens: int, *, references: bool
) -> list[Prompt]:
    """The prompts of a source's records, in order; `key` names it in messages (data.test, --input).

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
    for index, record in enumerate(records):
        where = records.place(index)
        text = prompt.text(record, where)
        wanted = tuple(target.texts(record, where)) if references else ()
        found.append(_prompt(encoder, text, wanted, record, max_tokens))
        _refuse_cut(found[-1], max_tokens, data.too_long, f"{where}: ")
    return found


def prompt_of_text(text: str, data: DataKeys, tokenizer: Any) -> Prompt:
    """A prompt that is given as it is, not through data.prompt; in a chat it is what a user says.

    Raises DataError.
    """
    if not is_unicode(text):
        raise DataError(f"{text!r}: not UTF-8")
    chat = chat_of(tokenizer, data)
    asked = text if chat is None else chat.asked(text, "the prompt")
    found = _prompt(encoder_of(tokenizer, chat), asked, (), {}, data.max_length)
    _refuse_cut(found, data.max_length, data.too_long)
    return found


def check_prompts(prompts: Sequence[Prompt], vocab_size: int) -> None:
    """Raises DataError for a token that the base has not."""
    check_id(max(max(prompt.ids) for prompt in prompts), vocab_size, "a prompt")


def tell_cut(prompts: Sequence[Prompt], max_tokens: int) -> None:
    """A warning, where some of them lost their start. Rank 0 calls this."""
    if count := sum(prompt.was_cut for prompt in prompts):
        log.warning(
            "%d of %d prompts have more than %d tokens and lost their start: raise data.max_length",
            count,
            len(prompts),
            max_tokens,
        )


def _refuse_cut(prompt: Prompt, max_tokens: int, too_long: Policy, where: str = "") -> None:
    if prompt.was_cut and too_long == "error":
        raise DataError(f"{where}the prompt is longer than {max_tokens} tokens, and data.too_long is error")


def _prompt(
    encoder: Encoder, text: str, references: tuple[str, ...], record: dict[str, Any], max_tokens: int
) -> Prompt:
    (ids,) = encoder.prompts([text])
    kept = encoder.cut_prompt(ids, max_tokens)
    if not kept:
        raise DataError(f"a prompt of {max_tokens} tokens at most has no room for any text")
    return Prompt(text, tuple(kept), references, record, was_cut=len(kept) < len(ids))
