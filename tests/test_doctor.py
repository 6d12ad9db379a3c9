"""What a doctor finds, without hosts: files that are nowhere, globs, devices that torch does not use."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from launcher import doctor
from launcher.doctor import Report
from launcher.ends import End
from launcher.here import ssh_plan
from launcher.hosts import Host
from launcher.spec import job_spec
from launcher.survey import files
from prefix_ds.config import parse_config
from prefix_ds.errors import EXIT_USER, LaunchError

RUN = """
model: {name: /models/base}
prefix: {text: Sum up}
data: {train: [a.jsonl, "texts/*.txt"], valid: "ORG/NAME?split=valid"}
run: {folder: runs/x}
"""


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return ssh_plan(job_spec(path, variables=["NCCL_DEBUG"]), [Host("a", (0,)), Host("b", (0,))])


def report(name, gpus=(), **found):
    """Of a host that has answered."""
    return Report(name, 1, hello={"versions": {}}, survey={"files": found, "gpus": gpus})


def test_every_file_that_a_run_reads_is_asked_for():
    assert doctor._paths(parse_config(RUN)) == [
        "/models/base",
        "a.jsonl",
        "texts/*.txt",
        "ORG/NAME?split=valid",
    ]


def test_a_glob_is_what_it_finds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    paths = ["texts/*.txt", str(tmp_path / "texts" / "*.txt"), "texts", "ORG/NAME?split=valid"]
    assert [found is None for found in files(paths).values()] == [True, True, False, True]
    (tmp_path / "texts" / "a.txt").write_text("a")
    one = files(paths)
    (tmp_path / "texts" / "b.txt").write_text("b")
    two = files(paths)
    assert all(one[path] and two[path] and one[path] != two[path] for path in paths[:3])


@pytest.mark.parametrize(
    ("path", "here", "on_a", "on_b", "missing_on"),
    [
        ("/models/base", None, None, None, ["a", "b"]),  # on no host, and no hub id begins so
        ("~/base", None, None, None, ["a", "b"]),
        ("texts/*.txt", None, None, None, ["a", "b"]),
        ("ORG/NAME", None, None, None, []),  # of the hub
        ("base", "x", None, None, ["a", "b"]),  # where the launcher runs it is a folder
        ("base", None, None, "x", ["a"]),
        ("base", None, "x", None, ["b"]),
        ("base", "y", "x", "x", []),
    ],
)
def test_a_file_that_is_not_there_is_told(path, here, on_a, on_b, missing_on):
    reports = [report("a", **{path: on_a}), report("b", **{path: on_b})]
    doctor._find_missing(reports, {path: here})
    assert [
        each.name for each in reports for line in each.findings if line == f"{path}: is not there"
    ] == missing_on


def links(monkeypatch, plan, reports, ends=(), device="cuda", said=None):
    """What the doctor makes of ranks that measure; no GPU is needed to say it is one."""
    found = {"device": device, "all_gather_mbs": 1.0, "all_reduce_mbs": 1.0, "from_first_mbs": [1.0]}

    class Attempt:
        def __init__(self, agents, words, master, show):
            if said:
                raise LaunchError(said)
            self.show = show

        async def run(self):
            await self.show(f"[a:0] {json.dumps(found)}")
            return list(ends)

    monkeypatch.setattr(doctor, "Attempt", Attempt)
    asyncio.run(doctor._links(plan, [], reports))
    return {each.name: each.findings for each in reports}


def test_gpus_that_ranks_do_not_use_are_a_finding(monkeypatch, plan):
    def reports():
        return [report("a", gpus=["H100"]), report("b")]

    assert links(monkeypatch, plan, reports()) == {"a": [], "b": []}
    (line,) = links(monkeypatch, plan, reports(), device="cpu")["a"]
    assert line == "its ranks ran on CPUs, though it has 1 GPUs"


def test_why_links_could_not_be_measured_is_told(monkeypatch, plan):
    end = End("b", 1, EXIT_USER, tail=("...", "error: b: 1 GPUs are counted on, and torch can use 0"))
    found = links(monkeypatch, plan, [report("a"), report("b")], [end])
    assert "1 GPUs are counted on" in found["b"][0]
    found = links(monkeypatch, plan, [report("a"), report("b")], said="--master: 127.0.1.1: x")
    assert found == {"a": ["--master: 127.0.1.1: x"], "b": []}


def test_variables_of_the_job_are_those_of_the_links(monkeypatch, plan):
    """NCCL_IB_HCA, GLOO_SOCKET_IFNAME: without them other links would be measured."""
    orders = []

    async def reached(member, order):
        orders.append(order["environment"])
        raise LaunchError("away")

    monkeypatch.setattr(doctor, "Agent", SimpleNamespace(reached=reached))
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    asyncio.run(doctor._examined(plan, parse_config(RUN)))
    assert orders == [{"NCCL_DEBUG": "INFO"}] * 2
    monkeypatch.delenv("NCCL_DEBUG")
    with pytest.raises(LaunchError, match="--env: NCCL_DEBUG: is not set here"):
        asyncio.run(doctor._examined(plan, parse_config(RUN)))
