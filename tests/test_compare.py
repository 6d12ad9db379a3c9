"""Runs side by side.

Laws: folders and MLflow give the same comparison; the best is marked among rows of the same data, and never
silently across; a run may be called anything and may be missing anything; the page needs nothing but itself.

The server is MLflow's own on loopback, the browser a real one without a network.
"""

import html
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prefix_ds.compare import Request, compare
from prefix_ds.compare.axes import Axis
from prefix_ds.compare.command import comparison_of
from prefix_ds.compare.comparison import Comparison, compared
from prefix_ds.compare.data import as_data
from prefix_ds.compare.folders import Folders
from prefix_ds.compare.measures import written
from prefix_ds.compare.mlflow_runs import MlflowRuns
from prefix_ds.compare.page import page
from prefix_ds.compare.rows import Row
from prefix_ds.compare.seen import Value
from prefix_ds.compare.table import show
from prefix_ds.errors import RunError, printable
from prefix_ds.tracking import sync_run, tagged_evaluations, told_mark
from prefix_ds.tracking.evaluated import evaluation_tags
from prefix_ds.verdicts import present_verdicts
from tests.browser import PROGRAM, Tab, opened
from tests.compared import (
    BASE_LOSS,
    FULL,
    INSTRUCTION_LOSS,
    a_sweep,
    curve,
    evaluated,
    evaluation_metrics,
    made_run,
    with_prefix,
)
from tests.mlflow_server import MlflowServer, free_port

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }} {% raw %}",
    "[bold red]x[/] [link=http://example.com]y[/link]",
    "two\nlines\x1b[31m and a bell\a",
    "'; DROP TABLE runs; --",
    "très long " * 40,
    "\u202edesrever",
]


def of_folders(*paths: Path, by: str | None = None) -> Comparison:
    return comparison_of(Folders(paths), by)


def row(comparison: Comparison, name: str) -> Row:
    (found,) = [row for row in comparison.rows if row.name == name]
    return found


def names(comparison: Comparison) -> list[str]:
    return [row.name for row in comparison.rows]


def best(comparison: Comparison) -> list[str]:
    return [row.name for row in comparison.rows if row.is_best]


def unvalidated(folder: Path, name: str, *words: str, **facts: Any) -> Path:
    """A run that was trained without data.valid."""
    run = made_run(folder, name, "data.valid=", *words, **facts)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if "valid/loss" not in line))
    return run


def on_terminal(comparison: Comparison, width: int = 240) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    show(console, comparison)
    return console.export_text()


def page_of(comparison: Comparison, *paths: Path) -> str:
    return page(comparison, Folders(paths), "today")


# What is said of runs


def test_seeds_are_one_row_with_mean_and_deviation(tmp_path: Path) -> None:
    a_sweep(tmp_path)
    found = row(of_folders(tmp_path), "prefix-0.3")
    losses = [1.4, 1.41, 1.45]
    value = found.values["valid_loss"]
    assert found.seeds == ["0", "1", "2"]
    assert value.value == pytest.approx(statistics.fmean(losses))
    assert value.deviation == pytest.approx(statistics.stdev(losses))
    assert value.count == 3
    assert found.values["result_bytes"].value == 1000
    assert f"{statistics.fmean(losses):.4f} ± {statistics.stdev(losses):.4f}" in on_terminal(
        of_folders(tmp_path)
    )


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        ("base-s41", "base-s42", "base"),
        ("run-1", "run-11", "run"),
        ("prefix-0.1-s0", "prefix-0.1-s1", "prefix-0.1"),
        ("lr0.1 seed=1", "lr0.1 seed=2", "lr0.1"),
        ("dialogues-0", "dialogues-1", "dialogues"),
        ("news1", "news2", "news"),
        ("e2e0", "e2e1", "e2e"),
        ("v2", "v2-again", "v2"),
    ],
)
def test_seeds_are_called_what_their_names_share(
    tmp_path: Path, first: str, second: str, common: str
) -> None:
    for seed, name in enumerate((first, second)):
        made_run(tmp_path, name, f"train.seed={seed}")
    assert names(of_folders(tmp_path))[0] == common


def test_the_best_is_first_and_marked(tmp_path: Path) -> None:
    a_sweep(tmp_path)
    comparison = of_folders(tmp_path)
    assert best(comparison) == ["full"]
    told = ["full", "prefix-0.3", "prefix-0.1", "instruction alone: Say it in short:", "bare base acme/base"]
    assert names(comparison) == told
    assert [row.name for row in comparison.runs if row.is_best] == ["full"]
    assert best(of_folders(tmp_path, by="size")) == ["prefix-0.1"]
    assert best(of_folders(tmp_path, by="tokens/s")) == ["full"]  # all are alike: the first by name


def test_only_keys_that_differ_are_shown(tmp_path: Path) -> None:
    a_sweep(tmp_path)
    assert of_folders(tmp_path).keys == ("train.method", "train.lr")
    prefixes = of_folders(*sorted(tmp_path.iterdir())[:6])
    assert prefixes.keys == ("train.lr",)
    assert row(prefixes, "prefix-0.1").keys == {"train.lr": "0.1"}


def test_a_key_that_some_runs_lack_differs(tmp_path: Path) -> None:
    made_run(tmp_path, "a")
    made_run(tmp_path, "b", "prefix.length=9")
    assert of_folders(tmp_path).keys == ("prefix.length",)
    assert row(of_folders(tmp_path), "a").keys == {"prefix.length": ""}


def test_ways_without_training_come_out_of_the_runs(tmp_path: Path) -> None:
    a_sweep(tmp_path)
    comparison = of_folders(tmp_path)
    assert row(comparison, "bare base acme/base").values["valid_loss"].value == BASE_LOSS
    instruction = row(comparison, "instruction alone: Say it in short:")
    assert instruction.values["valid_loss"].value == INSTRUCTION_LOSS
    assert len(instruction.members) == 6


def test_a_random_start_is_no_instruction(tmp_path: Path) -> None:
    made_run(tmp_path, "a", "prefix.init=random", "prefix.length=4", "prefix.text=null")
    assert names(of_folders(tmp_path)) == ["a"]


def test_scores_have_their_intervals_and_directions(tmp_path: Path) -> None:
    a, b = made_run(tmp_path, "a", loss=1.5), made_run(tmp_path, "b", "train.lr=1", loss=1.6)
    evaluated(a, "test", 1.7, {"rougeL": (40.0, 39.0, 41.0), "ter": (60.0, 59.0, 61.0)})
    evaluated(b, "test", 1.8, {"rougeL": (42.0, 41.0, 43.0), "ter": (62.0, 61.0, 63.0)})
    evaluated(b, "test.bare", 2.8, {"rougeL": (10.0, 9.0, 11.0), "ter": (90.0, 89.0, 91.0)})
    evaluated(b, "test.instruction", 2.4, {"rougeL": (20.0, 19.0, 21.0), "ter": (80.0, 79.0, 81.0)})
    assert best(of_folders(tmp_path)) == ["a"]
    comparison = of_folders(tmp_path, by="rougeL")
    assert comparison.by == "test/rougeL"
    assert names(comparison) == ["b", "a", "instruction alone: Say it in short:", "bare base acme/base"]
    assert best(comparison) == ["b"]
    assert (
        best(of_folders(tmp_path, by="test/ter")) == best(of_folders(tmp_path, by="test/perplexity")) == ["a"]
    )
    assert "42.00 [41.00, 43.00]" in on_terminal(comparison)
    assert "<span>10.00</span> <span>[9.00, 11.00]</span>" in page_of(comparison, tmp_path)
    assert row(comparison, "bare base acme/base").values["test/loss"].value == 2.8


def test_a_run_that_has_only_begun_counts_for_nothing(tmp_path: Path) -> None:
    for seed, loss in enumerate((1.0, 1.2)):
        made_run(tmp_path, f"p{seed}", f"train.seed={seed}", loss=loss)
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copyfile(tmp_path / "0000" / "run.yaml", begun / "run.yaml")
    (found,) = [row for row in of_folders(tmp_path).rows if row.kind == "seeds"]
    assert found.values["valid_loss"].value == pytest.approx(1.1)
    assert "mean of 2 of 3 runs" in found.notes


def test_runs_without_validation_are_told_what_they_can_be_judged_by(tmp_path: Path) -> None:
    for number, bleu in enumerate((20.0, 30.0)):
        run = unvalidated(tmp_path, f"r{number}", f"train.lr=0.{number + 1}")
        evaluated(run, "test", 2.0, {"bleu": (bleu, 10.0, 40.0)})
    comparison = of_folders(tmp_path)
    assert best(comparison) == []
    (warning,) = comparison.warnings
    assert "no row has a validation loss, so none is the best; --by can name test/bleu, test/loss" in warning
    assert best(of_folders(tmp_path, by="bleu")) == ["r1"]
    assert of_folders(tmp_path, by="bleu").warnings == ()


def test_templates_that_name_other_fields_are_other_runs(tmp_path: Path) -> None:
    for field in ("token", "word"):
        made_run(tmp_path, field, f"data.prompt='Token: {{{field}}} Tag:'")
    assert of_folders(tmp_path).keys == ("data.prompt",)
    assert {"token", "word"} <= set(names(of_folders(tmp_path)))


def test_runs_without_parameters_are_no_seeds_of_each_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run = made_run(tmp_path, name)
        facts = json.loads((run / "facts.json").read_text())
        (run / "facts.json").write_text(json.dumps(facts | {"params": {}}))
    made_run(tmp_path, "c")
    comparison = of_folders(tmp_path)
    assert {"a", "b", "c"} <= set(names(comparison))
    assert comparison.keys == ()


def test_a_folder_under_two_names_is_one_run(tmp_path: Path) -> None:
    run = made_run(tmp_path, "one")
    (tmp_path / "latest").symlink_to(run.name)
    assert len(of_folders(tmp_path).runs) == 1
    assert len(of_folders(run, tmp_path / "latest", tmp_path).runs) == 1


def test_the_order_of_folders_changes_nothing(tmp_path: Path) -> None:
    a = made_run(tmp_path, "same", "train.lr=1", digests={"train": "a" * 32, "valid": "c" * 32})
    b, c = (made_run(tmp_path, "same", f"train.lr={lr}", loss=2.5) for lr in (2, 3))
    assert plain(of_folders(a, b, c)) == plain(of_folders(c, b, a))
    assert [row.data for row in of_folders(c, b, a).runs] == ["A", "B", "B"], "the oldest is of the first"


def test_a_mean_loss_over_fewer_seeds_is_told(tmp_path: Path) -> None:
    runs = a_sweep(tmp_path)
    evaluated(runs[0], "valid", 1.7, {"rougeL": (40.0, 39.0, 41.0)})
    (runs[1] / "metrics.jsonl").unlink()
    notes = row(of_folders(tmp_path), "prefix-0.1").notes
    assert "validation loss of 2 of 3" in notes
    assert "valid scores of 1 of 3" in notes


def test_seeds_are_in_the_order_of_numbers_and_may_be_any_text(tmp_path: Path) -> None:
    for seed in (10, 9, 0):
        made_run(tmp_path, "a", f"train.seed={seed}")
    assert row(of_folders(tmp_path), "a").seeds == ["0", "9", "10"]
    run = tmp_path / "0002"
    (run / "facts.json").write_text(
        (run / "facts.json").read_text().replace('"train.seed": "0"', '"train.seed": "\\u001b[31m"')
    )
    comparison = of_folders(tmp_path)
    assert "\x1b[31m" in row(comparison, "a").seeds
    assert "\x1b" not in on_terminal(comparison) + page_of(comparison, tmp_path)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_numbers_are_whole_on_a_narrow_terminal(tmp_path: Path, width: int) -> None:
    made = ("rouge1", "rouge2", "rougeL", "bleu", "chrf")
    for run in a_sweep(tmp_path):
        evaluated(run, "test", 2.0, dict.fromkeys(made, (25.0, 24.0, 26.0)))
    comparison = of_folders(tmp_path)
    text = on_terminal(comparison, width)
    for line in comparison.rows:
        for name, value in line.values.items():
            is_shown = any(name in columns.measures for columns in comparison.tables)
            assert not is_shown or f" {written(name, value)} " in text, name
    assert {len(line) for line in text.splitlines() if line.startswith(" ")} <= set(range(width + 1))


def test_curves_and_levels_are_told_apart_without_colours(tmp_path: Path) -> None:
    made_run(tmp_path, "a")
    text = page_of(of_folders(tmp_path), tmp_path)
    dashes = dict(re.findall(r"\.(curve\.c\d|level) \{[^}]*stroke-dasharray: ([\d ]+);", text))
    assert len(dashes) == len(set(dashes.values())) == 8, "the first curve is drawn through"


@pytest.mark.parametrize(("low", "high"), [(3.1129, 3.1131), (2.0, 2.0001), (0.0, 1.0), (900.0, 1300.0)])
def test_labels_of_an_axis_tell_its_ticks_apart(low: float, high: float) -> None:
    labels = [tick.label for tick in Axis(low, high, 0, 100).ticks()]
    assert len(set(labels)) == len(labels) > 1


def test_seeds_that_were_not_all_scored_are_told(tmp_path: Path) -> None:
    evaluated(a_sweep(tmp_path)[0], "test", 1.7, {"rougeL": (40.0, 39.0, 41.0)})
    comparison = of_folders(tmp_path)
    assert row(comparison, "prefix-0.1").notes == ["test scores of 1 of 3"]
    assert row(comparison, "prefix-0.3").notes == []
    assert "test scores of 1 of 3" in page_of(comparison, tmp_path)


def test_time_speed_and_memory_are_those_of_the_steps(tmp_path: Path) -> None:
    made_run(tmp_path, "a")
    values = {name: value.value for name, value in row(of_folders(tmp_path), "a").values.items()}
    assert values["train_seconds"] == pytest.approx(20.0)  # 40 steps of half a second
    assert values["tokens_per_second"] == statistics.median([1010, 1020, 1030, 1040])
    assert values["peak_gib"] == pytest.approx(1.04)
    assert values["valid_step"] == values["steps"] == 40


def test_different_data_are_told_and_the_best_is_that_of_each(tmp_path: Path) -> None:
    made_run(tmp_path, "a", loss=1.5)
    made_run(tmp_path, "b", "train.lr=1", loss=1.6)
    other = {"train": "a" * 32, "valid": "c" * 32}
    made_run(tmp_path, "c", "data.valid=easy.jsonl", loss=0.5, digests=other)
    comparison = of_folders(tmp_path)
    assert best(comparison) == ["c", "a"]
    (warning,) = comparison.warnings
    assert re.match(r"validation data differ: A: valid.jsonl \(bbbbbbbb\), 2 runs; B: easy.jsonl", warning)
    assert [row.data for row in comparison.runs] == ["B", "A", "A"]
    assert f"warning: {warning}" in on_terminal(comparison)
    text = page_of(comparison, tmp_path)
    assert "Read this first" in text
    assert "validation data differ" in text


def test_the_same_data_under_another_path_are_the_same(tmp_path: Path) -> None:
    made_run(tmp_path, "a")
    made_run(tmp_path, "b", "data.valid=elsewhere/valid.jsonl", loss=1.0)
    comparison = of_folders(tmp_path)
    assert (comparison.warnings, best(comparison)) == ((), ["b"])


def test_data_without_a_digest_go_by_their_names_and_targets(tmp_path: Path) -> None:
    made_run(tmp_path, "a", digests={"none": ""})
    made_run(tmp_path, "b", "data.target=other {goal}")
    told = [line.partition(":")[0] for line in of_folders(tmp_path).warnings]
    assert told == ["training data differ", "validation data differ"]


OTHER = {"data": "other.jsonl"}


def on_other_data(folder: Path, experiment: str = "compared") -> list[Path]:
    """Runs that were evaluated on the data of run.yaml, and on others."""
    scores = {"rougeL": (40.0, 39.0, 41.0)}
    told = [(40, evaluation_metrics("test", 1.7, scores)), (0, evaluation_metrics("valid.bare", 0.1, {}))]
    a = made_run(folder, "a", loss=1.5, more=told, experiment=experiment)
    evaluated(a, "test", 1.7, scores)
    evaluated(a, "valid.bare", 0.1, {}, **OTHER)
    scores = {"rougeL": (90.0, 89.0, 91.0)}
    told = [
        (40, evaluation_metrics("test", 0.7, scores)),
        (0, evaluation_metrics("valid.instruction", 2.5, {})),
    ]
    b = made_run(folder, "b", "train.lr=1", loss=1.6, more=told, experiment=experiment)
    evaluated(b, "test", 0.7, scores, **OTHER)
    evaluated(b, "valid.instruction", 2.5, {})
    return [a, b]


def test_scores_of_different_data_have_a_best_each(tmp_path: Path) -> None:
    on_other_data(tmp_path)
    comparison = of_folders(tmp_path, by="rougeL")
    assert best(comparison) == ["b", "a"]
    assert [(row.name, row.data) for row in comparison.runs] == [("b", "B"), ("a", "A")]
    assert "test data differ: A: test.jsonl, 1 run; B: other.jsonl, 1 run" in "".join(comparison.warnings)
    assert best(of_folders(tmp_path)) == ["a"], "both were validated on the same"


def test_a_loss_on_other_data_is_no_validation_loss(tmp_path: Path) -> None:
    on_other_data(tmp_path)
    comparison = of_folders(tmp_path)
    base = row(comparison, "bare base acme/base")
    assert base.values["valid/loss"].value == 0.1
    assert "valid_loss" not in base.values
    instruction = row(comparison, "instruction alone: Say it in short:")
    assert instruction.values["valid_loss"].value == INSTRUCTION_LOSS
    assert (
        "validation data differ: A: valid.jsonl (bbbbbbbb), 2 runs; B: other.jsonl" in comparison.warnings[0]
    )


def test_scores_of_seeds_on_different_data_have_no_mean(tmp_path: Path) -> None:
    for seed, data in enumerate(("test.jsonl", "other.jsonl")):
        run = made_run(tmp_path, f"a-s{seed}", f"train.seed={seed}")
        evaluated(run, "test", 1.0 + seed, {}, data)
        evaluated(run, "valid", 2.0 + seed, {})
    found = row(of_folders(tmp_path), "a")
    assert found.values["valid/loss"].value == 2.5
    assert "test/loss" not in found.values
    assert found.notes == ["scores of different data"]


CHANGED = {
    "test": {"data.references": " {short}"},
    "test.bare": {"model.name": "acme/other", "data.references": None},
    "test.instruction": {"prefix.text": "Be brief:" + "!" * 3000},
}


def test_an_evaluation_with_keys_of_its_own_is_not_taken_for_one_with_the_runs(tmp_path: Path) -> None:
    evaluated(made_run(tmp_path, "own"), "test", 1.0, {"bleu": (10.0, 9.0, 11.0)})
    run = made_run(tmp_path, "told", "data.references= {goals}", "train.lr=1")
    for name, changed in CHANGED.items():
        value = 90.0 if name == "test" else 5.0
        evaluated(run, name, 1.0, {"bleu": (value, value - 1, value + 1)}, changed=changed)
    tagged = tagged_evaluations(evaluation_tags(run))
    assert {name: list(told.changed) for name, told in tagged.items()} == {
        name: list(changed) for name, changed in CHANGED.items()
    }
    comparison = of_folders(tmp_path, by="bleu")
    assert {"own", "told"} <= set(best(comparison)), "other references are other data"
    assert "test/bleu" in row(comparison, "bare base acme/other").values
    assert "test/bleu" not in row(comparison, "instruction alone: Say it in short:").values
    assert any(name.startswith("instruction alone: Be brief:!!") for name in names(comparison))
    assert "told: evaluated (test) with data.references= {short}, not its own" in comparison.warnings
    told = "told: evaluated (test, base) with data.references=, model.name=acme/other, not its own"
    assert told in comparison.warnings


def test_seeds_that_were_evaluated_with_different_keys_have_no_mean(tmp_path: Path) -> None:
    for seed, changed in enumerate(({}, {"model.bits": "8"})):
        run = made_run(tmp_path, f"a-s{seed}", f"train.seed={seed}")
        evaluated(run, "test", 1.0 + seed, {}, changed=changed)
    found = row(of_folders(tmp_path), "a")
    assert "test/loss" not in found.values
    assert found.notes == ["scores with different keys"]


# What is no longer true


def test_scores_of_an_earlier_prefix_are_left_out_and_told(tmp_path: Path) -> None:
    run = made_run(tmp_path, "a")
    with_prefix(run, 40, "new")
    evaluated(run, "test", 1.7, SCORES, step=40, sha256="old")
    evaluated(run, "test.bare", 2.8, SCORES)
    comparison = of_folders(tmp_path, by="bleu")
    found = row(comparison, "a")
    assert not [name for name in found.values if name.startswith("test/")]
    assert found.notes == ["evaluated earlier"]
    (warning,) = comparison.warnings
    assert re.match(
        r"a: was trained further after its evaluation \(test\).*`prefix-ds evaluate RUN` again", warning
    )
    assert best(comparison) == ["bare base acme/base"]
    evaluated(run, "test", 1.7, SCORES, step=40, sha256="new")
    assert best(of_folders(tmp_path, by="rougeL")) == ["a"]
    assert of_folders(tmp_path).warnings == ()


def test_scores_of_an_earlier_model_go_by_the_step(tmp_path: Path) -> None:
    run = made_run(tmp_path, "a", *FULL)
    evaluated(run, "test", 1.7, SCORES, step=20)
    assert row(of_folders(tmp_path), "a").notes == ["evaluated earlier"]
    evaluated(run, "test", 1.7, SCORES, step=40)
    assert row(of_folders(tmp_path), "a").notes == []


def test_an_evaluation_of_before_marks_is_read(tmp_path: Path) -> None:
    run = made_run(tmp_path, "a")
    with_prefix(run, 40, "new")
    evaluated(run, "test", 1.7, SCORES, without_prefix=False)
    assert row(of_folders(tmp_path), "a").values["test/loss"].value == 1.7


def test_a_prefix_that_is_damaged_has_no_mark(tmp_path: Path) -> None:
    run = made_run(tmp_path, "a")
    evaluated(run, "test", 1.7, SCORES, step=40, sha256="x")
    for content in (b"", b"\xff" * 9, (2).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"):
        (run / "prefix" / "prefix.safetensors").write_bytes(content)
        assert "test/loss" in row(of_folders(tmp_path), "a").values


def test_an_export_can_leave_out_what_is_of_another_prefix(tmp_path: Path) -> None:
    run = made_run(tmp_path, "a")
    evaluated(run, "test", 1.7, SCORES, step=20, sha256="old")
    evaluated(run, "valid", 1.7, {})
    evaluated(run, "test.instruction", 1.7, {})
    assert list(present_verdicts(run)) == ["test.instruction", "test", "valid"]
    with_prefix(run, 40, "new")
    assert list(present_verdicts(run)) == ["test.instruction", "valid"]


# What is chosen by a score

CHRF = [(0, {"valid/chrf": 5.0}), (20, {"valid/chrf": 60.0}), (40, {"valid/chrf": 50.0})]
BY_CHRF = ("evaluate.best_by=chrf", "evaluate.every=20")


def test_the_loss_is_that_of_the_prefix_that_was_kept(tmp_path: Path) -> None:
    made_run(tmp_path, "a", *BY_CHRF, more=CHRF)
    comparison = of_folders(tmp_path, by="valid/chrf")
    values = {name: value.value for name, value in row(comparison, "a").values.items()}
    assert (values["valid_step"], values["valid_chrf"]) == (20, 60)
    assert values["valid_loss"] == pytest.approx(curve(INSTRUCTION_LOSS, 2.0, 0.5))
    assert (comparison.by, best(comparison)) == ("valid_chrf", ["a"])
    assert "validation chrf" in on_terminal(comparison)
    assert of_folders(tmp_path, by="chrf").by == "valid_chrf"


def test_a_step_that_was_scored_and_not_validated_has_no_loss(tmp_path: Path) -> None:
    made_run(tmp_path, "a", *BY_CHRF, more=[(25, {"valid/chrf": 60.0})])
    assert "valid_loss" not in row(of_folders(tmp_path), "a").values


# Which runs count


def test_a_mean_is_over_the_newest_run_of_each_seed_that_finished(tmp_path: Path) -> None:
    for seed, loss, status in (
        (0, 9.0, "FINISHED"),
        (0, 1.0, "FINISHED"),
        (1, 2.5, "FAILED"),
        (1, 1.1, "FINISHED"),
    ):
        made_run(tmp_path, f"a-s{seed}", f"train.seed={seed}", loss=loss, status=status)
    made_run(tmp_path, "a-s2", "train.seed=2", loss=0.1, status="KILLED")
    made_run(tmp_path, "a-s3", "train.seed=3", loss=0.1, status="")
    made_run(tmp_path, "b", "train.lr=1", loss=1.2)
    comparison = of_folders(tmp_path)
    found = row(comparison, "a")
    assert found.values["valid_loss"].value == pytest.approx(1.05)
    assert found.values["valid_loss"].count == 2
    assert found.seeds == ["0", "1"]
    assert found.notes == ["1 of 6 failed", "1 of 6 stopped", "1 of 6 not ended", "mean of 2 of 6 runs"]
    assert best(comparison) == ["a"]


def test_seeds_of_which_none_finished_have_no_mean(tmp_path: Path) -> None:
    for seed in (0, 1):
        made_run(tmp_path, f"a-s{seed}", f"train.seed={seed}", status="FAILED")
    comparison = of_folders(tmp_path)
    assert (row(comparison, "a").values, row(comparison, "a").seeds) == ({}, ["0", "1"])
    assert row(comparison, "a").notes == ["2 of 2 failed", "no run finished"]
    assert comparison.runs[0].values["valid_loss"].value == 2.0
    assert "no run finished" in page_of(comparison, tmp_path)


def test_a_score_that_a_failed_try_has_is_not_one_of_the_mean(tmp_path: Path) -> None:
    evaluated(made_run(tmp_path, "a-s0", status="FAILED"), "test", 1.0, SCORES)
    evaluated(made_run(tmp_path, "a-s0b"), "test", 2.0, SCORES)
    found = row(of_folders(tmp_path), "a-s0")
    assert (found.values["test/loss"].value, found.notes[-1]) == (2.0, "mean of 1 of 2 runs")


# What cannot be compared


def test_what_the_longest_example_and_the_tokenizer_make_of_data_makes_them_others(tmp_path: Path) -> None:
    made_run(tmp_path, "a", "data.max_length=64", "data.too_long=drop", loss=1.0, targets=1000)
    made_run(tmp_path, "b", "data.max_length=512", "data.too_long=drop", loss=2.0, targets=5000)
    comparison = of_folders(tmp_path)
    assert best(comparison) == ["a", "b"]
    (warning,) = comparison.warnings
    assert "A: valid.jsonl (bbbbbbbb), 100 examples, 1,000 targets, 1 run; B: " in warning


def test_outputs_of_two_tokenizers_can_be_compared_and_losses_cannot(tmp_path: Path) -> None:
    for name, targets in (("x", 100), ("y", 200)):
        evaluated(made_run(tmp_path, name, f"model.name=acme/{name}"), "test", 1.0, SCORES, targets=targets)
    assert best(of_folders(tmp_path, by="rougeL")) == ["x"]
    assert best(of_folders(tmp_path, by="test/loss")) == ["x", "y"]
    (warning,) = of_folders(tmp_path).warnings
    assert "test data differ: A: test.jsonl, 630 records, 100 targets, 1 run" in warning


def test_seeds_whose_outputs_were_written_differently_have_no_mean(tmp_path: Path) -> None:
    for seed, beams in enumerate((1, 8)):
        run = made_run(tmp_path, f"a-s{seed}", f"train.seed={seed}")
        keys = {
            "num_beams": beams,
            "max_new_tokens": 9,
            "temperature": 0.0,
            "seed": seed,
            "batch_size": beams,
        }
        evaluated(run, "test", 1.0 + seed, SCORES, generate=keys)
    comparison = of_folders(tmp_path)
    found = row(comparison, "a")
    assert found.values["test/loss"].value == 1.5
    assert "test/rougeL" not in found.values
    assert found.notes == ["scores of outputs that were written differently"]
    assert comparison.warnings == (
        "outputs for test data were written differently: num_beams 1, max_new_tokens 9, 1 run; "
        "num_beams 8, max_new_tokens 9, 1 run",
    )


# Ways without training, told by several runs


def untrained(comparison: Comparison) -> dict[str, float]:
    return {row.name: row.values["valid_loss"].value for row in comparison.rows if not row.is_trained}


def test_bases_that_read_other_prompts_are_two_rows(tmp_path: Path) -> None:
    a = made_run(tmp_path, "a", "data.prompt={text} one", "train.lr=1")
    evaluated(a, "valid.bare", 3.0, {})
    b = made_run(tmp_path, "b", "data.prompt={text} two")
    evaluated(b, "valid.bare", 4.0, {})
    rows = untrained(of_folders(a, b))
    assert rows == untrained(of_folders(b, a))
    assert rows["bare base acme/base (data.prompt: {text} one)"] == 3.0
    assert rows["bare base acme/base (data.prompt: {text} two)"] == 4.0
    assert sum(name.startswith("instruction alone") for name in rows) == 2


def test_what_is_not_read_makes_no_row(tmp_path: Path) -> None:
    made_run(tmp_path, "a", *FULL, "model.recompute=true", "data.packing=false")
    made_run(tmp_path, "b", *FULL, "train.seed=4", "data.train=other.jsonl", "train.epochs=1")
    assert [row.name for row in of_folders(tmp_path).rows if not row.is_trained] == ["bare base acme/base"]


def test_evaluations_of_a_base_on_other_data_or_with_other_beams_are_rows_of_their_own(
    tmp_path: Path,
) -> None:
    runs = [made_run(tmp_path, name, f"train.lr={lr}") for lr, name in enumerate("abc", 1)]
    evaluated(runs[0], "test.bare", 3.0, {"bleu": (1.0, 0.0, 2.0)}, generate={"num_beams": 1})
    evaluated(runs[1], "test.bare", 3.0, {"bleu": (2.0, 0.0, 2.0)}, generate={"num_beams": 8})
    evaluated(runs[2], "test.bare", 4.0, {"bleu": (3.0, 0.0, 2.0)}, "other.jsonl", generate={"num_beams": 8})

    def scores(*runs: Path) -> dict[str, float]:
        rows = of_folders(*runs).rows
        return {row.name: row.values["test/bleu"].value for row in rows if row.kind == "base"}

    assert scores(*runs) == scores(*reversed(runs))
    assert scores(*runs[:2]) == {
        "bare base acme/base (test outputs: num_beams 1)": 1.0,
        "bare base acme/base (test outputs: num_beams 8)": 2.0,
    }
    assert scores(*runs[1:]) == {
        "bare base acme/base (test data: test.jsonl)": 2.0,
        "bare base acme/base (test data: other.jsonl)": 3.0,
    }
    assert len(scores(*runs)) == 3


# What may be missing or broken


def test_a_run_without_metrics_is_shown_as_such(tmp_path: Path) -> None:
    made_run(tmp_path, "a")
    new = made_run(tmp_path, "new", "train.lr=1", status="")
    (new / "metrics.jsonl").unlink()
    assert row(of_folders(tmp_path), "new").notes == ["no metrics yet", "not ended"]
    assert "no metrics yet" in on_terminal(of_folders(tmp_path))
    shutil.rmtree(new / "prefix")
    assert row(of_folders(new), "new").notes == ["no metrics yet", "not ended"]
    assert best(of_folders(new)) == []
    assert "no metrics yet" in page_of(of_folders(new), new)


def test_a_line_that_is_being_written_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = made_run(tmp_path, "a", loss=1.5)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "time": 1.0, "valid/lo')
    assert row(of_folders(run), "a").values["valid_loss"].value == 1.5
    assert caplog.text == ""


def test_losses_that_are_no_numbers_are_never_the_best(tmp_path: Path) -> None:
    made_run(tmp_path, "a")
    made_run(tmp_path, "b", "train.lr=1", loss=math.nan, steps=0)
    made_run(tmp_path, "c", "train.lr=2", loss=math.inf, steps=0)
    comparison = of_folders(tmp_path)
    assert best(comparison) == ["a"]
    json.dumps(as_data(comparison), allow_nan=False)
    assert "not a number" in on_terminal(comparison)
    assert "<svg" in page_of(comparison, tmp_path)


def test_a_summary_that_is_no_number_ends_nothing(tmp_path: Path) -> None:
    run = made_run(tmp_path, "a")
    (seen,) = Folders([run]).runs()
    for odd in (math.nan, math.inf):
        assert told_mark({"valid_step": odd}).step is None
        other = replace(seen, values=dict.fromkeys(seen.values, Value(odd)))
        comparison = compared("odd", [seen, other])
        json.dumps(as_data(comparison), allow_nan=False)
        assert on_terminal(comparison)
        assert page_of(comparison, run)


def test_a_deleted_result_is_told(tmp_path: Path) -> None:
    made_run(tmp_path, "a")
    made_run(tmp_path, "b", "train.lr=1", size=0)
    comparison = of_folders(tmp_path)
    assert comparison.warnings == (f"b: its result is gone ({tmp_path}/0001)",)
    assert row(comparison, "b").notes == ["result gone"]


def test_a_deleted_result_of_a_run_without_validation_is_told(tmp_path: Path) -> None:
    for place, status in enumerate(("FINISHED", "KILLED")):
        unvalidated(tmp_path, status, f"train.lr=0.{place + 1}", status=status, size=0)
    comparison = of_folders(tmp_path)
    assert row(comparison, "FINISHED").notes == ["result gone"]
    assert row(comparison, "KILLED").notes == ["stopped"], "it had none yet"


def test_the_best_is_one_that_still_has_its_result(tmp_path: Path) -> None:
    gone = made_run(tmp_path, "gone", loss=1.0, size=0)
    made_run(tmp_path, "there", "train.lr=1", loss=1.5)
    made_run(tmp_path, "worse", "train.lr=2", loss=1.6)
    comparison = of_folders(tmp_path)
    assert names(comparison)[:2] == ["gone", "there"]
    assert best(comparison) == ["there"]
    assert best(of_folders(gone)) == ["instruction alone: Say it in short:"]


def test_runs_that_share_a_name_are_told_apart_by_their_places(tmp_path: Path) -> None:
    places = ("x/long", "y/long", "y/short")
    for lr, place in enumerate(places, 1):
        (tmp_path / place).mkdir(parents=True)
        made_run(tmp_path / place, "run", f"train.lr={lr}", loss=lr / 9).rename(tmp_path / place / "run")
    made_run(tmp_path, "other", "train.lr=9", loss=1.0)
    found = of_folders(*(tmp_path / place / "run" for place in places), *tmp_path.glob("0*"))
    told = ["run (x/long/run)", "run (y/long/run)", "run (short/run)"]
    assert [name for name in names(found) if name in (*told, "other")] == [*told, "other"]
    assert [row.name for row in found.runs] == [*told, "other"]


def test_a_run_that_was_imported_has_only_its_configuration(tmp_path: Path) -> None:
    run = made_run(tmp_path, "a", "mlflow.name=imported")
    for name in ("facts.json", "metrics.jsonl"):
        (run / name).unlink()
    assert names(of_folders(run)) == ["imported"]
    assert row(of_folders(run), "imported").notes == ["no metrics yet"]


def test_runs_are_found_one_folder_below(tmp_path: Path) -> None:
    made_run(tmp_path, "a")
    (tmp_path / "corpus").mkdir()
    assert names(of_folders(tmp_path, tmp_path / "0000"))[0] == "a"


def test_runs_at_two_depths_are_all_found(tmp_path: Path) -> None:
    text = (made_run(tmp_path, "first") / "run.yaml").read_text()
    for folder in ("rates", "my-task"):
        (tmp_path / folder).mkdir()
        made_run(tmp_path / folder, f"of {folder}", "train.lr=0.1", f"prefix.text={folder}")
    (tmp_path / "my-task" / "run.yaml").write_text(text)
    (tmp_path / "described").mkdir()
    (tmp_path / "described" / "run.yaml").write_text(text.replace("Say it", "Tell it"))
    found = of_folders(tmp_path)
    assert {run.name for run in found.runs} == {"first", "of rates", "of my-task", "described"}
    assert found.warnings == ()


@pytest.mark.parametrize("place", [".", "runs"])
def test_a_folder_where_a_run_was_described_hides_no_run(tmp_path: Path, place: str) -> None:
    (tmp_path / "runs").mkdir()
    text = (made_run(tmp_path / "runs", "a") / "run.yaml").read_text()
    (tmp_path / place / "run.yaml").write_text(text)
    assert names(of_folders(tmp_path / place))[0] == "a"
    shutil.rmtree(tmp_path / "runs" / "0000")
    (run,) = of_folders(tmp_path / place).runs
    assert run.notes == ["no metrics yet", "not ended"], "it may be about to begin"


def said(*words: object, code: int = 2, cwd: Path = ROOT) -> str:
    """What the command says on the error stream; it ends with `code`, and with one line for a mistake."""
    command = [sys.executable, "-m", "prefix_ds", "compare", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    if code == 2:
        assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_a_terminal_may_not_know_a_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever command writes it: a model's answer, a name, our own ±."""
    monkeypatch.setitem(ENVIRONMENT, "PYTHONIOENCODING", "ascii")
    for seed in range(2):
        made_run(tmp_path, f"straße-s{seed}", f"train.seed={seed}")
    command = [sys.executable, "-m", "prefix_ds", "compare", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=ENVIRONMENT, check=True)
    assert rb"stra\xdfe " in done.stdout
    assert rb"2.0000 \xb1 0.0000" in done.stdout


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    made_run(tmp_path, "a")
    assert said(tmp_path / "0000" / "prefix").endswith(
        "is no run folder and has none in it: there is no run.yaml\n"
    )
    assert "error: compare: name run folders, or an experiment" in said(tmp_path, "--experiment", "x")
    assert "--by bleu: none of these runs has it; known: mfu, peak_gib" in said(tmp_path, "--by", "bleu")
    assert "page.html: cannot be written: No such file" in said(
        tmp_path, "--html", tmp_path / "no" / "page.html"
    )
    assert ".: is a folder; name a file" in said(tmp_path, "--html", ".")
    assert "sqlite:///mlflow.db: there is no such database" in said(cwd=tmp_path)
    assert not (tmp_path / "mlflow.db").exists()
    assert "migrate-filestore" in said("--uri", "file:./mlruns", "--experiment", "x", cwd=tmp_path)
    assert not (tmp_path / "mlruns").exists()


def test_files_that_are_broken_are_named(tmp_path: Path) -> None:
    run = made_run(tmp_path, "a")
    evaluated(run, "test", 1.0, {})
    (run / "evaluate" / "test.json").write_text('{"scores": {"a": 3}')
    (run / "evaluate" / ".tmp-test.json").write_text("{")  # one that is being written
    evaluated(run, "valid", 1.0, {})
    evaluated(made_run(tmp_path, "b", "train.lr=1", loss=1.0), "test", 1.0, {})
    comparison = of_folders(tmp_path)
    assert best(comparison) == ["b"]
    assert row(comparison, "a").notes == ["evaluation damaged"]
    assert row(comparison, "a").values["valid/loss"].value == 1.0
    (warning,) = comparison.warnings
    assert re.search(r"evaluate/test\.json: is no evaluation: .*; evaluate again, or remove it", warning)
    (run / "facts.json").write_text("{")
    with pytest.raises(RunError, match=r"facts\.json: cannot be read"):
        of_folders(run)


def test_a_score_that_may_be_either_of_two_is_asked_back(tmp_path: Path) -> None:
    run = made_run(tmp_path, "a")
    for split in ("test", "valid"):
        evaluated(run, split, 1.0, {"bleu": (1.0, 0.0, 2.0)})
    with pytest.raises(RunError, match="--by bleu: may be any of test/bleu, valid/bleu"):
        of_folders(run, by="bleu")
    assert of_folders(run, by="validation loss").by == "valid_loss"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_may_be_called_anything(tmp_path: Path, name: str) -> None:
    made_run(tmp_path, name, "train.lr=1", f"prefix.text={json.dumps(name)}")
    made_run(tmp_path, "b")
    comparison = of_folders(tmp_path)
    text = on_terminal(comparison)
    assert "\x1b" not in text
    assert "\a" not in text
    assert json.loads(json.dumps(as_data(comparison)))["rows"][0]["name"]
    markup = page_of(comparison, tmp_path)
    assert "<script" not in markup
    assert "<img" not in markup
    assert printable(name) in html.unescape(markup)


def test_a_key_or_a_score_may_be_called_anything(tmp_path: Path) -> None:
    for number in (1, 2):
        run = made_run(tmp_path, f"r{number}", "data.chat=true", f"data.chat_options={{'[/x]': {number}}}")
        evaluated(run, "test", 1.0, {"[y]\x1b": (1.0, 0.0, 2.0)})
    comparison = of_folders(tmp_path)
    assert comparison.keys == ("data.chat_options.[/x]",)
    text = on_terminal(comparison)
    assert "[/x]" in text
    assert "[y]\\x1b" in text
    assert "\x1b" not in page_of(comparison, tmp_path)
    on_terminal(comparison, width=40)


# MLflow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.stop()


def of_mlflow(uri: str, experiment: str, by: str | None = None) -> Comparison:
    from prefix_ds.tracking.experiment import Experiment

    return comparison_of(MlflowRuns(Experiment(uri, experiment)), by)


def plain(comparison: Comparison) -> dict[str, object]:
    """What is said of the runs, without where they are."""
    told = as_data(comparison) | {"source": ""}
    for row in (*told["rows"], *told["runs"]):
        row["places"] = len(row["places"])
    told["warnings"] = [re.sub(r" again \(.*\)$", " again", line) for line in told["warnings"]]
    return told


SCORES = {"rougeL": (40.0, 39.0, 41.0), "bleu": (12.0, 11.0, 13.0)}


def test_folders_and_a_server_give_the_same(server: MlflowServer, tmp_path: Path) -> None:
    a_sweep(tmp_path, experiment="same")
    other = {"train": "a" * 32, "valid": "d" * 32}
    told = [(40, evaluation_metrics("test", 1.7, SCORES) | evaluation_metrics("test.bare", 2.8, SCORES))]
    run = made_run(tmp_path, "other data", digests=other, more=told, experiment="same", status="KILLED")
    for name, loss in (("test", 1.7), ("test.bare", 2.8)):
        evaluated(run, name, loss, SCORES, changed=CHANGED[name])
    running = made_run(tmp_path, "running", "train.lr=7", experiment="same", status="")
    for run in sorted(tmp_path.iterdir()):
        sync_run(run, server.uri)
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    run_id = json.loads((running / "mlflow.json").read_text())["run_id"]
    client.update_run(run_id, status="RUNNING")  # so that its summary is made from histories
    for by in (None, "rougeL"):
        assert plain(of_mlflow(server.uri, "same", by)) == plain(of_folders(tmp_path, by=by))


def test_a_server_knows_what_an_evaluation_read(server: MlflowServer, tmp_path: Path) -> None:
    for run in on_other_data(tmp_path, "read"):
        sync_run(run, server.uri)
    for by in (None, "rougeL"):
        assert plain(of_mlflow(server.uri, "read", by)) == plain(of_folders(tmp_path, by=by))
    run = sorted(tmp_path.iterdir())[0]
    evaluated(run, "test", 1.7, SCORES, "hub://bob:hunter2@elsewhere")  # again, with other data
    sync_run(run, server.uri)
    (warning, *_) = [line for line in of_mlflow(server.uri, "read").warnings if line.startswith("test data")]
    assert "hub://***@elsewhere" in warning


def test_a_server_shows_no_scores_of_an_earlier_evaluation(server: MlflowServer, tmp_path: Path) -> None:
    """A metric cannot be taken back; of a run that has no tag of its scores all are shown."""
    rouge, bleu = ({name: SCORES[name]} for name in ("rougeL", "bleu"))
    told = [(40, evaluation_metrics("test", 1.7, rouge)), (40, evaluation_metrics("test", 1.8, bleu))]
    run = made_run(tmp_path, "a", more=told, experiment="again")
    evaluated(run, "test", 1.8, bleu, "other.jsonl")
    sync_run(run, server.uri)
    assert plain(of_mlflow(server.uri, "again")) == plain(of_folders(tmp_path))
    older = made_run(tmp_path, "b", more=told, experiment="before")
    sync_run(older, server.uri)
    assert {"test/rougeL", "test/bleu"} <= row(of_mlflow(server.uri, "before"), "b").values.keys()


def test_a_server_knows_what_is_outdated_chosen_and_written(server: MlflowServer, tmp_path: Path) -> None:
    told = [*CHRF, (20, evaluation_metrics("test", 1.7, SCORES))]
    stale = made_run(tmp_path, "stale", more=told, experiment="told", targets=1000)
    evaluated(stale, "test", 1.7, SCORES, step=20, generate={"num_beams": 1})
    chosen = made_run(tmp_path, "chosen", *BY_CHRF, more=told, experiment="told", targets=5000)
    evaluated(chosen, "test", 1.7, SCORES, step=20, generate={"num_beams": 1})
    other = made_run(tmp_path, "other", "train.lr=2", more=told, experiment="told")
    evaluated(other, "test", 1.7, SCORES, targets=77, generate={"num_beams": 8})
    for number, status in enumerate(("FINISHED", "FINISHED", "FAILED")):
        made_run(tmp_path, f"s{number}", "train.lr=3", loss=number, status=status, experiment="told")
    running = made_run(tmp_path, "running", *BY_CHRF, "train.lr=4", more=told, experiment="told", status="")
    evaluated(running, "test", 1.7, SCORES, step=20)
    for run in sorted(tmp_path.iterdir()):
        sync_run(run, server.uri)
    from mlflow import MlflowClient

    run_id = json.loads((running / "mlflow.json").read_text())["run_id"]
    MlflowClient(server.uri).update_run(run_id, status="RUNNING")
    for by in (None, "rougeL", "valid/chrf"):
        assert plain(of_mlflow(server.uri, "told", by)) == plain(of_folders(tmp_path, by=by))
    found = of_mlflow(server.uri, "told")
    assert row(found, "stale").notes == ["evaluated earlier"]
    assert row(found, "s").values["valid_loss"].value == 1.0
    assert any("were written differently" in line for line in found.warnings)


def test_a_prefix_that_mlflow_lost_is_told(server: MlflowServer, tmp_path: Path) -> None:
    run = made_run(tmp_path, "a", experiment="lost")
    sync_run(run, server.uri)
    assert of_mlflow(server.uri, "lost").warnings == ()
    state = json.loads((run / "mlflow.json").read_text())
    shutil.rmtree(
        server.folder / "artifacts" / state["experiment_id"] / state["run_id"] / "artifacts" / "prefix"
    )
    assert of_mlflow(server.uri, "lost").warnings == (f"a: its result is gone ({state['run_id']})",)


def test_a_prefix_that_mlflow_was_not_sent_yet_is_not_lost(server: MlflowServer, tmp_path: Path) -> None:
    from prefix_ds.tracking.mlflow_run import MlflowRun

    run = made_run(tmp_path, "a", experiment="on its way")
    there = MlflowRun(run, server.uri)
    there.open()
    list(there.send_metrics())
    there.send_summary()
    there.send_status("FINISHED")
    assert row(of_mlflow(server.uri, "on its way"), "a").values["result_bytes"].value == 1000
    assert of_mlflow(server.uri, "on its way").warnings == ()


def test_a_database_can_be_read_where_its_files_cannot(server: MlflowServer, tmp_path: Path) -> None:
    sync_run(made_run(tmp_path, "a", experiment="files elsewhere"), server.uri)
    found = of_mlflow(f"sqlite:///{server.folder}/mlflow.db", "files elsewhere")
    assert plain(found) == plain(of_mlflow(server.uri, "files elsewhere"))
    assert found.warnings == ()


def test_a_run_that_mlflow_knows_nothing_of_is_shown_as_such(server: MlflowServer) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    client.create_run(client.create_experiment("begun"), run_name="begun")
    assert row(of_mlflow(server.uri, "begun"), "begun").notes == ["no metrics yet", "not ended"]


def test_the_report_is_kept_and_seeds_are_nested(server: MlflowServer, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    for run in a_sweep(tmp_path, experiment="kept"):
        sync_run(run, server.uri)
    before = plain(of_mlflow(server.uri, "kept"))
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("kept")
    (hung,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'prefix-0.3-s2'")
    client.set_tag(hung.info.run_id, "mlflow.parentRunId", "a parent of the user's")
    for _ in range(2):
        compare(Request(experiment="kept", uri=server.uri, log=True))
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 7 + 3
    report = runs["comparison by validation loss"].info.run_id
    assert [file.path for file in client.list_artifacts(report)] == ["comparison.json", "report.html"]
    parent = runs["prefix-0.3 (3 seeds)"]
    assert runs["prefix-0.3-s1"].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert runs["prefix-0.3-s2"].data.tags["mlflow.parentRunId"] == "a parent of the user's"
    assert "mlflow.parentRunId" not in runs["full"].data.tags
    assert parent.data.metrics["summary/valid_loss"] == pytest.approx(1.42)
    assert parent.info.status == "FINISHED"
    assert plain(of_mlflow(server.uri, "kept")) == before, "made runs are none of those compared"


def test_a_parent_has_no_mean_of_before_and_a_deleted_one_no_children(
    server: MlflowServer, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    scores = [(40, evaluation_metrics("test", 1.7, SCORES))]
    for seed in (0, 1):
        run = made_run(tmp_path, f"a-s{seed}", f"train.seed={seed}", more=scores, experiment="again")
        sync_run(run, server.uri)
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("again")

    def logged() -> dict[str, Any]:
        compare(Request(experiment="again", uri=server.uri, log=True))
        return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}

    parent = logged()["a (2 seeds)"]
    assert parent.data.metrics["evaluate/test/loss"] == 1.7
    client.log_metric(parent.info.run_id, "evaluate/test/gone", 9.0)
    metrics = logged()["a (2 seeds)"].data.metrics
    assert math.isnan(metrics["evaluate/test/gone"])
    assert metrics["evaluate/test/loss"] == 1.7
    client.delete_run(parent.info.run_id)
    runs = logged()
    assert runs["a (2 seeds)"].info.run_id != parent.info.run_id
    for seed in (0, 1):
        assert runs[f"a-s{seed}"].data.tags["mlflow.parentRunId"] == runs["a (2 seeds)"].info.run_id


def test_an_unknown_experiment_names_those_that_exist(server: MlflowServer, tmp_path: Path) -> None:
    sync_run(made_run(tmp_path, "a", experiment="known"), server.uri)
    words = said("--experiment", "unknown", "--uri", server.uri)
    assert re.search(r"has no experiment 'unknown'; it has: .*known", words)


def test_a_server_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    words = said("--uri", f"http://bob:hunter2@127.0.0.1:{free_port()}")
    assert re.match(r"error: http://\*\*\*@127.0.0.1:\d+: MLflow does not answer", words)
    assert "hunter2" not in words
    (tmp_path / "text.db").write_text("this is no database" * 100)
    assert "text.db: MLflow does not answer" in said("--uri", f"sqlite:///{tmp_path}/text.db")


# The page

needs_browser = pytest.mark.skipif(not PROGRAM, reason="no chromium: apt-get install chromium")


def test_the_page_names_no_other_place(tmp_path: Path) -> None:
    a_sweep(tmp_path)
    text = page_of(of_folders(tmp_path), tmp_path)
    assert "://" not in text
    assert not re.search(r"<(script|img|iframe|object|embed)|@import|url\((?!#)", text)
    assert text.startswith("<!doctype html>")


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with opened() as tab:
        yield tab


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_opens_without_a_network(tab: Tab, tmp_path: Path, scheme: str, width: int) -> None:
    runs = tmp_path / "runs"
    for run in a_sweep(runs)[:4]:
        evaluated(run, "test", 1.7, SCORES)
    made_run(runs, "other", "train.lr=9", digests={"train": "a" * 32, "valid": "e" * 32})
    file = tmp_path / "page.html"
    file.write_text(page_of(of_folders(runs), runs))
    tab.show(file, width, scheme)
    assert tab.requests == [file.as_uri()]
    assert tab.complaints == []
    counts = "['table', 'caption', 'figure svg', 'polyline', 'circle', '.badge', 'tr.best', '.warnings li']"
    found = tab.ask(f"{counts}.map(s => document.querySelectorAll(s).length)")
    assert found[:3] == [5, 5, 4]
    assert found[3:] == [8 * 3, 4, 8, 8, 1]
    assert tab.ask("document.documentElement.scrollWidth <= window.innerWidth"), (
        "the page itself never scrolls"
    )
    assert tab.ask("[...document.querySelectorAll('th')].every(t => t.scope)")
    drawn = tab.ask("[...document.querySelectorAll('polyline')].map(p => getComputedStyle(p).stroke)")
    assert len(set(drawn)) > 2
    assert contrast(tab) > 4.5


@needs_browser
def test_nothing_in_a_name_is_run(tab: Tab, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    for number, name in enumerate(HOSTILE):
        made_run(runs, name, f"train.lr={number}", f"prefix.text={json.dumps(name)}", steps=10)
    file = tmp_path / "page.html"
    file.write_text(page_of(of_folders(runs), runs))
    tab.show(file)
    assert (tab.requests, tab.complaints) == ([file.as_uri()], [])
    assert tab.ask("document.scripts.length + document.images.length") == 0
    heads = tab.ask("[...document.querySelectorAll('tbody th')].map(t => t.title)")
    assert set(map(printable, HOSTILE)) <= set(heads)


@needs_browser
def test_a_reader_of_screens_is_told_what_is_drawn(tab: Tab, tmp_path: Path) -> None:
    a_sweep(tmp_path / "runs")
    file = tmp_path / "page.html"
    file.write_text(page_of(of_folders(tmp_path / "runs"), tmp_path / "runs"))
    tab.show(file)
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    told = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored")]
    images = [name for role, name in told if role in ("image", "img")]
    assert any(name.startswith("Validation loss by step 7 curves of loss") for name in images)
    assert {"columnheader", "rowheader", "table", "heading"} <= {role for role, _ in told}


def contrast(tab: Tab) -> float:
    """Between text and page, by the formula of WCAG."""
    colours = tab.ask(
        "['color', 'backgroundColor'].map(k => getComputedStyle(document.body)[k].match(/\\d+/g).map(Number))"
    )
    light, dark = sorted((luminance(c) for c in colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: list[float]) -> float:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_an_empty_place_is_one_line() -> None:
    with pytest.raises(RunError, match="nothing: there are no runs"):
        compared("nothing", [])
