"""The batch script: golden files, hostile names, and what its exit code leads to, with a fake `srun`.

`python -m tests.test_slurm` writes the golden files anew.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.ends import lifted
from launcher.slurm import backend
from launcher.slurm.options import Resources, SlurmOptions, seconds_of
from launcher.slurm.script import job_name, plan
from launcher.spec import JobSpec
from prefix_ds.config import config_text, parse_config
from prefix_ds.errors import LaunchError

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "plans"
CONFIG = parse_config(
    """
model: {name: /models/base}
prefix: {text: "turn:"}
data: {train: train.jsonl, prompt: "{source}", target: "{goal}"}
run: {folder: runs/first}
"""
)
HERE = SlurmOptions(
    Path("/home/me/task"), Path("/home/me/task/runs/first-logs"), python="/opt/venv/bin/python"
)
SPEC = JobSpec(Path("run.yaml"), (), CONFIG)
HOSTILE = (
    "a b",
    "it's",
    '"$HOME`id`\\',
    "new\nline",
    "tab\tcr\r\n",
    "ünï→",
    "-n",
    "",
    "$(touch x)",
    "*",
    "#",
    "\x1b[0m",
)

PLANS = {
    "one_node": plan(SPEC, replace(HERE, requeue=False)),
    "two_nodes": plan(
        replace(SPEC, num_nodes=2, ranks_per_node=8, variables=("HF_TOKEN",), overrides=("train.lr=0.1",)),
        replace(
            HERE,
            ask=Resources("4:00:00", "gpu", "me", "high", "a100&ib", 8, 64, "200G"),
            setup=("module load cuda",),
            sbatch=("--reservation=our week",),
            srun=("--container-image=/images/our image.sqsh",),
        ),
    ),
    "allocated": plan(replace(SPEC, num_nodes=2, port=29500), replace(HERE, allocated=True)),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_whole_script_is_as_recorded(name):
    assert PLANS[name].text() == (GOLDEN / f"slurm_{name}.sh").read_text()


@pytest.mark.parametrize("name", PLANS)
def test_bash_can_read_it(name):
    subprocess.run(["bash", "-n"], input=PLANS[name].text(), text=True, check=True)


FAKES = {
    "srun": 'printf "%s\\n" "$@" > srun.argv; while [[ $1 == --* ]]; do shift; done; "$@"',
    "scontrol": 'case $1 in show) printf "%s\\n" calm wild ;; *) echo "$@" >> scontrol.argv ;; esac',
    "python": '[ "$2" = -c ] && exit "${BROKEN:-0}"; printf "%s\\0" "$@" > python.argv; touch begun; '
    'sleep "${SLEEP:-0}"; case $CODE in 1 | 2) exit $((CODE + 200)) ;; esac; exit "$CODE"',
}


@pytest.fixture
def bench(tmp_path):
    """A folder with fakes to run a script in."""
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def started(bench, spec=SPEC, code=0, options=None, **changes):
    options = replace(HERE, **{"folder": bench, "python": str(bench / "python")} | (options or {}))
    job = {"SLURM_JOB_ID": "31234", "SLURM_JOB_NODELIST": "x", "CODE": str(code)}
    environment = os.environ | job | changes
    environment["PATH"] = f"{bench}:{environment['PATH']}"
    # sbatch runs a script from a file, with nothing to read
    script = bench / "script"
    script.write_bytes(os.fsencode(plan(spec, options).text()))
    return subprocess.Popen(["bash", script], env=environment, stdin=subprocess.DEVNULL)


def requeued(bench):
    asked = bench / "scontrol.argv"
    return asked.exists() and asked.read_text() == "requeue 31234\n"


def test_hostile_words_arrive_as_they_are(bench):
    room = bench / "a 'b'\n$(c) ü"
    room.mkdir()
    spec = replace(SPEC, run_file=Path("my run's.yaml"), overrides=HOSTILE, num_nodes=2, ranks_per_node=3)
    for name in FAKES:
        (bench / name).rename(room / name)
    assert started(room, spec).wait() == 0
    words = (room / "python.argv").read_bytes().decode().split("\0")[:-1]
    agent = [
        "-P",
        "-m",
        "launcher.node",
        "--lifted",
        "--nodes",
        "2",
        "--ranks",
        "3",
        "--master",
        "calm:21234",
        "--",
    ]
    assert words == [*agent, "train", "my run's.yaml", *HOSTILE]


def test_bytes_that_are_no_unicode_arrive_too(bench):
    name = os.fsdecode(b"caf\xe9.yaml")
    assert started(bench, replace(SPEC, run_file=Path(name))).wait() == 0
    assert (bench / "python.argv").read_bytes().split(b"\0")[-2] == b"caf\xe9.yaml"


@pytest.mark.parametrize(
    ("code", "again"),
    [
        (0, False),
        (1, False),
        (2, False),
        (75, True),
        (76, True),
        (77, True),
        (134, True),
        (137, True),
        (143, True),
        (127, False),
        (253, False),
    ],
)
def test_what_an_exit_code_leads_to(bench, code, again):
    assert started(bench, code=code).wait() == code
    assert requeued(bench) == again


def test_a_bug_is_not_hidden_by_the_peers_it_cost(bench):
    """srun ends with the highest code: 1 on one node and 76 on the other."""
    fake = bench / "srun"
    fake.write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nCODE=1 "$@"; a=$?; CODE=76 "$@"; b=$?\n'
        "exit $((a > b ? a : b))\n"
    )
    assert started(bench).wait() == 1
    assert not requeued(bench)


@pytest.mark.parametrize(("restarts", "again"), [("9", True), ("10", False), ("11", False)])
def test_it_is_queued_again_only_so_often(bench, restarts, again):
    assert started(bench, code=76, SLURM_RESTART_COUNT=restarts).wait() == 76
    assert requeued(bench) == again


@pytest.mark.parametrize("options", [{"requeue": False}, {"allocated": True}])
def test_it_is_not_queued_again_where_nobody_asked(bench, options):
    assert started(bench, code=76, options=options).wait() == 76
    assert not requeued(bench)


def test_a_cancelled_job_is_not_queued_again(bench):
    """scancel signals the shell and the ranks, which write a checkpoint and end with 75."""
    job = started(bench, code=75, SLEEP="1")
    while not (bench / "begun").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait() == 75
    assert not requeued(bench)


ALONE = """\
while [[ $1 == --* ]]; do shift; done
"$@" &
echo $! > task.pid
wait $!
"""
AGENT = """\
[ "$2" != -c ] || exit 0
trap 'echo told >> told; sleep 1; echo saved > saved; exit {code}' TERM
touch begun
sleep 20 &
wait $!
"""


@pytest.mark.parametrize(("code", "then"), [(75, 75), (201, 1)])
def test_a_signal_to_the_task_alone_is_heard_and_waited_for(bench, code, then):
    """proctrack/cgroup signals a task's first process and none of its children."""
    (bench / "srun").write_text(f"#!/bin/bash\n{ALONE}")
    (bench / "python").write_text(f"#!/bin/bash\n{AGENT.format(code=code)}")
    job = started(bench)
    while not (bench / "begun").exists():
        time.sleep(0.02)
    task = int((bench / "task.pid").read_text())
    os.kill(task, signal.SIGTERM)
    time.sleep(0.4)
    os.kill(task, signal.SIGTERM)  # the agent is at its checkpoint: it has time to end
    assert job.wait(10) == then
    assert (bench / "saved").exists()
    assert requeued(bench) == (code == 75)


def test_an_agent_that_cannot_start_on_a_node_ends_the_job(bench):
    assert started(bench, code=76, BROKEN="1").wait() == 1
    assert not requeued(bench)


def test_the_agent_lifts_what_ends_a_job_for_good():
    words = [sys.executable, "-m", "launcher.node", "--nodes=2", "--node=5", "--", "train", "run.yaml"]
    codes = [
        subprocess.run(words[:3] + more + words[3:], cwd=ROOT, check=False, capture_output=True).returncode
        for more in ([], ["--lifted"])
    ]
    assert codes == [2, 202]
    assert [lifted(code) for code in (0, 1, 75, 76, 77, 137)] == [0, 201, 75, 76, 77, 137]


def test_options_of_srun_reach_it(bench):
    words = ("--container-image=a b#c", "--mpi=none")
    assert started(bench, options={"srun": words}).wait() == 0
    assert [line for line in (bench / "srun.argv").read_text().splitlines() if line in words] == list(words)


def test_a_folder_that_is_gone_ends_the_job(bench):
    assert started(bench, options={"folder": bench / "gone"}).wait() == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ask": Resources(partition="a\nb")}, r"--partition: a\nb: cannot stand in a batch script"),
        ({"ask": Resources(account="")}, "--account: : cannot stand in a batch script"),
        ({"logs": Path("/a\n#SBATCH --wrap=id")}, r"--output: /a\n#SBATCH --wrap=id/%j.log: cannot stand"),
        ({"logs": Path("/a\\b")}, "--logs: /a\\b: Slurm cannot write"),
        ({"sbatch": ("gpu",)}, "--sbatch: gpu: expected an option"),
        ({"sbatch": ("-pgpu",)}, "--sbatch: -pgpu: expected --partition=gpu: a variable such as SBATCH_PAR"),
        ({"sbatch": ("-G 4",)}, "--sbatch: -G 4: expected --gpus=4: a variable"),
        ({"sbatch": ("-H",)}, "--sbatch: -H: expected its long form: a variable"),
        ({"setup": ("module load x\r",)}, r"--setup: module load x\r: cannot stand in a batch script"),
        ({"srun": ("pmix",)}, "--srun: pmix: expected an option"),
        ({"sbatch": ("--x=\n",)}, r"--sbatch: --x=\n: cannot stand"),
        ({"ask": Resources(time="4h")}, "--time: 4h: expected MINUTES"),
        ({"ask": Resources(time="2")}, "--signal-seconds: 120: expected less than the 120 seconds of --time"),
        ({"signal_seconds": -1}, "--signal-seconds: -1: expected 1 to 65535"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(changes, message):
    with pytest.raises(LaunchError) as refusal:
        plan(SPEC, replace(HERE, **changes))
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


def test_gpus_without_a_number_of_ranks_are_refused(tmp_path, monkeypatch):
    """One rank would train on one of eight."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(config_text(CONFIG))
    words = ["slurm", "run.yaml", "--sbatch=--gres=gpu:a100:8", "--dry-run"]
    refused = CliRunner().invoke(app, words)
    assert str(refused.exception).startswith("--sbatch=--gres=gpu:a100:8: how many ranks a node?")
    written = CliRunner().invoke(app, [*words, "--ranks-per-node=8"], catch_exceptions=False)
    assert "--ranks 8" in written.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus-per-node=8", "--ranks-per-node=4"], "--ranks-per-node: 4: a node's 8 GPUs have"),
        (["--ranks-per-node=0"], "--ranks-per-node: 0: expected at least 1"),
    ],
)
def test_ranks_that_contradict_the_gpus_are_refused(tmp_path, words, said):
    refused = CliRunner().invoke(app, ["slurm", str(run_file(tmp_path)), "--dry-run", *words])
    assert isinstance(refused.exception, LaunchError)
    assert str(refused.exception).startswith(said)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        *[("90", 5400), ("1:30", 90), ("1:00:00", 3600), ("2-3", 183600), ("1-0:1:2", 86462)],
        *[("infinite", None), ("0", None), ("0:00", None)],
    ],
)
def test_time_is_read_as_slurm_reads_it(time, seconds):
    assert seconds_of(time) == seconds
    options = replace(HERE, ask=Resources(time), signal_seconds=9)
    assert f"#SBATCH --time={time}\n" in plan(SPEC, options).text()


@pytest.mark.parametrize(
    ("folder", "name"),
    [("runs/a b\n$c", "a-b-c"), ("runs/x.1_y", "x.1_y"), ("runs/…", "prefix-ds"), ("a" * 80, "a" * 64)],
)
def test_a_jobs_name_trips_no_tool(folder, name):
    config = CONFIG.model_copy(update={"run": CONFIG.run.model_copy(update={"folder": folder})})
    assert job_name(replace(SPEC, config=config)) == name


def fake(folder, name, body, monkeypatch):
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_sbatch_gets_the_very_text(tmp_path, monkeypatch):
    fake(tmp_path, "sbatch", f"cat > {tmp_path}/got; echo '77;cluster'", monkeypatch)
    job = replace(PLANS["one_node"], logs=tmp_path / "new" / "logs")
    assert backend.submit(job) == "77"
    assert (tmp_path / "got").read_text() == job.text()
    assert job.logs.is_dir()


def test_what_the_user_typed_goes_before_variables_of_sbatch(tmp_path, monkeypatch):
    """sbatch takes its variables for typed options, and those in a script for less than that."""
    fake(tmp_path, "sbatch", f"env > {tmp_path}/env; echo 77", monkeypatch)
    names = "PARTITION TIMELIMIT EXPORT NO_REQUEUE MEM_PER_CPU OUTPUT RESERVATION GPUS_PER_NODE WCKEY"
    for name in names.split():
        monkeypatch.setenv(f"SBATCH_{name}", "other")
    monkeypatch.setenv("HF_TOKEN", "x")
    backend.submit(replace(PLANS["two_nodes"], logs=tmp_path))
    left = [line for line in (tmp_path / "env").read_text().splitlines() if line.startswith("SBATCH_")]
    assert left == ["SBATCH_WCKEY=other"]  # of which the script says nothing


def test_what_slurm_refuses_is_one_line_in_its_own_words(tmp_path, monkeypatch):
    words = (
        "echo 'sbatch: error: invalid partition specified: x' >&2; echo 'sbatch: error: failed' >&2; exit 1"
    )
    fake(tmp_path, "sbatch", words, monkeypatch)
    with pytest.raises(LaunchError, match=r"^sbatch: invalid partition specified: x; failed$"):
        backend.submit(replace(PLANS["one_node"], logs=tmp_path))


def test_without_slurm_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"^sbatch: not found; "):
        backend.submit(replace(PLANS["one_node"], logs=tmp_path))


def test_a_variable_that_is_not_set_is_found_before_it_queues(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(LaunchError, match=r"^--env: HF_TOKEN: is not set here$"):
        backend.submit(replace(PLANS["two_nodes"], logs=tmp_path))


SHOWN = """JobId=7 JobName=first
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList=calm,wild
   StdOut={log}
"""


def test_status_and_log_of_a_job_that_slurm_remembers(tmp_path, monkeypatch):
    log = tmp_path / "a 100% b.log"
    log.write_text("one\ntwo\n")
    shown = SHOWN.format(log=str(log).replace("%", "%%"))
    (tmp_path / "shown").write_text(shown)
    fake(tmp_path, "scontrol", f"cat {tmp_path}/shown", monkeypatch)
    assert backend.status("7").told() == "job 7: RUNNING, on calm,wild, 3 starts"
    assert list(backend.logs("7")) == ["one", "two"]


def test_a_line_that_is_half_written_is_shown_when_it_is_whole(tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.write_text("one\nloss 1.2")
    (tmp_path / "shown").write_text(SHOWN.format(log=log))
    fake(tmp_path, "scontrol", f"cat {tmp_path}/shown", monkeypatch)
    later = iter(["345\nto", "go"])

    def slept(_):
        text = next(later)
        with log.open("a") as file:
            file.write(text)
        if text == "go":
            (tmp_path / "shown").write_text(SHOWN.format(log=log).replace("RUNNING", "COMPLETED"))

    monkeypatch.setattr(backend.time, "sleep", slept)
    assert list(backend.logs("7", follow=True)) == ["one", "loss 1.2345", "togo"]


def test_status_of_a_job_that_only_the_accounting_knows(tmp_path, monkeypatch):
    fake(
        tmp_path,
        "scontrol",
        "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        monkeypatch,
    )
    fake(tmp_path, "sacct", "echo 'FAILED|2:0|calm'", monkeypatch)
    assert backend.status("7").told() == "job 7: FAILED, on calm, exit code 2"
    with pytest.raises(LaunchError, match="forgotten where its log is"):
        list(backend.logs("7"))


@pytest.mark.parametrize("known_by_sacct", ["exit 0", "exit 1"])
def test_a_job_that_nobody_knows(tmp_path, monkeypatch, known_by_sacct):
    fake(
        tmp_path,
        "scontrol",
        "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        monkeypatch,
    )
    fake(tmp_path, "sacct", known_by_sacct, monkeypatch)
    with pytest.raises(LaunchError, match=r"^scontrol: slurm_load_jobs error: Invalid job id specified$"):
        backend.status("7")


@pytest.mark.parametrize("job", ["", "-u", "root", "1 2", "７"])
def test_only_the_number_of_a_job_reaches_slurm(job):
    with pytest.raises(LaunchError, match="expected the number of a Slurm job"):
        backend.cancel(job)


COMMAND = "from launcher import cli; from launcher.slurm.cli import add_to; add_to(cli.app); cli.main()"


def launched(folder, *words, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    program = [sys.executable, "-c", COMMAND, "slurm", *map(str, words)]
    environment = clean | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(program, capture_output=True, text=True, check=False, env=environment, cwd=folder)


def run_file(folder):
    path = folder / "run.yaml"
    path.write_text(json.dumps(CONFIG.model_dump(mode="json")))
    return path


def test_the_command_prints_what_it_would_submit(tmp_path):
    asked = ["--nodes", 2, "--gpus-per-node", 4, "--time", "1:00:00", "--no-requeue"]
    asked += ["--srun=--mpi=none", "--dry-run"]
    shown = launched(tmp_path, run_file(tmp_path), "train.lr=0.5", *asked)
    assert shown.returncode == 0, shown.stderr
    assert "#SBATCH --gpus-per-node=4\n#SBATCH --time=1:00:00\n" in shown.stdout
    assert f"#SBATCH --output={tmp_path}/runs/first-logs/%j.log\n" in shown.stdout
    assert "--nodes 2 --ranks 4 --gpus 4 " in shown.stdout
    assert " \\\n    --mpi=none \\\n" in shown.stdout
    assert shown.stdout.endswith("*) exit $code ;;\nesac\n")


def test_the_command_runs_at_once_in_an_allocation(bench):
    path = f"{bench}:{os.environ['PATH']}"
    words = [run_file(bench), "--nodes", 2, "--python", bench / "python"]
    here = {"PATH": path, "CODE": "75", "SLURM_JOB_ID": "8", "SLURM_JOB_NODELIST": "x"}
    ended = launched(bench, *words, **here)
    assert ended.returncode == 75, ended.stderr
    assert "--overlap" in (bench / "srun.argv").read_text().splitlines()
    assert not requeued(bench)


@pytest.mark.parametrize(
    ("words", "found", "ranks"),
    [
        ([], {"SLURM_GPUS_ON_NODE": "8"}, "--ranks 8 --gpus 8"),
        ([], {"SLURM_GPUS_PER_NODE": "a100:8"}, "--ranks 8 --gpus 8"),
        ([], {"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS": "8"}, "--ranks 4 --gpus 4"),
        (["--gpus-per-node=4"], {"SLURM_GPUS": "8"}, "--ranks 4 --gpus 4"),
        (["--ranks-per-node=2"], {"SLURM_GPUS_ON_NODE": "8"}, "--ranks 2 --master"),
        (["--gpus-per-node=4"], {"SLURM_GPUS_ON_NODE": "8"}, "--ranks 4 --gpus 4"),
        ([], {}, "--ranks 1 --master"),
    ],
)
def test_in_an_allocation_there_is_a_rank_for_each_of_its_gpus(tmp_path, words, found, ranks):
    words = [run_file(tmp_path), "--dry-run", *words]
    assert f" {ranks} " in launched(tmp_path, *words, SLURM_JOB_ID="8", **found).stdout


def test_an_allocation_that_says_its_gpus_in_another_way_is_refused(tmp_path):
    refused = launched(tmp_path, run_file(tmp_path), "--dry-run", SLURM_JOB_ID="8", SLURM_GPUS="16")
    assert refused.returncode == 2
    assert refused.stderr == "error: SLURM_GPUS: 16: how many ranks a node? Say --gpus-per-node\n"


def test_a_mistake_is_one_line_and_2(tmp_path):
    refused = launched(tmp_path, run_file(tmp_path), "--time", "soon")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --time: soon: expected")
    assert len(refused.stderr.splitlines()) == 1


if __name__ == "__main__":
    for name, job in PLANS.items():
        (GOLDEN / f"slurm_{name}.sh").write_text(job.text())
