"""Where numbers go: each is on disk before the next line runs, and no secret is written anywhere."""

import contextlib
import io
import json
import logging
import subprocess
import time
from pathlib import Path

import pytest
from rich.console import Console

from prefix_ds.errors import RunError, Stopped
from prefix_ds.tracking import (
    Facts,
    flattened,
    masked,
    open_tracker,
    process_tags,
    progress_bar,
    read_metrics,
    result_bytes,
    sync_run,
    without_secrets,
)
from prefix_ds.tracking import progress as progress_module
from prefix_ds.tracking.facts import read_facts, write_facts
from prefix_ds.tracking.metrics import Metrics, append_record
from prefix_ds.tracking.mirror import _MaskingFormatter, _said


def facts_of(run: Path, **params: object) -> Facts:
    return Facts("tests", run.name, flattened(params), {"team": "summaries"})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An empty run folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


# metrics.jsonl


def test_every_record_is_on_disk_before_the_next_line_runs(run: Path) -> None:
    metrics = Metrics(run, None)
    for step in range(5):
        before = time.time()
        metrics.write(step, {"a/b": step / 3, "nan": float("nan"), "big": 10**20})
        last = read_metrics(run)[-1]
        assert (last.step, last.values["a/b"], last.values["big"]) == (step, step / 3, 10**20)
        assert last.values["nan"] != last.values["nan"]
        assert before <= last.time <= time.time()
    line = (run / "metrics.jsonl").read_text().splitlines()[3]
    assert list(json.loads(line)) == ["step", "time", "a/b", "nan", "big"]


@pytest.mark.parametrize(
    ("resume_step", "kept"), [(None, []), (0, [0]), (20, [0, 10, 20]), (99, [0, 10, 20, 30])]
)
def test_a_run_that_goes_on_drops_what_it_will_write_again(
    run: Path, resume_step: int | None, kept: list[int]
) -> None:
    metrics = Metrics(run, None)
    for step in (0, 10, 20, 30):
        metrics.write(step, {"x": float(step)})
    metrics.close()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "time": 1.0, "x": 4')  # the power went off
    Metrics(run, resume_step).write(50, {"x": 5.0})
    assert [r.step for r in read_metrics(run)] == [*kept, 50]


def test_damaged_lines_are_told_and_skipped(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = '{"step": 1, "time": 1.0, "x": 4.0}\n'
    bad = ["\0\0\0\0\n", "[]\n", '{"step": 1}\n', "\n", "\ufffd{\n"]
    (run / "metrics.jsonl").write_text(good + "".join(bad) + good)
    assert [r.values for r in read_metrics(run)] == [{"x": 4.0}] * 2
    assert caplog.text.count("damaged line") == len(bad)


@pytest.mark.parametrize("part", ['"step": null, "time": 1, "x": 1', '"step": 2, "time": 1, "x": "high"'])
def test_a_line_of_odd_values_is_skipped(part: str, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "metrics.jsonl").write_text(f'{{{part}}}\n{{"step": 3, "time": 1, "x": NaN}}\n')
    assert [record.step for record in read_metrics(run)] == [3]
    assert "skipping a damaged line" in caplog.text


def test_metrics_that_cannot_be_read_are_one_line(run: Path) -> None:
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be read: Is a directory"):
        read_metrics(run)


def test_what_is_being_written_is_no_result(run: Path) -> None:
    (run / "prefix").mkdir()
    (run / "prefix" / ".tmp-prefix.safetensors").write_bytes(bytes(9))
    assert result_bytes(run) is None
    (run / "prefix" / "prefix.safetensors").write_bytes(bytes(7))
    assert result_bytes(run) == 7


def test_facts_of_odd_values_are_one_line(run: Path) -> None:
    write_facts(run, facts_of(run), goes_on=False)
    tree = json.loads((run / "facts.json").read_text())
    (run / "facts.json").write_text(json.dumps(tree | {"params": None}))
    with pytest.raises(RunError, match=r"facts\.json: cannot be read"):
        read_facts(run)


def test_what_is_added_behind_half_a_line_is_whole(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    append_record(run, 1, {"x": 1.0})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "t')  # a disk was full
    append_record(run, 3, {"x": 3.0})
    append_record(run, 4, {"x": 4.0})
    assert [r.step for r in read_metrics(run)] == [1, 3, 4]
    assert caplog.text.count("damaged line") == 1


def test_a_full_disk_is_a_clear_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(run, None)
    metrics._file.close()
    metrics._file = Path("/dev/full").open("w")  # noqa: SIM115 - the object under test closes it
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written: No space left on device"):
        metrics.write(1, {"x": 1.0})
    with contextlib.suppress(OSError):
        metrics._file.close()


def test_a_full_disk_costs_a_line_and_not_the_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise RunError("no space")

    with open_tracker(run, facts_of(run), uri=None, resume_step=None) as tracker:
        monkeypatch.setattr(Metrics, "write", refuse)
        tracker.metrics(1, {"x": 1.0})
    assert "no space" in caplog.text
    assert read_facts(run).status == "FINISHED"


def test_only_the_first_rank_writes(run: Path) -> None:
    with open_tracker(run, facts_of(run), uri="http://nowhere", resume_step=None, is_first=False) as tracker:
        tracker.metrics(1, {"x": 1.0})
    assert list(run.iterdir()) == []


# Secrets

SECRETS = [
    "http://bob:hunter2@host:5000/path",
    "https://bob:hun@ter2@host/",
    "mlflow.uri=postgresql://bob:hun/ter2@host/db",
    "postgresql+psycopg2://bob:hunter2@db:5432/mlflow?sslmode=require",
    "mysql://host/db?user=bob&password=hunter2&x=1",
    "postgresql://db/mlflow?user=bob&pass=hunter2",
    "DB_PASS=hunter2",
    "SSH_KEY: hunter2",
    "train run.yaml --hub-token hunter2 --verbose",
    "train run.yaml --hub-token=hunter2",
    "mlflow.tags={'api_key': 'hunter2'}",
    'AWS_SECRET_ACCESS_KEY="hunter2 and more"',
    "Authorization: Bearer hunter2hunter2",
    "PASSWORD: hunter2",
    "cloning with hf_hunter2hunter2hunter2",
    "MLFLOW_TRACKING_TOKEN=hunter2",
]


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_masked_wherever_they_stand(text: str) -> None:
    assert "hun" not in masked(text)
    assert "***" in masked(text)


@pytest.mark.parametrize("password", ["p/w:x", "p@w", "%40%2F", "a b", "$(x)", "it's-secret", 'a"b'])
def test_the_password_of_a_known_uri_is_masked_in_any_spelling(password: str) -> None:
    uri = f"http://bob:{password}@host/"
    decoded = {"%40%2F": "@/"}.get(password, password)
    for text in (uri, f"no host in {password}", f"cannot parse '{decoded}'", f"bob:{password} was refused"):
        assert password not in masked(text, uri)
        assert f"'{decoded}'" not in masked(text, uri)


@pytest.mark.parametrize("password", ["it's-secret", "a b", 'a"b', "plain"])
def test_a_password_on_the_command_line_is_masked_before_it_is_quoted(password: str) -> None:
    uri = f"http://bob:{password}@host/"
    line = process_tags(["prefix-ds", "train", "run.yaml", f"mlflow.uri={uri}"], uri)["mlflow.source.name"]
    assert line == "prefix-ds train run.yaml 'mlflow.uri=http://***@host/'"


@pytest.mark.parametrize("secret", ["correct horse battery", "ab,cd;ef", "it's-me"])
def test_what_bears_the_name_of_a_secret_is_masked_whole(secret: str, run: Path) -> None:
    tree = {"tags": {"api_key": secret, "a": [{"x.password": secret}]}, "token": ""}
    assert without_secrets(tree) == {"tags": {"api_key": "***", "a": [{"x.password": "***"}]}, "token": ""}
    line = process_tags(["prefix-ds", f"mlflow.tags.password={secret}"])["mlflow.source.name"]
    assert line == "prefix-ds 'mlflow.tags.password=***'"


def test_a_template_keeps_its_words_and_no_secret() -> None:
    texts = {"prompt": "Token: {token} Tag:", "target": "secret={x} hf_hunter2hunter2hunter2"}
    kept = texts | {"target": "secret={x} ***"}
    assert without_secrets({"data": texts}) == {"data": kept}
    flat = {f"data.{name}": text for name, text in texts.items()}
    assert without_secrets({"params": flat}) == {"params": {f"data.{n}": text for n, text in kept.items()}}


def test_a_path_has_no_password() -> None:
    uri = "sqlite:////home/ann@corp.com/mlflow.db"
    assert masked(uri, uri) == uri


def test_a_user_without_a_password_leaves_other_words_whole() -> None:
    uri = "http://mlflow@mlflow.company.com"
    assert masked(f"mlflow: {uri}", uri) == "mlflow: http://***@mlflow.company.com"
    uri = "http://tok12345tok@host"
    assert masked("refused tok12345tok", uri) == "refused ***"


def test_a_line_is_masked_before_it_is_cut() -> None:
    uri = f"https://oauth:{'e' * 400}@host/"
    told = _said(OSError(f"API request to {uri} failed"))
    record = logging.LogRecord("x", logging.WARNING, "", 1, told, (), None)
    assert "eeee" not in _MaskingFormatter(uri).format(record)


@pytest.mark.parametrize("password", ["mlflow", "p", "db"])
def test_a_password_that_is_an_everyday_word_leaves_other_words_whole(password: str) -> None:
    uri = f"postgresql://mlflow:{password}@host/"
    text = f"mlflow:\n  uri: {uri}\n  tags: dbs, ps\n"
    assert masked(text, uri) == "mlflow:\n  uri: postgresql://***@host/\n  tags: dbs, ps\n"


@pytest.mark.parametrize(
    "text",
    [
        "generate.max_new_tokens=128",
        "train.micro_batch_tokens: 8192",
        "model.tokenizer=acme/tok",
        "sqlite:////tmp/a@b/mlflow.db",
        "http://host:5000/#/experiments/1",
        "30 tokens/s, 12 keys: all fine",
        "second pass: 3 of 4, key: none",
    ],
)
def test_what_is_no_secret_stays_readable(text: str) -> None:
    assert masked(text) == text


# What is told about a run


def test_facts_are_flat_text() -> None:
    tree = {"train": {"lr": 5e-3, "betas": (0.9, 0.99)}, "data": {"train": None, "packing": True}, "seed": 0}
    assert flattened(tree) == {
        "train.lr": "0.005",
        "train.betas": "[0.9, 0.99]",
        "data.packing": "true",
        "seed": "0",
    }


def test_process_tags_tell_how_to_do_it_again() -> None:
    tags = process_tags(["prefix-ds", "train", "my run.yaml", "--token", "hunter2"])
    assert tags["mlflow.source.name"] == "prefix-ds train 'my run.yaml' --token ***"
    assert tags["version.torch"].startswith("2.")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert tags.get("mlflow.source.git.commit", "") == commit.stdout.strip()


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (Stopped(), "KILLED"), (ValueError(), "FAILED")]
)
def test_the_status_tells_how_the_run_ended(run: Path, error: BaseException | None, status: str) -> None:
    with (
        contextlib.suppress(Stopped, ValueError),
        open_tracker(run, facts_of(run), uri=None, resume_step=None),
    ):
        if error is not None:
            raise error
    assert read_facts(run).status == status


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"facts\.json.*a run folder was expected"):
        sync_run(tmp_path, "http://nowhere")
    with pytest.raises(RunError, match=r"facts\.json.*a run folder was expected"):
        sync_run(tmp_path / "nothere", "http://nowhere")


def test_a_run_that_cannot_be_sent_from_its_folder_is_one_line(run: Path) -> None:
    write_facts(run, facts_of(run), goes_on=False)
    with pytest.raises(RunError, match=r"give its URI \(--uri\)"):
        sync_run(run)
    (run / ".mlflow.lock").mkdir()
    with pytest.raises(RunError, match="cannot be written: Is a directory"):
        sync_run(run, "http://nowhere")


# Progress


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120, legacy_windows=False)
    monkeypatch.setattr(progress_module, "CONSOLE", terminal)
    with progress_bar("training", 10) as bar:
        bar.at(10, loss=1.23456, state="saving")
    assert "training" in screen.getvalue()
    assert "10/10" in screen.getvalue()
    assert "loss 1.235  state saving" in screen.getvalue()


def test_progress_in_a_file_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    screen = io.StringIO()
    monkeypatch.setattr(progress_module, "CONSOLE", Console(file=screen))
    with progress_bar("training", 1000, log_every_seconds=3600) as bar:
        for step in range(1, 1001):
            bar.at(step, loss=2.5)
        bar.at(1000, loss=2.5)  # the last step is validated and saved, and told again
    assert caplog.messages == ["training 1000/1000  loss 2.5  0:00:00 left"]
    with (
        progress_bar("training", 4, log_every_seconds=0) as bar,
        progress_bar("x", 4, is_visible=False) as hidden,
    ):
        for step in range(1, 4):
            bar.at(step)
            hidden.at(step)
    assert [m.split()[1] for m in caplog.messages[1:]] == ["1/4", "2/4", "3/4"]
    assert screen.getvalue() == ""
