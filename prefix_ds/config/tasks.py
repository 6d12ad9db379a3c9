"""What `data.task` sets: templates, lengths and scores of a kind of task, where run.yaml leaves them out.

Filled in when a file becomes a RunConfig, so the resolved run.yaml shows what was used and nothing depends on
this page later. Fields are named as in the data sets the tasks are known by: DialogSum, Multi30k, SQuAD (its
answers as a list of texts), E2E, and prompt and completion. A null in evaluate.scores means the same as none:
so a finished run can be scored as a task.

Knows nothing of how text is made or scored.
"""

from collections.abc import Mapping
from typing import Any

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

_NULL_IS_UNSET = ("evaluate", "scores")


def with_task(tree: Tree) -> Tree:
    """The tree of run.yaml with what its `data.task` sets; a tree that is no run yet is left as it is."""
    data = tree.get("data")
    task = data.get("task") if isinstance(data, dict) else None
    if not isinstance(task, str) or task not in TASKS:
        return tree
    return tree | {name: _filled(name, tree.get(name, {}), keys) for name, keys in TASKS[task].items()}


def _filled(section: str, own: Any, defaults: Mapping[str, Any]) -> Any:
    if not isinstance(own, dict):
        return own
    kept = {key: value for key, value in own.items() if value is not None or (section, key) != _NULL_IS_UNSET}
    return {**defaults, **kept}
