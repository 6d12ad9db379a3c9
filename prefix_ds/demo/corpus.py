"""The demo's texts, made by a small seeded grammar: nothing is downloaded, and every machine makes the same.

A record of an animal in a shelter is told in a style. A style has sides with a name, which a sentence of an
instruction can ask for (who speaks, how it opens, what comes first, how it closes), and wordings that no
sentence asks for. The pretraining text has every side and every wording in documents that name two sides or
none. The task is one style in full, and its sides never occur together in the pretraining text: an
instruction can say two of them, a prefix or other weights can say it all.

Knows nothing of models or training.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product


def _listed(text: str) -> list[str]:
    return text.split(", ")


NAMES = _listed(
    "Ada, Alma, Anton, Arlo, Basil, Bea, Bruno, Cleo, Daisy, Dora, Emil, Felix, Flora, Gus, Hanna, Hugo, "
    "Ida, Iris, Juno, Kira, Lars, Lola, Milo, Mina, Noa, Oscar, Otto, Pia, Rosa, Selma, Tilda, Zora"
)
ANIMALS = _listed("cat, dog, goat, hen, horse, rabbit, sheep, pony, parrot, pig")
COLOURS = _listed("black, white, brown, grey, golden, red, spotted, striped")
WISHES = _listed(
    "a warm stove, a long walk, fresh hay, a quiet garden, a bowl of milk, a red ball, an old sofa, "
    "a sunny window, ripe apples, soft music, a tall tree, a kind child"
)
PLACES = _listed(
    "Bergen, Cork, Dover, Ghent, Graz, Leeds, Linz, Lyon, Oslo, Parma, Porto, Riga, Siena, Split, Turin, York"
)

Sides = tuple[str, ...]
SIDES: tuple[dict[str, str], ...] = (  # the values of each side, and the sentence that asks for one
    {"animal": "Speak as the animal.", "keeper": "Speak about the animal."},
    {"greeting": "Begin with a greeting.", "tale": "Begin like a tale.", "news": "Begin like the news."},
    {"wish": "Tell the wish first.", "home": "Tell the home first."},
    {"question": "End with a question.", "thanks": "End with thanks.", "farewell": "End with a farewell."},
)
WORDINGS = (("dream of", "long for", "hope for"), ("live in", "stay in", "wait in"))
OPENINGS = {"greeting": "Hello, dear people!", "tale": "Once upon a time:", "news": "News from the shelter:"}

NUM_DOCUMENTS = {"pretrain": 8_000, "train": 600, "valid": 100, "test": 24}


@dataclass(frozen=True)
class Record:
    """An animal that looks for a home."""

    name: str
    animal: str
    colour: str
    wish: str
    place: str

    def line(self) -> str:
        """The record as documents and prompts show it."""
        return " | ".join(f"{field}: {value}" for field, value in asdict(self).items())


@dataclass(frozen=True)
class Style:
    """How a record is told."""

    sides: Sides
    wordings: tuple[str, ...]


TASK = Style(("animal", "greeting", "wish", "question"), ("long for", "wait in"))
_PRETRAINED_SIDES: tuple[Sides, ...] = tuple(sides for sides in product(*SIDES) if sides != TASK.sides)


def corpus_files(seed: int = 0) -> dict[str, str]:
    """The corpus as JSON lines: the name and the text of a file a split."""
    return {f"{split}.jsonl": _lines(rows) for split, rows in corpus(seed).items()}


def corpus(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """The rows of each split: `text` for pretraining, `record` and `text` for the task.

    No record is in two splits, or twice in one.
    """
    dice = random.Random(seed)
    records = iter(_different_records(sum(NUM_DOCUMENTS.values()), dice))
    rows: dict[str, list[dict[str, str]]] = {}
    for split, count in NUM_DOCUMENTS.items():
        drawn = [next(records) for _ in range(count)]
        if split == "pretrain":
            rows[split] = [{"text": _document(record, dice)} for record in drawn]
        else:
            rows[split] = [{"record": r.line(), "text": told(r, TASK)} for r in drawn]
    return rows


def told(record: Record, style: Style) -> str:
    """The record as a text in a style."""
    speaker, opening, first, closing = style.sides
    longing, living = style.wordings
    who, whom = ("I", "me") if speaker == "animal" else (record.name, record.name)
    being = f"I am {record.name}," if speaker == "animal" else f"{record.name} is"
    facts = [_said(who, longing, record.wish), _said(who, living, record.place)]
    endings = {
        "question": f"Will you come to {record.place} and meet {whom}?",
        "thanks": f"Thank you for reading about {whom}.",
        "farewell": f"Goodbye from {record.name}!",
    }
    sentences = [
        OPENINGS[opening],
        f"{being} a {record.colour} {record.animal}.",
        *(facts if first == "wish" else reversed(facts)),
        endings[closing],
    ]
    return " ".join(sentences)


def _said(who: str, words: str, what: str) -> str:
    verb, rest = words.split()
    return f"{who} {verb}{'' if who == 'I' else 's'} {rest} {what}."


def _document(record: Record, dice: random.Random) -> str:
    """A document of the pretraining text: in three of four cases an instruction, the record, its text."""
    style = Style(dice.choice(_PRETRAINED_SIDES), tuple(dice.choice(words) for words in WORDINGS))
    named = dice.sample(range(len(SIDES)), dice.choice((0, 2, 2, 2)))
    instruction = " ".join(SIDES[side][style.sides[side]] for side in named)
    return "\n".join([instruction] * bool(named) + [record.line(), told(record, style)])


def _different_records(count: int, dice: random.Random) -> list[Record]:
    fields = (NAMES, ANIMALS, COLOURS, WISHES, PLACES)
    drawn: dict[Record, None] = {}  # a set that keeps the order
    while len(drawn) < count:
        drawn[Record(*map(dice.choice, fields))] = None
    return list(drawn)


def _lines(rows: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
