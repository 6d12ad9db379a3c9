"""The card of an exported prefix: where it comes from, what it scores, how to load it.

A README.md with the header that the Hugging Face hub reads. Everything in it is a fact of the run; what the
run does not know (the licence, what the prefix is good for) is left to whoever publishes it. What looks like
a secret is masked, wherever it stands.

Knows nothing of tensors.
"""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from prefix_ds.checkpoint import PrefixFacts
from prefix_ds.config import DataKeys, GenerateKeys, RunConfig, TrainKeys
from prefix_ds.tracking import masked, told_of, without_secrets
from prefix_ds.verdicts import Verdict, front_of

_OF = {"": "the trained prefix", "bare": "the bare base", "instruction": "the instruction alone"}
_TRAIN_KEYS = ("global_batch_size", "lr", "warmup_steps", "schedule", "weight_decay", "clip_norm", "seed")
_IMPORTED = {
    "model": ("tokenizer", "trust_remote_code", "dtype"),
    "data": ("chat_options", "max_length"),
    "generate": ("max_new_tokens", "num_beams", "temperature", "top_p"),
}
_DEFAULT = RunConfig.model_construct()
_SCORE_HEAD = ("of", "split", "records", "score", "value")


@dataclass(frozen=True)
class Part:
    """A run whose prefix is exported: its configuration, the facts of its prefix, its evaluations by name."""

    config: RunConfig
    facts: PrefixFacts
    length: int
    evaluations: Mapping[str, Verdict]


def card(parts: Iterable[Part], end_of_turn: str | None = None, note: str = "") -> str:
    """The text of the card. `note` says what is special about this prefix.

    `end_of_turn` is the token that ends an answer; None: the tokenizer's own.
    """
    first, *others = parts = list(map(_publishable, parts))
    config, facts = first.config, first.facts
    sections = [
        _header(facts),
        "# A prefix for " + facts.base,
        f"{sum(p.length for p in parts)} trained keys and values in front of the text, in every attention "
        f"layer of a frozen base, made with prefix-ds {facts.version}.",
        *([note[0].upper() + note[1:] + "."] if note else []),
        *(_part(part, f" {number}" if others else "") for number, part in enumerate(parts, start=1)),
        _loading(config, facts, end_of_turn),
        "## Licence\n\nNot stated. The base and the data have licences of their own; state yours here and in "
        "the header (`license:`).",
    ]
    return masked("\n\n".join(sections) + "\n", config.mlflow.uri, is_template=True)


def _publishable(part: Part) -> Part:
    """With what a card tells masked value by value: in its text nobody knows a template from a secret."""
    sections = {name: getattr(part.config, name) for name in ("model", "prefix", "data")}
    told = without_secrets({name: keys.model_dump() for name, keys in sections.items()})
    clean = {name: keys.model_copy(update=told[name]) for name, keys in sections.items()}
    return replace(part, config=part.config.model_copy(update=clean))


def _header(facts: PrefixFacts) -> str:
    lines = ["library_name: peft", "pipeline_tag: text-generation", "tags: [prefix-tuning, prefix-ds]"]
    return "\n".join(["---", f"base_model: {json.dumps(facts.base)}", *lines, "---"])


def _part(part: Part, number: str) -> str:
    text = f"## Where it comes from{number}\n\n{_table(('', ''), _origin(part))}"
    scores = list(_score_rows(part.evaluations))
    if scores:
        read = "\n".join(map(_reading, *zip(*_in_order(part.evaluations), strict=True)))
        text += f"\n\n## Scores{number}\n\n{_table(_SCORE_HEAD, scores)}\n\n{read}"
    return text


def _origin(part: Part) -> list[tuple[str, str]]:
    facts = part.facts
    rows = [
        ("base", facts.base),
        ("revision", facts.revision or "not named"),
        ("family", facts.model_type),
        ("positions", str(part.length)),
    ]
    is_known = facts.step or facts.valid_loss is not None  # step 0: the best was the text it began with
    return rows + (_training(part) if is_known else [("training", "not known: it was imported")])


def _training(part: Part) -> list[tuple[str, str]]:
    config, facts, train = part.config, part.facts, part.config.train
    starts = {
        "text": f"the keys and values of `{_line(config.prefix.text)}`",
        "vocabulary": "the keys and values of tokens drawn from the vocabulary",
        "random": "noise",
    }
    rows = [
        ("base in training", f"{config.model.dtype}, {config.model.bits} bits"),
        ("started from", starts[config.prefix.init]),
        ("training data", _source(config.data.train)),
        ("validation data", _source(config.data.valid)),
        ("prompt", f"`{_line(config.data.prompt)}`"),
        ("target", f"`{_line(config.data.target)}`"),
        ("longest example", f"{config.data.max_length} tokens"),
        ("steps", str(facts.step)),
        *((name, str(getattr(train, name))) for name in _TRAIN_KEYS),
    ]
    if facts.valid_loss is not None:
        rows.append(("validation loss", f"{facts.valid_loss:.4f} nats a target token"))
    return rows


def _source(source: str | list[str] | None) -> str:
    return ", ".join([source] if isinstance(source, str) else source or ["none"])


def _line(text: str | None) -> str:
    """A template on one line of a table."""
    return json.dumps(text or "", ensure_ascii=False)[1:-1].replace("`", "'")


def _in_order(evaluations: Mapping[str, Verdict]) -> list[tuple[str, Verdict]]:
    """The prefix's own before those of the base without it."""
    return sorted(evaluations.items(), key=lambda item: (front_of(item[0]) != "", item[0]))


def _reading(name: str, found: Verdict) -> str:
    """What an evaluation read, how its outputs were written and how they were scored."""
    told, front = told_of(found), front_of(name)
    facts = [f"data {told.data or 'not known'}"]
    facts += [f"with `{key}={_line(text)}`, not the run's own" for key, text in told.changed.items()]
    facts += [f"outputs with {told.generate}"] if told.generate else []
    ways: dict[str, list[str]] = {}
    for score, signature in found.signatures.items():
        ways.setdefault(signature, []).append(score)
    facts += [f"{', '.join(scores)}: `{signature}`" for signature, scores in ways.items()]
    return f"- {_OF.get(front, front)}, {found.split}: {'; '.join(facts)}"


def _score_rows(evaluations: Mapping[str, Verdict]) -> Iterator[tuple[str, ...]]:
    for name, found in _in_order(evaluations):
        front = front_of(name)
        place = _OF.get(front, front), found.split, str(found.records)
        yield (*place, "loss", f"{found.loss:.4f}")
        yield (*place, "perplexity", f"{found.perplexity:.4f}")
        for score, told in found.scores.items():
            span = "" if told.low is None else f" ({told.low:.4f} to {told.high:.4f})"
            yield (*place, score, f"{told.value:.4f}{span}")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _loading(config: RunConfig, facts: PrefixFacts, end_of_turn: str | None) -> str:
    revision = f", revision={json.dumps(facts.revision)}" if facts.revision else ""
    window = f"\n\nBeware: {lost_behind(facts.window)}." if facts.window else ""
    tokenizer = json.dumps(config.model.tokenizer or facts.base)
    trust = ", trust_remote_code=True" if config.model.trust_remote_code else ""
    end = "tokenizer.eos_token_id"
    if end_of_turn:
        end = f"tokenizer.convert_tokens_to_ids({json.dumps(end_of_turn)})"
    return f'''## How to load it

With PEFT (`pip install peft`), in this folder:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

base, adapter = {json.dumps(facts.base)}, "."
tokenizer = AutoTokenizer.from_pretrained({tokenizer}{revision if not config.model.tokenizer else ""}{trust})
model = AutoModelForCausalLM.from_pretrained(base{revision}{trust}, dtype="{config.model.dtype}")
end = {end}
model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)  # and none of the base's own
model = PeftModel.from_pretrained(model, adapter).eval()

{_asking(config.data)}
output = model.generate(**ids, {_writing(config.generate)})
text = tokenizer.decode(output[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
print(text)
```

With prefix-ds: `{_importing(config)}`, then `prefix-ds generate RUN --prompt TEXT`.{window}'''


def _importing(config: RunConfig) -> str:
    """With the keys without which a prompt would be read, or an answer written, in another way; an adapter
    does not hold them."""
    data, tokens = config.data, TrainKeys().micro_batch_tokens
    told: dict[str, object] = {"data.chat": True} if data.is_chat else {}
    for section, names in _IMPORTED.items():
        keys, default = getattr(config, section), getattr(_DEFAULT, section)
        told |= {
            f"{section}.{name}": getattr(keys, name)
            for name in names
            if getattr(keys, name) != getattr(default, name)
        }
    told |= {"train.micro_batch_tokens": data.max_length} if data.max_length > tokens else {}  # one must fit
    texts = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in told.values()]
    words = map("=".join, zip(told, texts, strict=True))
    return shlex.join(["prefix-ds", "import", "THIS_FOLDER", "RUN", *words])


def _writing(keys: GenerateKeys) -> str:
    """How `generate` writes, in transformers' words, whose own top_k would be 50."""
    told: dict[str, object] = {"max_new_tokens": keys.max_new_tokens}
    told |= {"num_beams": keys.num_beams} if keys.num_beams > 1 else {}
    told |= {"do_sample": keys.temperature > 0}
    told |= {"temperature": keys.temperature, "top_p": keys.top_p, "top_k": 0} if keys.temperature else {}
    return ", ".join(f"{name}={value!r}" for name, value in told.items())


def lost_behind(window: int) -> str:
    """What becomes of a prefix in PEFT on a base with sliding windows."""
    return (
        f"some layers of this base attend within {window} tokens: there PEFT loses the prefix once it and "
        "the text are longer, and prefix-ds does not"
    )


def _asking(data: DataKeys) -> str:
    """Two lines of code that make ids of a prompt."""
    prompt = json.dumps(data.prompt or "...", ensure_ascii=False)
    if not data.is_chat:
        return (
            f"prompt = {prompt}  # with a record's fields in their places\n"
            'ids = tokenizer(prompt, return_tensors="pt")'
        )
    told = "".join(f", {name}={value!r}" for name, value in data.chat_options.items())
    return (
        f'turns = [{{"role": "user", "content": {prompt}}}]  # with a record\'s fields in their places\n'
        "ids = tokenizer.apply_chat_template(\n"
        f'    turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"{told}\n'
        ")"
    )
