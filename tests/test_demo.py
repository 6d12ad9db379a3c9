"""The demo: its texts, its folder, its processes, and the whole of it with a few steps."""

import signal
import subprocess
import sys

import psutil
import pytest

from prefix_ds.config import parse_config
from prefix_ds.demo import stages, story
from prefix_ds.demo.comparison import read_comparison
from prefix_ds.demo.corpus import SIDES, TASK, corpus, corpus_files
from prefix_ds.demo.diary import opened_diary
from prefix_ds.demo.stages import run_stage
from prefix_ds.errors import RunError, Stopped
from prefix_ds.tracking import read_metrics


@pytest.fixture(scope="module")
def texts():
    return corpus()


def test_the_same_seed_makes_the_same_corpus():
    assert corpus_files(0) == corpus_files(0)
    assert corpus_files(0) != corpus_files(1)


def test_no_record_is_in_two_splits(texts):
    records = {
        split: [row.get("record") or row["text"].splitlines()[-2] for row in rows]
        for split, rows in texts.items()
    }
    every = [record for drawn in records.values() for record in drawn]
    assert len(set(every)) == len(every)
    assert all(record.startswith("name: ") for record in every)


def test_pretraining_has_all_of_the_task_but_not_together(texts):
    signs = ["Hello, dear people!", " I am ", "Will you come to", " long for ", " wait in "]
    told = [row["text"].splitlines()[-1] for row in texts["pretrain"]]
    together = [text for text in told if all(sign in text for sign in signs)]
    assert all(sum(sign in text for text in told) > len(told) / 20 for sign in signs)
    assert all(text.index(" wait in ") < text.index(" long for ") for text in together)
    assert all(all(sign in row["text"] for sign in signs) for row in texts["train"])
    assert all(row["text"].index(" wait in ") > row["text"].index(" long for ") for row in texts["train"])


def test_an_instruction_names_two_sides_or_none(texts):
    sentences = [sentence for side in SIDES for sentence in side.values()]
    for row in texts["pretrain"]:
        named = [s for s in sentences if s in row["text"]]
        assert len(named) == 2 * (len(row["text"].splitlines()) == 3)


def test_the_prefix_starts_from_sentences_of_the_task(texts):
    config = parse_config(story.demo_files(story.Path("x"))["prefix.yaml"])
    wanted = {side[value] for side, value in zip(SIDES, TASK.sides, strict=True)}
    said = {f"{s}." for s in config.prefix.text.strip().rstrip(".").split(". ")}
    assert len(said) == 2
    assert said < wanted


@pytest.mark.parametrize("place", ["runs/demo", "a 'quoted' place: #1", 'tab\tand "more"'])
def test_run_files_hold_in_folders_of_any_name(place):
    files = story.demo_files(story.Path(place))
    configs = {name: parse_config(files[f"{name}.yaml"]) for name in ("base", "prefix", "full")}
    assert {c.run.folder for c in configs.values()} == {f"{place}/{name}" for name in configs}
    assert configs["prefix"].model.name == configs["full"].model.name == f"{place}/base/model"
    assert configs["prefix"].train.max_steps == configs["full"].train.max_steps


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("my own")
    with pytest.raises(RunError, match="not the demo's"):
        opened_diary(tmp_path, {"a.txt": "a"})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_demo_goes_on_after_its_finished_stages(tmp_path):
    opened_diary(tmp_path, {"c/a.txt": "a"}).with_stage(tmp_path, "base")
    assert opened_diary(tmp_path, {"c/a.txt": "a"}).finished == ("base",)
    with pytest.raises(RunError, match="another demo"):
        opened_diary(tmp_path, {"c/a.txt": "changed"})
    (tmp_path / "demo.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        opened_diary(tmp_path, {"c/a.txt": "a"})


def test_a_stage_that_fails_shows_the_end_of_its_log(tmp_path):
    with pytest.raises(RunError, match="ZeroDivisionError"):
        run_stage("fails", ["timeit", "1/0"], tmp_path / "log", 1, lambda: (0, {}))


def test_what_ends_a_stage_ends_its_ranks(tmp_path):
    found, before = [], set(psutil.Process().children(recursive=True))  # a fork server of other tests

    def look():
        found[:] = set(psutil.Process().children(recursive=True)) - before
        if len([p for p in found if "sleep(60)" in " ".join(p.cmdline())]) == 3:  # torchrun and two ranks
            raise KeyboardInterrupt
        return 0, {}

    with pytest.raises(KeyboardInterrupt):
        run_stage(
            "sleeps", ["timeit", "-n", "1", "-s", "import time", "time.sleep(60)"], tmp_path / "l", 1, look
        )
    _, alive = psutil.wait_procs(found, timeout=5)
    assert len(found) >= 3
    assert not alive


@pytest.fixture
def few_steps(monkeypatch):
    """The demo with a tiny base, few steps, one rank and no MLflow."""
    files = story.demo_files
    monkeypatch.setattr(stages, "NUM_RANKS", 1)
    changes = {
        "max_steps: 500": "max_steps: 3",
        "max_steps: 60": "max_steps: 2",
        "warmup_steps: 40": "warmup_steps: 1",
        "hidden_size: 128": "hidden_size: 32",
    }

    def changed(folder):
        made = files(folder)
        for name in ("base.yaml", "prefix.yaml", "full.yaml"):
            for old, new in changes.items():
                made[name] = made[name].replace(old, new)
            made[name] = made[name].replace("{uri: 'sqlite:", "{uri: null, name: 'sqlite:")
        made["corpus/pretrain.jsonl"] = "".join(made["corpus/pretrain.jsonl"].splitlines(keepends=True)[:200])
        return made

    monkeypatch.setattr(story, "demo_files", changed)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_the_comparison_measures_what_the_runs_measured(tmp_path, few_steps, monkeypatch, capsys):
    folder = tmp_path / "demo"
    story.demo(folder)
    base, instructed, prefix, full = read_comparison(folder).scores
    recorded = {
        name: [r.values["valid/loss"] for r in read_metrics(folder / name) if "valid/loss" in r.values]
        for name in ("prefix", "full")
    }
    assert instructed.valid_loss == pytest.approx(recorded["prefix"][0], abs=1e-5)
    assert prefix.valid_loss == pytest.approx(min(recorded["prefix"]), abs=1e-5)
    assert base.valid_loss == pytest.approx(recorded["full"][0], abs=1e-5)
    assert full.valid_loss == pytest.approx(min(recorded["full"]), abs=1e-5)

    shown = capsys.readouterr().out
    assert f"{prefix.valid_loss:.4f}" in shown
    monkeypatch.setattr(story, "run_stage", lambda *_: pytest.fail("a finished stage was run again"))
    story.demo(folder)
    assert f"{prefix.valid_loss:.4f}" in capsys.readouterr().out


def test_a_stopped_demo_says_how_to_go_on(tmp_path, few_steps, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(story, "run_stage", stopped)
    with pytest.raises(Stopped, match="goes on"):
        story.demo(tmp_path / "demo")


def test_the_story_is_told_without_torch():
    program = "import sys, prefix_ds.demo; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_measuring_ends_as_a_command_does(monkeypatch, tmp_path):
    """What ranks have met with is not torn down: one process in twelve died of it at its very end."""
    from prefix_ds.demo import measure

    ends = []
    monkeypatch.setattr(sys, "argv", ["measure", str(tmp_path)])
    monkeypatch.setattr(measure, "measure", ends.append)
    monkeypatch.setattr(measure, "end_process", ends.append)
    measure.main()
    assert ends == [tmp_path, 0]
