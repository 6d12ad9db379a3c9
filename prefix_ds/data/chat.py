"""A conversation as the base was taught to read one: in its tokenizer's chat template.

With data.chat, data.prompt is what the user says and data.target what the assistant answers; with
data.messages a field of the record holds a whole conversation, the last turn of which is learnt. Either way
the prompt is the conversation up to where the answer begins, special tokens included, and the answer ends
with the token that ends a turn, which is not every tokenizer's end of a text.

The template is a program (Jinja) that comes with the tokenizer; transformers runs it in a sandbox. Where it
writes the day's date, it writes one and the same day: what is trained on Monday is asked on Thursday.

Knows nothing of lengths and files.
"""

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from prefix_ds.config import DataKeys
from prefix_ds.data.dialogue import Dialogue, Turn
from prefix_ds.data.template import Template, field_of
from prefix_ds.errors import DataError, is_unicode

_MARK = "(content)"
_DAY = datetime.date(2026, 1, 1)
_TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>.*?)(?P=quote)\s*\)""")


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template, and what it is told (data.chat_options)."""

    tokenizer: Any
    options: Mapping[str, Any]

    def asked(self, content: str, source: str) -> Dialogue:
        """What a user says, as all that is read before the answer."""
        return self.dialogue([{"role": "user", "content": content}], source)

    def dialogue(self, turns: Sequence[Turn], source: str) -> Dialogue:
        """The turns that are read before an answer; `source` names their place in messages."""
        return Dialogue(turns, partial(self.written, source=source))

    def written(self, turns: Sequence[Turn], source: str, *, is_open: bool = True) -> str:
        """The turns as one text, and the beginning of an answer. Raises DataError where that cannot be."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(turns),
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=is_open,
                **self.options,
            )
        except Exception as error:  # Jinja's, the library's, or whatever the template itself raises
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"data.chat: {source}: the chat template cannot write it: {said}") from None
        return text

    @cached_property
    def _template(self) -> str:
        own: str = self.tokenizer.get_chat_template()
        return _TODAY.sub(lambda found: repr(_DAY.strftime(found["format"])), own)

    @cached_property
    def end_id(self) -> int | None:
        """The token that ends a turn of the assistant's; None where it is none of the special ones."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        behind = self.written(turns, "two turns", is_open=False).rpartition(_MARK)[2]
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        ids = self.tokenizer(behind, add_special_tokens=False).input_ids
        return next((token for token in ids if token in special), None)

    @property
    def rules(self) -> tuple[Any, ...]:
        """What its texts depend on, beside the turns."""
        return self._template, sorted(self.options.items())


def chat_of(tokenizer: Any, data: DataKeys) -> Chat | None:
    """How a run's records become conversations; None where they are none.

    Raises DataError for a tokenizer that has no chat template.
    """
    if not data.is_chat:
        return None
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("data.chat: the tokenizer has no chat template; take a base that was taught to chat")
    return Chat(tokenizer, data.chat_options)


def end_with_turns(tokenizer: Any, data: DataKeys) -> Any:
    """The tokenizer, the end token of which is from now on the one that ends a turn. Raises DataError."""
    chat = chat_of(tokenizer, data)
    if chat is not None and chat.end_id is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(chat.end_id)
    return tokenizer


@dataclass(frozen=True)
class Question:
    """data.prompt as a user's turn."""

    content: Template
    chat: Chat

    @property
    def key(self) -> str:
        """Where run.yaml has it."""
        return self.content.key

    def check(self, record: dict[str, Any], source: str) -> None:
        """As `Template.check`."""
        self.content.check(record, source)

    def dialogue(self, record: dict[str, Any], source: str) -> Dialogue:
        """What is read before the answer. Raises DataError."""
        return self.chat.asked(self.content.text(record, source), source)

    @property
    def rules(self) -> tuple[Any, ...]:
        """What its texts depend on, beside the record."""
        return self.content.rules, self.chat.rules


@dataclass(frozen=True)
class _Messages:
    """A field that holds a whole conversation, the last turn of which is the assistant's."""

    field: str
    key = "data.messages"  # where run.yaml has it

    def check(self, record: dict[str, Any], source: str) -> None:
        """As `Template.check`."""
        field_of(record, self.field, self.key, source)

    def turns(self, record: dict[str, Any], source: str) -> list[dict[str, Any]]:
        """A text each. Raises DataError."""
        turns, where = field_of(record, self.field, self.key, source), self._place(source)
        if not isinstance(turns, list) or not turns:
            raise DataError(f"{where}: expected a list of turns")
        for number, turn in enumerate(turns, start=1):
            texts = [turn.get(name) for name in ("role", "content")] if isinstance(turn, dict) else [None]
            if not all(isinstance(text, str) and is_unicode(text) for text in texts):
                raise DataError(f"{where}: turn {number}: expected an object with texts `role` and `content`")
        return turns

    def _place(self, source: str) -> str:
        return f"{self.key}: {source}: the field {self.field!r}"


@dataclass(frozen=True)
class Conversation(_Messages):
    """What is read before an answer: all turns, but for one of the assistant's at the end."""

    chat: Chat

    def dialogue(self, record: dict[str, Any], source: str) -> Dialogue:
        """These turns. Raises DataError."""
        turns = self.turns(record, source)
        asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        if not asked:
            raise DataError(f"{self._place(source)}: expected a turn before the assistant's")
        return self.chat.dialogue(asked, source)

    @property
    def rules(self) -> tuple[Any, ...]:
        """What its texts depend on, beside the record."""
        return self.field, self.chat.rules


@dataclass(frozen=True)
class LastTurn(_Messages):
    """The last turn's text."""

    def texts(self, record: dict[str, Any], source: str) -> list[str]:
        """What is learnt. Raises DataError."""
        last = self.turns(record, source)[-1]
        if last["role"] != "assistant":
            raise DataError(
                f"{self._place(source)}: the last turn is of {last['role']!r}; expected 'assistant', to learn"
            )
        return [last["content"]]

    @property
    def rules(self) -> tuple[Any, ...]:
        """What its texts depend on, beside the record."""
        return (self.field,)
