"""What `data.task` and `train.method` set where run.yaml leaves it out: templates, lengths and scores of a
kind of task, and a learning rate.

Filled in when a file becomes a RunConfig, so the resolved run.yaml shows what was used and nothing depends on
this page later. Fields are named as in the data sets the tasks are known by: DialogSum, Multi30k, SQuAD (its
answers as a list of texts), E2E, and prompt and completion. A null in evaluate.scores means the same as none:
so a finished run can be scored as a task.

A base that chats is asked; another is given the beginning of a line to complete. Where a record holds a whole
conversation, no template is set.

Knows nothing of how text is made or scored.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

Tree = dict[str, Any]

TASKS: dict[str, dict[str, Tree]] = {
    "summarization": {
        "data": {"prompt": "{dialogue}\nTL;DR:", "target": " {summary}", "max_length": 1024},
        "generate": {"max_new_tokens": 128},
        "evaluate": {"scores": ["rouge"]},
    },
    "translation": {
        "data": {"prompt": "English: {en}\nGerman:", "target": " {de}", "max_length": 256},
        "generate": {"max_new_tokens": 128},
        "evaluate": {"scores": ["bleu", "chrf"]},
    },
    "question_answering": {
        "data": {
            "prompt": "{context}\nQuestion: {question}\nAnswer:",
            "target": " {answers}",
            "max_length": 512,
        },
        "generate": {"max_new_tokens": 32},
        "evaluate": {"scores": ["exact_match", "f1"]},
    },
    "data_to_text": {
        "data": {"prompt": "{mr}\nText:", "target": " {ref}", "references": " {refs}", "max_length": 256},
        "generate": {"max_new_tokens": 96},
        "evaluate": {"scores": ["bleu", "chrf", "rougeL"]},
    },
    "generation": {
        "data": {"prompt": "{prompt}", "target": "{completion}", "max_length": 1024},
        "generate": {"max_new_tokens": 256},
        "evaluate": {"scores": ["rouge", "chrf"]},
    },
}

# What is asked stands behind the text: one that is too long loses its beginning.
CHAT_TEMPLATES: dict[str, Tree] = {
    "summarization": {"prompt": "{dialogue}\n\nSummarise this dialogue.", "target": "{summary}"},
    "translation": {"prompt": "{en}\n\nTranslate this into German.", "target": "{de}"},
    "question_answering": {
        "prompt": "{context}\n\n{question} Answer with words of the text.",
        "target": "{answers}",
    },
    "data_to_text": {"prompt": "{mr}\n\nWrite this as a text.", "target": "{ref}", "references": "{refs}"},
    "generation": {"prompt": "{prompt}", "target": "{completion}"},
}

METHODS: dict[str, dict[str, Tree]] = {  # those that the default of train.lr is not for
    "full": {"train": {"lr": 1e-5}},
    "pretrain": {"train": {"lr": 1e-3}},
}

_TEMPLATES = ("prompt", "target", "references")
_NULL_IS_UNSET = ("evaluate", "scores")


def with_defaults(tree: Tree) -> Tree:
    """The tree of run.yaml with what its `data.task` and `train.method` set; one that is no run yet stays."""
    data, train = (_section(tree, name) for name in ("data", "train"))
    task, method = data.get("task"), train.get("method")
    defaults = METHODS[method] if isinstance(method, str) and method in METHODS else {}
    if isinstance(task, str) and task in TASKS:
        defaults = defaults | TASKS[task] | {"data": _data_keys(task, data)}
    return tree | {name: _filled(name, tree.get(name, {}), keys) for name, keys in defaults.items()}


def _section(tree: Tree, name: str) -> Tree:
    own = tree.get(name)
    return own if isinstance(own, dict) else {}


def _data_keys(task: str, own: Tree) -> Tree:
    keys = TASKS[task]["data"]
    if own.get("messages") is not None:
        return {key: value for key, value in keys.items() if key not in _TEMPLATES}
    keys = keys | CHAT_TEMPLATES[task] if _is_true(own.get("chat")) else keys
    is_own = own.get("target") is not None  # the task's references are in another field of the task's records
    return {key: value for key, value in keys.items() if key != "references" or not is_own}


def _is_true(value: object) -> bool:
    """As the page of keys reads it; what it refuses is told when it does."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False


def _filled(section: str, own: Any, defaults: Mapping[str, Any]) -> Any:
    if not isinstance(own, dict):
        return own
    kept = {key: value for key, value in own.items() if value is not None or (section, key) != _NULL_IS_UNSET}
    return {**defaults, **kept}
