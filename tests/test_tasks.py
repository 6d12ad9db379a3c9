"""`data.task` fills in what a run file leaves out, and nothing else."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from prefix_ds.config import config_text, parse_config
from prefix_ds.config.keys import Task
from prefix_ds.config.tasks import CHAT_TEMPLATES, TASKS
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
    assert set(TASKS) == set(CHAT_TEMPLATES) == set(get_args(Task))


@pytest.mark.parametrize("task", get_args(Task))
def test_a_task_leaves_templates_out_where_records_hold_conversations(task):
    config = parse_config(run_file(data={"task": task, "messages": "turns"}))
    without = parse_config(run_file(data={"messages": "turns"}))
    for key in ("prompt", "target", "references"):
        assert getattr(config.data, key) == getattr(without.data, key)
    assert config.data.max_length == TASKS[task]["data"]["max_length"]
    assert config.evaluate.scores == TASKS[task]["evaluate"]["scores"]
    assert parse_config(config_text(config)) == config
    with pytest.raises(ConfigError, match=r"data\.prompt: the turns are in data\.messages"):
        parse_config(run_file(data={"task": task, "messages": "turns", "prompt": "{q}"}))


@pytest.mark.parametrize("task", get_args(Task))
def test_in_a_chat_a_task_asks_and_begins_no_sentence(task):
    plain = parse_config(run_file(data={"task": task}))
    config = parse_config(run_file(data={"task": task, "messages": None}), ["data.chat=true"])
    fields = [set(parse_template(part.data.prompt, "data.prompt").fields) for part in (plain, config)]
    assert fields[0] == fields[1]
    assert not config.data.prompt.endswith(":")
    assert config.data.target == plain.data.target.strip()
    assert config.data.references == (plain.data.references and plain.data.references.strip())
    assert config.data.max_length == plain.data.max_length
    assert parse_config(config_text(config)) == config
    own = parse_config(run_file(data={"task": task, "chat": True, "prompt": "{q}"}))
    assert (own.data.prompt, own.data.target) == ("{q}", config.data.target)


@pytest.mark.parametrize("word", ["data.chat=1", "data.chat=yes", "data.chat=false", "data.chat=no"])
def test_a_task_reads_data_chat_as_the_page_does(word):
    config = parse_config(run_file(data={"task": "summarization"}), [word])
    assert config.data.target.startswith(" ") != config.data.chat
    with pytest.raises(ConfigError, match=r"data\.chat: 'maybe': expected true or false"):
        parse_config(run_file(data={"task": "summarization", "chat": "maybe"}))


def test_the_page_of_tasks_shows_the_templates_of_a_chat():
    text = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    for task, keys in [*TASKS.items(), *((task, {"data": own}) for task, own in CHAT_TEMPLATES.items())]:
        cells = [f"`{keys['data'][key]}`".replace("\n", "\\n") for key in ("prompt", "target")]
        assert f"| `{task}` | {' | '.join(cells)} |" in text


def test_what_the_user_says_wins_also_a_null():
    own = {"task": "data_to_text", "references": None, "prompt": "{record} ="}
    config = parse_config(run_file(data=own, generate={"num_beams": 4}), ["evaluate.scores=chrf"])
    assert (config.data.references, config.data.prompt) == (None, "{record} =")
    assert config.data.target == " {ref}"
    assert (config.generate.num_beams, config.generate.max_new_tokens) == (4, 96)
    assert config.evaluate.scores == ["chrf"]
    assert parse_config(run_file(data=own), ["evaluate.scores=[]"]).evaluate.scores == []


@pytest.mark.parametrize("chat", [False, True])
def test_a_target_of_the_users_own_is_that_of_all_splits(chat):
    """Records with other fields than E2E's have none that is called refs."""
    own = {"task": "data_to_text", "chat": chat, "prompt": "{data} ->", "target": " {text}"}
    config = parse_config(run_file(data=own))
    assert template_keys("test", config.data)[1] == ("data.target", " {text}")
    both = parse_config(run_file(data=own | {"references": " {texts}"}))
    assert template_keys("test", both.data)[1] == ("data.references", " {texts}")


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
        (["data.task=summarisation"], "data.task: 'summarisation': expected 'summarization', "),
        (
            ["evaluate.scores=rogue"],
            "evaluate.scores.0: 'rogue': expected 'rouge', 'rouge1', 'rouge2', ",
        ),
        (
            ["evaluate.scores=[bleu, rogue]"],
            "evaluate.scores.1: 'rogue': expected 'rouge', 'rouge1', ",
        ),
        (
            ["evaluate.best_by=rouge", "evaluate.every=1"],
            "evaluate.best_by: 'rouge': expected 'loss', ",
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
