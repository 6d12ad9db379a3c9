"""MLflow gets each record once, whatever its server does.

Laws: MLflow never stops or slows the trainer; an outage, a killed trainer and a resumed run lose nothing and
double nothing; no process outlives the trainer by more than its patience; no secret arrives anywhere.

The servers are real: MLflow's own on loopback, and a socket that accepts and never answers.
"""

import base64
import contextlib
import logging
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from prefix_ds.cli import app
from prefix_ds.errors import RunError
from prefix_ds.tracking import (
    DatasetFacts,
    Facts,
    add_metrics,
    flattened,
    open_tracker,
    process_tags,
    read_metrics,
    sync_run,
)
from prefix_ds.tracking.facts import cut, read_facts
from prefix_ds.tracking.machine import Machine
from prefix_ds.tracking.mlflow_run import MlflowRun
from prefix_ds.tracking.mlflow_terms import PARAMETER_LENGTH
from prefix_ds.tracking.state import only_writer, read_state
from tests.mlflow_server import MlflowServer, free_port, silent_server

ROOT = Path(__file__).parents[1]
PATIENCE = 20.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    yield
    children = psutil.Process().children(recursive=True)
    assert not [p for p in children if "prefix_ds.tracking.mirror" in p.cmdline()]


def facts_of(run: Path, **params: object) -> Facts:
    return Facts("tests", run.name, flattened(params), {"team": "summaries"})


def runs_named(uri: str, name: str) -> list[Run]:
    client = MlflowClient(uri)
    ids = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(ids, f"attributes.run_name = '{name}'", order_by=["start_time"]))


def only_run(uri: str, run: Path) -> Run:
    (found,) = runs_named(uri, run.name)
    return found


def history(uri: str, found: Run, name: str = "train/loss") -> list[tuple[int, float]]:
    metrics = MlflowClient(uri).get_metric_history(found.info.run_id, name)
    return sorted((m.step, m.value) for m in metrics)


def losses(steps: range) -> list[tuple[int, float]]:
    return [(step, 1 / (step + 1)) for step in steps]


def write_losses(tracker: object, steps: range) -> None:
    for step, loss in losses(steps):
        tracker.metrics(step, {"train/loss": loss, "train/lr": 0.1})  # type: ignore[attr-defined]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose name no other test has."""
    folder = tmp_path / f"run-{random.randrange(10**9)}"
    folder.mkdir()
    return folder


def recorded(run: Path, steps: range, resume_step: int | None = None, status: str = "FINISHED") -> None:
    """A run that happened without MLflow."""
    tracker = open_tracker(run, facts_of(run, lr=0.1), uri=None, resume_step=resume_step)
    write_losses(tracker, steps)
    tracker.close(status)  # type: ignore[arg-type]


# MLflow: everything arrives, once

PASSWORD = "hunter2"


def with_secrets(run: Path) -> Facts:
    (run / "run.yaml").write_text(f"mlflow: {{uri: 'http://bob:{PASSWORD}@host'}}\n")
    (run / "deepspeed.json").write_text("{}")
    (run / "prefix").mkdir()
    (run / "prefix" / "prefix.safetensors").write_bytes(bytes(range(256)))
    params = {"model": {"name": "acme/tiny"}, "data": {"prompt": "x" * 7000}, "odd key (%)": 1}
    params["hub"] = {"api_key": PASSWORD, "url": f"https://bob:{PASSWORD}@hub/"}
    tags = {"note": f"token={PASSWORD}", "password": PASSWORD} | process_tags(["x", "--token", PASSWORD])
    data = DatasetFacts("dialogues", "d1" * 20, "training", f"https://bob:{PASSWORD}@host/train.jsonl")
    return Facts("tests", run.name, flattened(params), tags, (data,))


def test_a_run_arrives_whole_and_without_secrets(
    server: MlflowServer, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    uri = server.uri.replace("//", f"//bob:{PASSWORD}@")
    with open_tracker(
        run, with_secrets(run), uri=uri, resume_step=None, patience_seconds=PATIENCE
    ) as tracker:
        arguments = [word for p in psutil.Process().children() for word in p.cmdline()]
        write_losses(tracker, range(200))
        tracker.metrics(200, {"odd (%)": 1.0, "nan": float("nan"), "inf": float("inf")})
    found = only_run(server.uri, run)
    assert found.info.status == "FINISHED"
    assert history(server.uri, found) == losses(range(200))
    assert found.data.metrics["odd ___"] == 1.0
    assert found.data.metrics["nan"] != found.data.metrics["nan"]
    assert found.data.params["model.name"] == "acme/tiny"
    assert len(found.data.params["data.prompt"]) == 6000
    assert found.data.tags["version.torch"].startswith("2.")
    assert found.inputs.dataset_inputs[0].dataset.name == "dialogues"
    client = MlflowClient(server.uri)
    files = {a.path for a in client.list_artifacts(found.info.run_id)}
    assert files == {"run.yaml", "deepspeed.json", "facts.json", "metrics.jsonl", "prefix"}
    saved = list((server.folder / "artifacts").rglob("prefix.safetensors"))
    assert [p.read_bytes() for p in saved] == [bytes(range(256))]
    assert sync_run(run, uri) == 0  # nothing is left to send

    (run / "run.yaml").unlink()  # the user's own, not written by tracking
    written = [p for folder in (run, server.folder) for p in folder.rglob("*") if p.is_file()]
    assert len(written) > 8
    assert [p for p in written if PASSWORD.encode() in p.read_bytes()] == []
    assert PASSWORD not in caplog.text + " ".join(arguments)
    assert "mirror" in " ".join(arguments)


def test_a_run_that_goes_on_is_one_run_and_no_step_is_doubled(server: MlflowServer, run: Path) -> None:
    recorded(run, range(60), status="KILLED")
    assert sync_run(run, server.uri) == 60
    first = only_run(server.uri, run)
    recorded(run, range(41, 100), resume_step=40)
    assert sync_run(run, server.uri) == 40  # 60 to 99: the server has the others
    again = only_run(server.uri, run)
    assert again.info.run_id == first.info.run_id
    assert history(server.uri, again) == losses(range(100))


def test_a_second_evaluation_of_one_step_arrives_and_a_repetition_does_not(
    server: MlflowServer, run: Path
) -> None:
    recorded(run, range(0))
    for score in (0.5, 0.5, 0.75, float("nan"), float("nan")):
        tracker = open_tracker(run, facts_of(run, lr=0.1), uri=None, resume_step=7)
        tracker.metrics(7, {"test/rouge": score})
        tracker.close("FINISHED")
        sync_run(run, server.uri)
    assert len(read_metrics(run)) == 5
    found = only_run(server.uri, run)
    values = [value for _, value in history(server.uri, found, "test/rouge")]
    assert sorted(map(str, values)) == ["0.5", "0.75", "nan"]


def test_a_run_from_the_start_is_a_new_run(server: MlflowServer, run: Path) -> None:
    recorded(run, range(3))
    sync_run(run, server.uri)
    with open_tracker(
        run, facts_of(run), uri=server.uri, resume_step=None, patience_seconds=PATIENCE
    ) as tracker:
        write_losses(tracker, range(5))
    old, new = runs_named(server.uri, run.name)
    assert history(server.uri, old) == losses(range(3))
    assert history(server.uri, new) == losses(range(5))


def test_a_parameter_that_changed_becomes_a_tag(server: MlflowServer, run: Path) -> None:
    for size, step in ((8, None), (16, 0)):
        open_tracker(run, facts_of(run, size=size), uri=None, resume_step=step).close("FINISHED")
        sync_run(run, server.uri)
    found = only_run(server.uri, run)
    assert (found.data.params["size"], found.data.tags["now.size"]) == ("8", "16")
    open_tracker(run, facts_of(run, size=8), uri=None, resume_step=0).close("FINISHED")
    sync_run(run, server.uri)
    assert only_run(server.uri, run).data.tags["now.size"] == "8"


def test_long_texts_that_differ_at_their_end_stay_two() -> None:
    one, other = (cut("x" * 7000 + end, PARAMETER_LENGTH) for end in "ab")
    assert one != other
    assert len(one) == PARAMETER_LENGTH


def test_a_run_the_server_lost_is_made_again_in_full(
    server: MlflowServer, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorded(run, range(10))
    sync_run(run, server.uri)
    MlflowClient(server.uri).delete_run(only_run(server.uri, run).info.run_id)
    assert sync_run(run, server.uri) == 10
    assert "no longer has the run" in caplog.text
    assert history(server.uri, only_run(server.uri, run)) == losses(range(10))


def test_a_run_deleted_while_it_is_sent_is_made_again(server: MlflowServer, run: Path) -> None:
    recorded(run, range(10))
    there = MlflowRun(run, server.uri)
    there.open()
    MlflowClient(server.uri).delete_run(there.run_id)
    with pytest.raises(Exception, match="deleted"):
        list(there.send_metrics())
    there.open()
    assert sum(there.send_metrics()) == 10
    assert history(server.uri, only_run(server.uri, run)) == losses(range(10))


def test_an_answer_that_was_lost_makes_no_second_run(server: MlflowServer, run: Path) -> None:
    recorded(run, range(10))
    sync_run(run, server.uri)
    (run / "mlflow.json").unlink()  # obeyed by the server, never heard of by us
    assert sync_run(run, server.uri) == 10
    assert history(server.uri, only_run(server.uri, run)) == losses(range(10))


def test_a_value_the_server_refuses_holds_up_nothing(
    server: MlflowServer, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_tracker(run, facts_of(run), uri=None, resume_step=None) as tracker:
        tracker.metrics(1, {"good": 1.0, "/../a//b/.": 1.0})
        tracker.metrics(2**70, {"bad": 1.0})
        tracker.metrics(3, {"good": 2.0})
    sync_run(run, server.uri)
    found = only_run(server.uri, run)
    assert history(server.uri, found, "good") == [(1, 1.0), (3, 2.0)]
    assert history(server.uri, found, "a/b") == [(1, 1.0)]
    assert "MLflow refuses bad of step" in caplog.text


def test_a_database_is_a_server_too(
    server: MlflowServer, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copy(server.folder / "mlflow.db", tmp_path / "my.db")  # making one takes ten times as long
    monkeypatch.chdir(tmp_path)
    facts = Facts("without a server", run.name, {}, {})  # with a file store of its own
    with open_tracker(run, facts, uri="sqlite:///my.db", resume_step=None, patience_seconds=40) as tracker:
        write_losses(tracker, range(20))
    monkeypatch.chdir("/")
    uri = f"sqlite:///{tmp_path / 'my.db'}"
    assert history(uri, only_run(uri, run)) == losses(range(20))
    assert sync_run(run, "sqlite:///my.db") == 0  # the database of the run, not one in this folder
    assert sync_run(run) == 0


def test_a_store_that_takes_no_files_keeps_no_metric_waiting(
    server: MlflowServer, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = server.folder / "a file"
    file.write_text("")
    MlflowClient(server.uri).create_experiment("no files", f"{file}/below")
    facts = Facts("no files", run.name, {}, {})
    with open_tracker(run, facts, uri=server.uri, resume_step=None, patience_seconds=PATIENCE) as tracker:
        write_losses(tracker, range(20))
    found = only_run(server.uri, run)
    assert (found.info.status, history(server.uri, found)) == ("FINISHED", losses(range(20)))
    assert "MLflow takes no files" in caplog.text
    assert f"prefix-ds sync {run}" in caplog.text
    with pytest.raises(RunError, match="MLflow did not take everything"):
        sync_run(run, server.uri)


def test_the_state_of_the_machine_arrives(
    server: MlflowServer, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(run, range(2))
    there = MlflowRun(run, server.uri)
    there.open()
    sampled = Machine(server.uri)
    assert sampled.sample() == {}  # not yet time
    for _ in range(2):
        monkeypatch.setattr(sampled, "_next", 0)
        there.send_sample(sampled.sample())
    found = only_run(server.uri, run)
    memory = history(server.uri, found, "system/system_memory_usage_megabytes")
    assert [step for step, _ in memory] == [0, 1]
    assert all(100 < megabytes < 1e8 for _, megabytes in memory)


# MLflow never stops or slows the trainer


def outage_run(run: Path, uri: str, has_asked: Callable[[], bool], caplog: pytest.LogCaptureFixture) -> float:
    """Writes 500 records to a server that is of no use; the mean seconds of a write."""
    tracker = open_tracker(run, facts_of(run), uri=uri, resume_step=None, patience_seconds=2)
    wait_until(has_asked)
    began = time.perf_counter()
    write_losses(tracker, range(500))
    mean_seconds = (time.perf_counter() - began) / 500
    began = time.perf_counter()
    tracker.close("FINISHED")
    assert time.perf_counter() - began < 10
    assert f"prefix-ds sync {run}" in caplog.text
    return mean_seconds


def test_a_server_that_hangs_costs_the_trainer_nothing(
    server: MlflowServer, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with silent_server() as (uri, connections):
        assert outage_run(run, uri, lambda: bool(connections), caplog) < 0.05
    assert sync_run(run, server.uri) == 500
    found = only_run(server.uri, run)
    assert (found.info.status, history(server.uri, found)) == ("FINISHED", losses(range(500)))


def test_a_busy_machine_costs_no_record_of_a_short_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow = "import sys, time\nclass Slow:\n    def find_spec(self, name, *_):\n"
    slow += "        time.sleep(12 * (name == 'mlflow'))\nsys.meta_path.insert(0, Slow())\n"
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(slow)
    monkeypatch.syspath_prepend(tmp_path / "slow")
    uri = f"sqlite:///{tmp_path}/new.db"
    tracker = open_tracker(run, facts_of(run), uri=uri, resume_step=None, patience_seconds=10)
    write_losses(tracker, range(3))
    began = time.perf_counter()
    tracker.close("FINISHED")
    assert time.perf_counter() - began > 10, "the mirror took longer to start than its patience"
    assert "prefix-ds sync" not in caplog.text
    assert sync_run(run, uri) == 0, "nothing was left to send"


def test_a_port_where_nobody_listens_costs_the_trainer_nothing(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"http://bob:{PASSWORD}@127.0.0.1:{free_port()}"
    is_told = lambda: "MLflow does not take the metrics, which are kept" in caplog.text  # noqa: E731
    assert outage_run(run, uri, is_told, caplog) < 0.05
    with pytest.raises(RunError, match=r"http://\*\*\*@127.0.0.1:\d+: MLflow did not take everything"):
        sync_run(run, uri)
    assert PASSWORD not in caplog.text
    assert read_facts(run).status == "FINISHED"


def test_a_server_that_dies_and_comes_back_has_every_record(
    server: MlflowServer, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker(run, facts_of(run), uri=server.uri, resume_step=None, patience_seconds=PATIENCE)
    write_losses(tracker, range(100))
    wait_until(lambda: read_state(run).sent.get("train/loss", [0])[0] == 99)
    server.stop()
    write_losses(tracker, range(100, 200))
    wait_until(lambda: "MLflow does not take" in caplog.text)
    server.start()
    write_losses(tracker, range(200, 300))
    tracker.close("FINISHED")
    assert "MLflow is back" in caplog.text
    found = only_run(server.uri, run)
    assert (found.info.status, history(server.uri, found)) == ("FINISHED", losses(range(300)))


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# However the trainer ends

TRAINER = """
import pathlib, sys, time
from prefix_ds.tracking import Facts, open_tracker
run = pathlib.Path(sys.argv[1])
facts = Facts("tests", run.name, {}, {})
tracker = open_tracker(run, facts, uri=sys.argv[2], resume_step=None, patience_seconds=5)
tracker.metrics(7, {"train/loss": 0.125})
print("written", flush=True)
time.sleep(600)
"""


def test_a_killed_trainer_is_told_as_failed(server: MlflowServer, run: Path) -> None:
    command = [sys.executable, "-c", TRAINER, str(run), server.uri]
    trainer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "written\n"
    wait_until(lambda: bool(read_state(run).sent))
    (mirror,) = psutil.Process(trainer.pid).children()
    mirror.send_signal(signal.SIGTERM)  # as a scheduler does to all processes of a job
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    mirror.wait(timeout=60)
    found = only_run(server.uri, run)
    assert (found.info.status, history(server.uri, found)) == ("FAILED", [(7, 0.125)])


# A password that no file keeps


@contextlib.contextmanager
def locked(server: MlflowServer) -> Iterator[str]:
    """The address of a server that lets nobody in without bob's password."""
    wanted = "Basic " + base64.b64encode(f"bob:{PASSWORD}".encode()).decode()

    class Door(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, text = 401, b"no"
            if self.headers.get("Authorization") == wanted:
                asked = urllib.request.Request(server.uri + self.path, body or None, method=self.command)
                asked.add_header("Content-Type", self.headers.get("Content-Type", "text/plain"))
                try:
                    with urllib.request.urlopen(asked) as answer:
                        status, text = answer.status, answer.read()
                except urllib.error.HTTPError as error:
                    status, text = error.code, error.read()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Door) as door:
        threading.Thread(target=door.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{door.server_port}"
        door.shutdown()


def test_a_password_can_be_given_again(
    server: MlflowServer, run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    recorded(run, range(3))
    with locked(server) as address:
        uri = f"http://bob:{PASSWORD}@{address}"
        app(["sync", str(run), "--uri", uri], standalone_mode=False)
        assert "3 records sent" in capsys.readouterr().out
        add_metrics(run, 3, {"evaluate/test/loss": 1.5}, uri=None, is_mirrored=True)
        assert "no password is kept: give the server's whole URI" in caplog.text
        add_metrics(run, 4, {"evaluate/test/loss": 1.25}, uri=uri, is_mirrored=True)
    found = only_run(server.uri, run)
    assert history(server.uri, found, "evaluate/test/loss") == [(3, 1.5), (4, 1.25)]
    kept = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in kept if PASSWORD.encode() in path.read_bytes()]
    assert PASSWORD not in caplog.text


def test_two_processes_never_send_one_run_at_a_time(server: MlflowServer, run: Path) -> None:
    recorded(run, range(2))
    with only_writer(run, 0), pytest.raises(RunError, match="another process is sending this run"):
        sync_run(run, server.uri)
