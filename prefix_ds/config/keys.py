"""Every knob of a run on one page.

A run is described by one YAML file with the sections below. Each key has a type, a default and one line that
says what it does; `prefix-ds config` prints this page. A key marked `free` may change when a run goes on from
its checkpoint: it says how the work is done or shown, not what comes out.

Knows nothing of tensors, clusters or files; imports no torch.
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

Recompute = bool | int | Literal["auto"]
Task = Literal["summarization", "translation", "question_answering", "data_to_text", "generation"]
# What numbers are less than: torch takes seeds of 64 bits, and a rate of 1e30 is still a number of 32.
_SEEDS, _MOST = 2**63, {int: 2**31, float: 1e30}
_LEAST_TEMPERATURE = 1e-6

ScoreName = Literal["rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact_match", "f1"]


def key(default: Any, doc: str, *, free: bool = False, **bounds: Any) -> Any:
    """A field with its one line of documentation; `free` ones may differ when a run goes on."""
    return Field(default, description=doc, json_schema_extra={"free": free}, **bounds)


class Section(BaseModel):
    """A frozen group of keys; an unknown one is an error, and so is a number that no run is made of."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes it for 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and bool not in kinds and {int, float} & kinds:
            raise PydanticKnownError("float_type" if float in kinds else "int_type")
        return value

    @field_validator("*")
    @classmethod
    def _numbers_are_below(cls, value: Any, info: ValidationInfo) -> Any:
        """What is larger is a slip of the hand, and sizes made of it overflow."""
        most = _SEEDS if info.field_name == "seed" else _MOST.get(type(value))
        if most is not None and value >= most:
            raise PydanticCustomError("most", "expected less than {most}", {"most": most})
        return value

    @field_validator("*")
    @classmethod
    def _texts_have_no_nul(cls, value: Any) -> Any:
        """No file can have such a name, and whoever opens it says so with a traceback."""
        if any("\0" in text for text in _texts(value)):
            raise PydanticCustomError("nul", "a text cannot hold the character NUL")
        return value


def _names_no_home(value: str | None) -> str | None:
    """A home is another folder on each machine that a run moves to."""
    if value is not None and value.startswith("~"):
        raise PydanticCustomError("home", "a home folder differs by machine; write the whole path, without ~")
    return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


class ModelKeys(Section):
    """The frozen base."""

    name: str | None = key(None, "hub id or folder of the base; required unless train.method is pretrain")
    revision: str | None = key(None, "branch, tag or commit of a hub id")
    tokenizer: str | None = key(None, "hub id or folder of the tokenizer, when it is not the base's own")
    config: dict[str, Any] = key({}, "pretrain: the architecture (model_type and its sizes)")
    dtype: Literal["bfloat16", "float32"] = key("bfloat16", "number format of the base's weights")
    bits: Literal[16, 8] = key(16, "8: linear layers as int8 and a scale a row; 16: all as model.dtype")
    vocabulary_bits: Literal[16, 8] = key(
        16, "the same for embeddings and output layer; 8 needs model.bits: 8"
    )
    in_16_bits: list[str] = key([], "with bits 8: layers left in 16 bits, by the ends of their names")
    int8_outliers: float | None = key(
        None,
        "with bits 8: inputs of linear layers are int8 too, but for columns that reach this (6.0 is usual)",
        gt=0,
    )
    recompute: Recompute = key(
        False,
        "compute activations again in the backward pass: true: of all layers; N: of the lowest N; auto: of "
        "as few as fit",
        free=True,
    )
    attention: Literal["auto", "sdpa", "eager"] = key(
        "auto", "attention the prefix is put in front of; auto takes the model's own", free=True
    )
    trust_remote_code: bool = key(False, "run Python code that comes with the base")

    _places = field_validator("name", "tokenizer")(_names_no_home)

    @field_validator("recompute", mode="before")
    @classmethod
    def _recompute_is_one_of(cls, value: Any) -> Any:
        """Told in one line, instead of one for each type that it can have."""
        if value == "auto" or isinstance(value, bool) or (isinstance(value, int) and value > 0):
            return value
        raise PydanticCustomError("recompute", "expected true, false, a number of layers, or auto")


class PrefixKeys(Section):
    """The trained keys and values."""

    length: int | None = key(None, "positions; empty takes the length of prefix.text", ge=1, le=2**20)
    init: Literal["text", "vocabulary", "random"] = key(
        "text",
        "start from the keys and values of prefix.text, of tokens from the vocabulary, or from noise",
    )
    text: str | None = key(
        None, "the instruction to start from, needed with init text; repeated up to prefix.length"
    )
    init_std: float | None = key(
        None,
        "standard deviation of a random start; null: in each layer that of keys and values of the vocabulary",
        gt=0,
    )
    reparam_dim: int = key(
        0, "width of the tanh MLP of Li & Liang (2021) the prefix is trained through; 0 for none", ge=0
    )
    layers: Literal["all"] | list[int] = key(
        "all", "attention layers that get a prefix, counted from 0; -1 is the last"
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_are_all_or_some(cls, value: Any) -> Any:
        """Told in one line, as of `recompute`."""
        if value == "all" or (isinstance(value, list) and all(type(layer) is int for layer in value)):
            return value
        raise PydanticCustomError("layers", "expected all, or a list of whole numbers")


class DataKeys(Section):
    """Records, and how they become text."""

    task: Task | None = key(
        None, "sets templates, lengths and scores that the run file leaves out (docs/tasks.md)", free=True
    )
    train: str | list[str] | None = key(
        None, "required: files (.jsonl .csv .parquet .txt, globs) or a hub id, as ORG/NAME?split=train"
    )
    valid: str | list[str] | None = key(None, "files or a hub id, for validation")
    test: str | list[str] | None = key(None, "files or a hub id, for the final scores", free=True)
    prompt: str = key("", "what the model reads; {field} is replaced by the record's field")
    target: str = key(
        "{text}", "what it learns to write; a field that holds a list makes one example an entry"
    )
    references: str | None = key(None, "target template of valid and test, where it differs from data.target")
    chat: bool = key(
        False, "prompt and target are what a user says and an assistant answers, in the base's chat template"
    )
    messages: str | None = key(
        None,
        "in place of prompt and target: the field with a chat, the last turn of which is learnt",
        min_length=1,
    )
    chat_options: dict[str, Any] = key({}, "what the chat template is told, as {enable_thinking: false}")
    max_length: int = key(1024, "tokens of prompt and target together, the prefix not counted", ge=2)
    too_long: Literal["cut_prompt", "drop", "split", "error"] = key(
        "cut_prompt",
        "longer examples: cut the prompt's start (a chat's oldest turns), drop, split (plain text), or stop",
    )
    packing: bool = key(True, "several examples in one row, which do not see each other", free=True)
    workers: int = key(1, "processes that tokenise", ge=1, free=True)

    @field_validator("train", "valid", "test", mode="before")
    @classmethod
    def _sources_are_texts(cls, value: Any) -> Any:
        """Told in one line, as of `recompute`."""
        names = value if isinstance(value, list) else [] if value is None else [value]
        if all(isinstance(name, str) for name in names):
            return value
        raise PydanticCustomError("source", "expected a file, a glob or a hub id, or a list of files")

    @property
    def is_chat(self) -> bool:
        """Whether texts are written in a chat template."""
        return self.chat or self.messages is not None


class TrainKeys(Section):
    """What is trained, how long and how fast."""

    method: Literal["prefix", "full", "pretrain"] = key(
        "prefix", "the prefix; all weights; or a new base from scratch"
    )
    epochs: float = key(5.0, "passes over the training examples", gt=0)
    max_steps: int | None = key(None, "optimizer steps, instead of train.epochs", ge=0)
    global_batch_size: int = key(64, "examples in one optimizer step, over all ranks", ge=1)
    micro_batch_tokens: int = key(8192, "tokens one rank runs at once", ge=1, free=True)
    lr: float = key(
        1e-2, "peak learning rate; left out, it is 1e-5 for method full, and 1e-3 for pretrain", ge=0
    )
    warmup_steps: int = key(0, "steps from 0 to train.lr; no more than the run has", ge=0)
    schedule: Literal["cosine", "linear", "constant"] = key(
        "cosine", "what the learning rate does after the warmup"
    )
    weight_decay: float = key(0.0, "decoupled weight decay (AdamW)", ge=0)
    betas: tuple[float, float] = key((0.9, 0.999), "AdamW's two decay rates")
    clip_norm: float = key(1.0, "largest norm of the gradient; 0 does not clip", ge=0)
    seed: int = key(0, "order of the examples and random starts", ge=0)

    @field_validator("betas")
    @classmethod
    def _betas_are_rates(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if all(0 <= beta < 1 for beta in betas):
            return betas
        raise PydanticCustomError("betas", "expected two numbers, from 0 and below 1")


class EngineKeys(Section):
    """How the base is spread over the devices."""

    deepspeed: str = key("zero3", "a preset of ds_configs/, or the path of a DeepSpeed file", free=True)
    nvme_folder: str | None = key(
        None, "a folder on a disk of each host, for presets that keep the base there", free=True
    )

    _places = field_validator("nvme_folder")(_names_no_home)


class RunKeys(Section):
    """Where the run lives, and its cadences in steps (0: never)."""

    folder: str = key("runs/default", "the run folder", free=True, min_length=1)
    log_every: int = key(10, "steps between two lines of metrics", ge=1, free=True)
    valid_every: int = key(100, "steps between two validations; the last step always has one", ge=0)
    save_every: int = key(100, "steps between two checkpoints; the last step always has one", ge=0, free=True)
    keep: int = key(2, "checkpoints kept", ge=1, free=True)

    _places = field_validator("folder")(_names_no_home)


class MlflowKeys(Section):
    """Where the metrics are mirrored to."""

    uri: str | None = key(
        "sqlite:///mlflow.db", "tracking server or database; empty: metrics.jsonl only", free=True
    )
    experiment: str = key("prefix-ds", "experiment the run belongs to", free=True)
    name: str | None = key(None, "name of the run; empty: that of the run folder", free=True)
    tags: dict[str, str] = key({}, "tags of the run", free=True)


class GenerateKeys(Section):
    """How text is written with a trained prefix."""

    max_new_tokens: int = key(128, "longest output, in tokens", ge=1, free=True)
    num_beams: int = key(
        1,
        "beams; 1 is greedy or sampled, and only then is what is sampled the same in any batch",
        ge=1,
        free=True,
    )
    temperature: float = key(0.0, "0 takes the likeliest token; above, tokens are sampled", ge=0, free=True)
    top_p: float = key(
        1.0, "sample from the likeliest tokens of this total probability", gt=0, le=1, free=True
    )
    seed: int = key(0, "random numbers of sampled outputs", ge=0, free=True)
    batch_size: int = key(8, "prompts a rank continues at once; fewer where memory is short", ge=1, free=True)
    gather: Literal["auto", "once", "each_layer"] = key(
        "auto", "once: the whole base on each rank while it writes; auto: where it fits", free=True
    )

    @field_validator("temperature")
    @classmethod
    def _scores_can_be_divided_by_it(cls, temperature: float) -> float:
        if temperature == 0 or temperature >= _LEAST_TEMPERATURE:
            return temperature
        raise PydanticCustomError("least", "expected 0, or at least {least}", {"least": _LEAST_TEMPERATURE})


class EvaluateKeys(Section):
    """How outputs are scored, by `prefix-ds evaluate` and while training."""

    scores: list[Literal["rouge", ScoreName]] | None = key(
        None,
        "scores of outputs, rouge being three of them; null: those of data.task, else none; []: none",
        free=True,
    )
    every: int = key(0, "steps between two evaluations while training, by these scores; 0: none", ge=0)
    sample: int = key(64, "records of data.valid they write for, drawn with train.seed", ge=1)
    best_by: Literal["loss", ScoreName] = key(
        "loss", "what the best prefix is best by: validation loss, or a score of evaluate.every"
    )

    @field_validator("scores", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        """`evaluate.scores=rouge,bleu` is what one types."""
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


class RunConfig(Section):
    """A whole run: the sections of run.yaml."""

    model: ModelKeys = ModelKeys()
    prefix: PrefixKeys = PrefixKeys()
    data: DataKeys = DataKeys()
    train: TrainKeys = TrainKeys()
    engine: EngineKeys = EngineKeys()
    run: RunKeys = RunKeys()
    mlflow: MlflowKeys = MlflowKeys()
    generate: GenerateKeys = GenerateKeys()
    evaluate: EvaluateKeys = EvaluateKeys()

    @model_validator(mode="after")
    def _base_is_named(self) -> "RunConfig":
        scratch = self.train.method == "pretrain"
        if scratch and self.model.name:
            raise ValueError(
                "model.name: a pretrained base is made from model.config; leave model.name empty"
            )
        if scratch and "model_type" not in self.model.config:
            raise ValueError("model.config: pretrain needs a model_type (say llama) and its sizes")
        if not scratch and not self.model.name:
            raise ValueError("model.name: missing; name a folder or a hub id")
        return self

    @model_validator(mode="after")
    def _bits_go_together(self) -> "RunConfig":
        if self.model.bits == 8 and self.train.method != "prefix":
            raise ValueError(
                f"model.bits: 8 is for a frozen base; train.method {self.train.method} trains it"
            )
        if self.model.vocabulary_bits == 8 and self.model.bits != 8:
            raise ValueError("model.vocabulary_bits: 8 needs model.bits: 8")
        if self.model.in_16_bits and self.model.bits != 8:
            raise ValueError("model.in_16_bits: all layers are in 16 bits; it goes with model.bits: 8")
        if self.model.int8_outliers is not None and self.model.bits != 8:
            raise ValueError("model.int8_outliers: needs model.bits: 8")
        return self

    @model_validator(mode="after")
    def _prefix_can_start(self) -> "RunConfig":
        if self.train.method != "prefix":
            return self
        if self.prefix.init == "text" and not self.prefix.text:
            raise ValueError(
                "prefix.text: missing; write the instruction to start from, or set prefix.init: vocabulary"
            )
        if self.prefix.init != "text" and self.prefix.length is None:
            raise ValueError(
                f"prefix.length: missing; prefix.init: {self.prefix.init} has no text to take its length from"
            )
        return self

    @model_validator(mode="after")
    def _data_can_be_read(self) -> "RunConfig":
        if self.data.too_long == "split" and self.data.prompt:
            raise ValueError(
                "data.too_long: split is for plain text; with a data.prompt choose cut_prompt, drop or error"
            )
        if self.train.micro_batch_tokens < self.data.max_length:
            raise ValueError(
                f"train.micro_batch_tokens: {self.train.micro_batch_tokens} is less than data.max_length "
                f"{self.data.max_length}; one example must fit"
            )
        return self

    @model_validator(mode="after")
    def _chats_are_whole(self) -> "RunConfig":
        data = self.data
        if data.messages is not None and (data.prompt or data.references is not None):
            key = "data.prompt" if data.prompt else "data.references"
            raise ValueError(f"{key}: the turns are in data.messages; leave one of the two out")
        if data.is_chat and (self.train.method == "pretrain" or data.too_long == "split"):
            raise ValueError("data.chat: is for prompts and answers, not for plain text")
        if data.chat_options and not data.is_chat:
            raise ValueError("data.chat_options: needs data.chat: true, or data.messages")
        return self

    @model_validator(mode="after")
    def _outputs_can_be_scored(self) -> "RunConfig":
        keys = self.evaluate
        if keys.best_by != "loss" and not keys.every:
            raise ValueError(
                f"evaluate.best_by: {keys.best_by} is known only from evaluations while training; "
                "set evaluate.every"
            )
        if keys.every and not self.data.valid:
            raise ValueError("evaluate.every: there is nothing to write for; set data.valid")
        if keys.every and not keys.scores and keys.best_by == "loss":
            raise ValueError("evaluate.every: there is nothing to score by; set evaluate.scores or data.task")
        return self

    @field_validator("prefix")
    @classmethod
    def _layers_are_named_once(cls, prefix: PrefixKeys) -> PrefixKeys:
        if prefix.layers != "all" and (not prefix.layers or len(set(prefix.layers)) < len(prefix.layers)):
            raise ValueError(f"prefix.layers: {prefix.layers} is empty or names a layer twice")
        return prefix
