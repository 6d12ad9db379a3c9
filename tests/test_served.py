"""A prefix as a model of MLflow: a real server has it, a fresh process loads it and writes what we write."""

import functools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from prefix_ds.config import config_text
from tests.mlflow_server import MlflowServer
from tests.ranks import command, on_ranks, program
from tests.refusals import refusal
from tests.workshop import run_config

PROMPTS = ["the cat sees =", "a big dog likes the red bird ="]
PROGRAM = """
import json, sys, mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
print(json.dumps(model.predict(json.loads(sys.argv[3]))))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def run(tmp_path_factory, server):
    """A run that told the server of itself."""
    folder = tmp_path_factory.mktemp("place")
    words = [
        "train.lr=0.1",
        "generate.max_new_tokens=12",
        f"mlflow.uri={server.uri}",
        "mlflow.experiment=served",
    ]
    (folder / "run.yaml").write_text(config_text(run_config(folder, *words)))
    (ended,) = command("train", folder / "run.yaml")
    assert ended.code == 0, ended.err
    return folder / "run"


@pytest.fixture(scope="module")
def address(run):
    (ended,) = command("export", run, "--mlflow", "turned")
    assert ended.code == 0, ended.err
    return ended.out.strip()


def words_of(server, address):
    return server.uri, address, json.dumps(PROMPTS)


def test_a_fresh_process_predicts_what_we_generate(server, run, address, tmp_path):
    assert address == "models:/turned/1"
    words = [sys.executable, "-c", PROGRAM, *words_of(server, address)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = []
    for prompt in PROMPTS:
        (ended,) = command("generate", run, "--prompt", prompt)
        ours.append(ended.out.removesuffix("\n"))
    assert json.loads(done.stdout.splitlines()[-1]) == ours
    assert len(set(ours)) > 1


def predicted_alone_and_together(run):
    """What each prompt gets from one call at a time, and from calls of several threads."""
    from prefix_ds.served import ServedPrefix

    served = ServedPrefix()
    served.load_context(SimpleNamespace(artifacts={"run": run}))
    asked = PROMPTS * 4
    assert served.predict([]) == []
    alone = [served.predict([prompt]) for prompt in asked]
    with ThreadPoolExecutor(4) as pool:
        return alone, list(pool.map(lambda prompt: served.predict([prompt]), asked))


def test_calls_of_several_threads_get_what_they_get_alone(run):
    ((alone, together),) = on_ranks(1, predicted_alone_and_together, run)
    assert together == alone


def test_the_model_belongs_to_the_run_and_holds_no_base_and_no_pickle(server, run, address):
    client = MlflowClient(tracking_uri=server.uri, registry_uri=server.uri)
    version = client.get_model_version("turned", "1")
    assert version.run_id == json.loads((run / "mlflow.json").read_text())["run_id"]
    assert client.get_run(version.run_id).info.status == "FINISHED"
    files = [path for path in (server.folder / "artifacts").rglob("*") if path.is_file()]
    kept = [path for path in files if "models" in path.parts]
    assert {"prefix.safetensors", "run.yaml", "served.py"} <= {path.name for path in kept}
    assert not [path for path in kept if path.suffix in (".pkl", ".bin", ".pt")]
    base = (run.parent / "base" / "model.safetensors").stat().st_size
    assert max(path.stat().st_size for path in kept) < base
    config = next(path for path in kept if path.name == "run.yaml").read_text()
    assert str(run.parent / "base") in config
    assert "train.jsonl" not in config, "it reads no data"


def copy_that_stopped(run, folder, server):
    """A copy of the run, whose own run in MLflow was stopped; the client and that run's id."""
    copy, client = shutil.copytree(run, folder), MlflowClient(server.uri, server.uri)
    state = json.loads((copy / "mlflow.json").read_text())
    run_id = client.create_run(state["experiment_id"]).info.run_id
    client.set_terminated(run_id, "KILLED", 1234567)
    (copy / "mlflow.json").write_text(json.dumps(state | {"run_id": run_id}))
    return copy, client, run_id


def test_how_and_when_the_training_ended_stays_as_it_was(server, run, tmp_path):
    copy, client, run_id = copy_that_stopped(run, tmp_path / "run", server)
    (ended,) = command("export", copy, "--mlflow", "stopped")
    assert ended.code == 0, ended.err
    assert client.get_model_version("stopped", "1").run_id == run_id
    assert not client.list_artifacts(run_id, "prefix"), "the model's files are none of the run's"
    assert refusal("export", copy, "--mlflow", "a/b") == "--mlflow: 'a/b': a model's name has neither / nor :"
    told = client.get_run(run_id).info
    assert (told.status, told.end_time) == ("KILLED", 1234567)


def test_a_run_that_was_deleted_in_mlflow_is_none(server, run, tmp_path):
    copy, client, run_id = copy_that_stopped(run, tmp_path / "run", server)
    client.delete_run(run_id)
    (ended,) = command("export", copy, "--mlflow", "deleted")
    assert ended.code == 0, ended.err
    made = client.get_run(client.get_model_version("deleted", "1").run_id)
    assert made.info.run_id != run_id
    assert (made.info.run_name, made.info.status) == ("run", "FINISHED")
    assert made.data.tags["prefix_ds.kind"] == "model", "it is none of those compared"


def in_folder(folder, _rank):
    os.chdir(folder)


def test_what_differs_where_it_will_run_is_registered_with_it(server, run, tmp_path):
    settings = {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 12345}}
    (tmp_path / "mine.json").write_text(json.dumps(settings))
    words = ["model.bits=8", "engine.deepspeed=mine.json", "generate.max_new_tokens=5"]
    here = functools.partial(in_folder, tmp_path)
    (ended,) = command("export", run, "--mlflow", "elsewhere", *words, before=here)
    assert ended.code == 0, ended.err
    (tmp_path / "mine.json").unlink()
    (tmp_path / "there").mkdir()
    done = program(PROGRAM, tmp_path / "there", *words_of(server, ended.out.strip()))
    assert done.code == 0, done.err[-3000:]
    (ours,) = command("generate", run, *words[::2], "--prompt", PROMPTS[0])
    assert json.loads(done.out.splitlines()[-1])[0] == ours.out.removesuffix("\n")
    (kept,) = (server.folder / "artifacts").rglob("engine.json")
    assert json.loads(kept.read_text()) == settings
    assert "bits: 8" in (kept.parent / "run.yaml").read_text()


def test_the_database_of_a_run_is_found_from_another_folder(server, run, tmp_path):
    copy, there = shutil.copytree(run, tmp_path / "run"), tmp_path / "there"
    there.mkdir()
    shutil.copy(server.folder / "mlflow.db", tmp_path / "my.db")  # making one takes ten times as long
    own = f"sqlite:///{tmp_path}/my.db"
    (copy / "mlflow.json").write_text(json.dumps({"uri": own}))
    facts = json.loads((copy / "facts.json").read_text())
    (copy / "facts.json").write_text(json.dumps(facts | {"experiment": "with a store of its own"}))
    config = (copy / "run.yaml").read_text().replace(server.uri, "sqlite:///my.db")
    (copy / "run.yaml").write_text(config)
    here = functools.partial(in_folder, there)
    (ended,) = command("export", copy, "--mlflow", "moved", before=here)
    assert ended.code == 0, ended.err
    assert not (there / "my.db").exists()
    assert MlflowClient(own, own).get_model_version("moved", "1")


def test_what_nobody_could_load_is_not_registered(run, tmp_path):
    words = ["engine.deepspeed=gone.json"]
    line = refusal("export", run, "--mlflow", "gone", *words)
    assert line.startswith("engine.deepspeed: 'gone.json' is neither a file nor a preset")
    assert "did you mean model.bits" in refusal("export", run, "--mlflow", "gone", "model.bitz=8")
    line = refusal("export", run, "--mlflow", "gone", "train.method=full")
    assert line.endswith("train.method is full: there is no prefix, only model/")


def test_a_deleted_base_is_one_clear_line(server, run, address, tmp_path):
    base = run.parent / "base"
    moved = base.rename(run.parent / "moved")
    try:
        done = program(PROGRAM, tmp_path, *words_of(server, address))
    finally:
        moved.rename(base)
    assert done.code != 0
    last = done.err.strip().splitlines()[-1]
    assert str(base) in last


def test_a_deleted_prefix_and_a_server_that_is_gone_are_one_line(run, tmp_path):
    line = refusal("export", run, "--mlflow", "turned", "--uri", "http://bob:hunter2@127.0.0.1:9")
    assert line.startswith("http://***@127.0.0.1:9: MLflow did not take the model turned: ")
    assert "hunter2" not in line
    line = refusal("export", run, "--mlflow", "turned", "mlflow.uri=http://***@127.0.0.1:9")
    assert "; no password is kept: give the server's whole URI (--uri)" in line
    assert "one run folder and KEY=VALUE, and nothing else" in refusal(
        "export", run, tmp_path, "--mlflow", "turned"
    )
