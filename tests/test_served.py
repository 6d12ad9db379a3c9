"""A prefix as a model of MLflow: a real server has it, a fresh process loads it and writes what we write."""

import json
import subprocess
import sys

import pytest
from mlflow import MlflowClient

from prefix_ds.config import config_text
from tests.mlflow_server import MlflowServer
from tests.ranks import command
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


def predicted(server, address, folder):
    words = [sys.executable, "-c", PROGRAM, server.uri, address, json.dumps(PROMPTS)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


def test_a_fresh_process_predicts_what_we_generate(server, run, address, tmp_path):
    assert address == "models:/turned/1"
    done = predicted(server, address, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = []
    for prompt in PROMPTS:
        (ended,) = command("generate", run, "--prompt", prompt)
        ours.append(ended.out.removesuffix("\n"))
    assert json.loads(done.stdout.splitlines()[-1]) == ours
    assert len(set(ours)) > 1


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


def test_a_deleted_base_is_one_clear_line(server, run, address, tmp_path):
    base = run.parent / "base"
    moved = base.rename(run.parent / "moved")
    try:
        done = predicted(server, address, tmp_path)
    finally:
        moved.rename(base)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert str(base) in last


def test_a_deleted_prefix_and_a_server_that_is_gone_are_one_line(run, tmp_path):
    line = refusal("export", run, "--mlflow", "turned", "--uri", "http://bob:hunter2@127.0.0.1:9")
    assert line.startswith("http://***@127.0.0.1:9: MLflow did not take the model turned: ")
    assert "hunter2" not in line
    assert "one run folder and nothing else" in refusal("export", run, tmp_path, "--mlflow", "turned")
