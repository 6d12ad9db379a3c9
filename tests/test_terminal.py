"""A terminal or a pipe that nobody reads costs lines, never the job. Ranks are lines of bash."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
AGENT = """
import launcher.ranks, launcher.node
launcher.ranks.rank_command = lambda words: ["bash", "-c", {rank!r}]
launcher.node.main()
"""
PROGRAM = """
import sys
from pathlib import Path
from launcher.conductor import submit
from launcher.crew import CrewPlan, Member
from launcher.hosts import Host
member = Member(Host("here", (0, 1)), (sys.executable, "-c", {agent!r}, "--ordered"))
file = Path("run.yaml")
sys.exit(submit(CrewPlan((member,), (), Path.cwd(), file, Path("logs"))))
"""
LINE = "x" * 200


def launched(folder, rank):
    """A launcher whose output goes to a pipe."""
    (folder / "run.yaml").touch()
    program = PROGRAM.format(agent=AGENT.format(rank=rank))
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_pipe_that_nobody_reads_costs_lines_and_not_the_job(tmp_path):
    """After 8 seconds without a beat, an agent ends its ranks."""
    job = launched(tmp_path, f"for n in $(seq 4000); do echo $n {LINE}; done; sleep 14; echo at the end")
    time.sleep(12)
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 0, said[-2000:]
    lines = said.splitlines()
    assert "[here:0] at the end" in lines
    (left_out,) = (int(line.split()[0]) for line in lines if "lines left out" in line)
    assert left_out + sum(LINE in line for line in lines) == 8000
    logged = sorted((tmp_path / "logs").iterdir())
    assert [len(path.read_text().splitlines()) for path in logged] == [4001, 4001]


def test_nothing_is_left_out_for_a_reader_that_reads(tmp_path):
    job = launched(tmp_path, f"for n in $(seq 4000); do echo $n {LINE}; done")
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 0, said[-2000:]
    assert len(said.splitlines()) == 8000


def test_a_reader_that_has_gone_does_not_end_the_job(tmp_path):
    job = launched(tmp_path, "for n in $(seq 5); do echo $n; sleep 0.2; done; touch done-$RANK")
    job.stdout.readline()
    job.stdout.close()
    assert job.wait(30) == 0
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}


@pytest.mark.parametrize("letters", ["ä", "\u2028"])
def test_a_letter_that_a_reader_does_not_know_costs_its_line(tmp_path, monkeypatch, letters):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    job = launched(tmp_path, f"echo '{letters}'; echo after")
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 0, said
    assert said.splitlines().count("[here:1] after") == 1
