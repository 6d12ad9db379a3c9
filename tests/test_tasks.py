"""`data.task` fills in what a run file leaves out, and nothing else."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from prefix_ds.config import config_text, parse_config
from prefix_ds.config.keys import Task
from prefix_ds.config.tasks import TASKS
from prefix_ds.data.formats import FORMATS
from prefix_ds.data.template import parse_template
from prefix_ds.data.tokenise import template_keys
from prefix_ds.errors import ConfigError
from prefix_ds.scores import names_of

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"


def run_file(**sections):
    return yaml.safe_dump({"model": {"name": "base"}, "prefix": {"text": "x"}} | sections)


@pytest.mark.parametrize("task", get_args(Task))
def test_a_task_sets_what_is_left_out(task):
    config = parse_config(run_file(data={"task": task}))
    for section, keys in TASKS[task].items():
        for key, value in keys.items():
            assert getattr(getattr(config, section), key) == value, f"{section}.{key}"
    assert names_of(config.evaluate.scores)
    assert parse_config(config_text(config)) == config


def test_every_task_of_the_page_is_described():
    assert set(TASKS) == set(get_args(Task))


def test_what_the_user_says_wins_also_a_null():
    own = {"task": "data_to_text", "references": None, "prompt": "{record} ="}
    config = parse_config(run_file(data=own, generate={"num_beams": 4}), ["evaluate.scores=chrf"])
    assert (config.data.references, config.data.prompt) == (None, "{record} =")
    assert config.data.target == " {ref}"
    assert (config.generate.num_beams, config.generate.max_new_tokens) == (4, 96)
    assert config.evaluate.scores == ["chrf"]
    assert parse_config(run_file(data=own), ["evaluate.scores=[]"]).evaluate.scores == []


def test_a_task_on_the_command_line_fills_in_as_one_in_the_file():
    whole = parse_config(run_file(data={"task": "translation"}))
    assert parse_config(run_file(), ["data.task=translation"]) == whole


def test_a_finished_run_can_be_scored_as_a_task():
    """Its run.yaml has every key, so only the scores are left to fill in."""
    finished = parse_config(run_file(data={"prompt": "{q}"}))
    config = parse_config(config_text(finished), ["data.task=question_answering"])
    assert config.evaluate.scores == ["exact_match", "f1"]
    assert config.data.prompt == "{q}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.task=summarisation"], "data.task: 'summarisation': Input should be 'summarization', "),
        (
            ["evaluate.scores=rogue"],
            "evaluate.scores.0: 'rogue': Input should be 'rouge', 'rouge1', 'rouge2', ",
        ),
        (
            ["evaluate.scores=[bleu, rogue]"],
            "evaluate.scores.1: 'rogue': Input should be 'rouge', 'rouge1', ",
        ),
        (
            ["evaluate.best_by=rouge", "evaluate.every=1"],
            "evaluate.best_by: 'rouge': Input should be 'loss', ",
        ),
        (["evaluate.best_by=bleu"], "evaluate.best_by: bleu is known only from evaluations while training"),
        (["evaluate.every=5"], "evaluate.every: there is nothing to write for; set data.valid"),
        (
            ["evaluate.every=5", "data.valid=x.jsonl"],
            "evaluate.every: there is nothing to score by; set eval",
        ),
    ],
)
def test_a_wrong_key_is_told_in_one_line(words, said):
    with pytest.raises(ConfigError) as refused:
        parse_config(run_file(), words)
    (line,) = str(refused.value).splitlines()
    assert said in line


def examples():
    """The run files of docs/tasks.md."""
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    return re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)


def test_the_page_of_tasks_has_an_example_for_each():
    assert {yaml.safe_load(text)["data"]["task"] for text in examples()} == set(TASKS)


@pytest.mark.parametrize("text", examples(), ids=lambda text: yaml.safe_load(text)["data"]["task"])
def test_the_templates_of_an_example_fit_its_data(text):
    config = parse_config(text)
    splits = [s for s in ("train", "valid", "test") if str(getattr(config.data, s)).startswith("../shared/")]
    if splits and not DATA.is_dir():
        pytest.skip("needs ../shared/data")
    for split in splits:
        path = ROOT / getattr(config.data, split)
        _, record = next(FORMATS[path.suffix](str(path)))
        for key, template in template_keys(split, config.data):
            assert parse_template(template, key).texts(json.loads(record), str(path))
