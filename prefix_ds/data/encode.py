"""From texts to ids: where a prompt ends, where a target ends, and what happens when both are too long.

An example is prompt ids and then target ids. The prompt gets the special tokens the tokenizer puts in front
of a text (a bos), never those it puts behind ([SEP], </s>), since the text goes on; the target gets none of
its own but an eos, so that the model learns to stop. Prompt and target are tokenised apart: generation sees
the prompt alone, so the same ids must come out in training.

The first target token must be predicted from something. An empty prompt that yields no token becomes the
bos, or the eos where there is no bos (as GPT-2 was trained); each piece of a text that was split starts
in the same way.

A text that is too long loses its start, behind its special tokens; a conversation loses turns (`dialogue`).

Knows nothing of records, files and caches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from prefix_ds.data.chat import Chat
from prefix_ds.data.dialogue import Dialogue
from prefix_ds.errors import DataError

Policy = Literal["cut_prompt", "drop", "split", "error"]
Ids = list[int]
Asked = str | Dialogue


class Fate(IntEnum):
    """What became of an example."""

    WHOLE = 0
    CUT = 1  # its prompt lost tokens at the start
    DROPPED = 2
    PIECE = 3  # of a text that was split


@dataclass(frozen=True)
class Encoded:
    """One example as ids; `prompt_length` of them are read, the rest are predicted."""

    ids: Ids
    prompt_length: int
    fate: Fate


@dataclass(frozen=True)
class Read:
    """What is read before a target, and its ids."""

    asked: Asked
    ids: Ids

    @property
    def least(self) -> str:
        """What must be left of it, in words."""
        return "a prompt" if isinstance(self.asked, str) else "the system turn and the user's last"


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and what it puts around a text."""

    tokenizer: Any
    in_chat: bool  # a prompt is a conversation, whose text has all special tokens in it
    front: int  # special tokens in front of a text
    behind: int  # and behind
    start: int | None  # what an empty prompt becomes
    eos: int | None

    def prompts(self, asked: Sequence[Asked]) -> list[Read]:
        """Prompts and their ids, none without. Raises DataError where an empty one has no start token."""
        texts = [each if isinstance(each, str) else each.text for each in asked]
        whole = self._ids(texts, special=not self.in_chat)
        started = [self._started(ids[: len(ids) - self.behind]) for ids in whole]
        return [Read(*pair) for pair in zip(asked, started, strict=True)]

    def targets(self, texts: list[str]) -> list[Ids]:
        """Ids of targets, each with its eos if there is one."""
        end = [] if self.eos is None else [self.eos]
        return [ids + end for ids in self._ids(texts, special=False)]

    def fit(self, prompt: Read, target: Ids, max_length: int, policy: Policy) -> list[Encoded]:
        """The example within `max_length`: one, or the pieces of a split one.

        Raises DataError where it is too long and the policy has no way out, or nothing is to be learnt.
        """
        if not target:
            raise DataError("the target is empty and the tokenizer has no eos token: nothing is to be learnt")
        length = len(prompt.ids) + len(target)
        if length <= max_length:
            return [Encoded(prompt.ids + target, len(prompt.ids), Fate.WHOLE)]
        if policy == "drop":
            return [Encoded([], 0, Fate.DROPPED)]
        if policy == "split":
            return self._pieces(prompt.ids, target, max_length)
        if policy == "error":
            raise DataError(
                f"{length} tokens, more than data.max_length {max_length}; raise it, or set data.too_long: "
                "cut_prompt or drop"
            )
        cut = self.cut_prompt(prompt, max_length - len(target))
        if not cut:
            raise DataError(
                f"the target has {len(target)} tokens, which leaves no room for {prompt.least} in "
                f"data.max_length {max_length}; raise it, or set data.too_long: drop"
            )
        return [Encoded(cut + target, len(cut), Fate.CUT)]

    def cut_prompt(self, prompt: Read, room: int) -> Ids:
        """Its ids, or of a longer one those that fit into `room`; empty if that is too little.

        Of a text these are the special tokens in front and the last others.
        """
        ids = prompt.ids
        if len(ids) <= room:
            return ids
        if isinstance(prompt.asked, Dialogue):
            shorter = prompt.asked.shortened(lambda text: len(self._ids_in_chat(text)) <= room)
            return [] if shorter is None else self._ids_in_chat(shorter)
        if room < max(self.front, 1):
            return []
        return ids[: self.front] + ids[len(ids) - (room - self.front) :]

    def _pieces(self, start: Ids, target: Ids, max_length: int) -> list[Encoded]:
        width = max_length - len(start)
        if width < 1:
            raise DataError(f"data.max_length {max_length} leaves no room behind {len(start)} start tokens")
        cuts = range(0, len(target), width)
        return [Encoded(start + target[i : i + width], len(start), Fate.PIECE) for i in cuts]

    def _started(self, prompt: Ids) -> Ids:
        if prompt:
            return prompt
        if self.start is None:
            raise DataError(
                "data.prompt: an empty prompt, and the tokenizer has neither a bos nor an eos token to start "
                "from; put some text in the prompt"
            )
        return [self.start]

    def _ids_in_chat(self, text: str) -> Ids:
        return self._ids([text], special=False)[0]

    def _ids(self, texts: list[str], special: bool) -> list[Ids]:
        return _tokenised(self.tokenizer, texts, special)


def encoder_of(tokenizer: Any, chat: Chat | None) -> Encoder:
    """Learns by trying what a tokenizer puts around a text; in a chat, nothing."""
    front, behind = _around(tokenizer) if chat is None else (0, 0)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return Encoder(
        tokenizer=tokenizer,
        in_chat=chat is not None,
        front=front,
        behind=behind,
        start=_first(bos, eos),
        eos=eos,
    )


def _around(tokenizer: Any) -> tuple[int, int]:
    """Special tokens that it puts in front of a text, and behind."""
    (bare,), (whole,) = (_tokenised(tokenizer, ["a"], special) for special in (False, True))
    extra = len(whole) - len(bare)
    front = next((n for n in range(extra + 1) if bare and whole[n : n + len(bare)] == bare), extra)
    return front, extra - front


def _first(*ids: int | None) -> int | None:
    return next((i for i in ids if i is not None), None)


def _tokenised(tokenizer: Any, texts: list[str], special: bool) -> list[Ids]:
    if not texts:
        return []
    ids: list[Ids] = tokenizer(
        texts,
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about lengths: data.max_length is the limit
    )["input_ids"]
    return ids
