"""`prefix-launch doctor`: looks at the hosts of a job before hours are booked on it.

Every host is reached and asked for its versions, files, devices, clock and disk; then the ranks of all hosts
measure their links. What differs from the first host is a finding, and names the host.

Knows nothing of training.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from launcher.agent import Agent
from launcher.attempt import Attempt
from launcher.conductor import values_of
from launcher.crew import CrewPlan, Member
from launcher.ends import culprit
from launcher.survey import differences, digest, files
from prefix_ds.config import RunConfig
from prefix_ds.errors import EXIT_DONE, EXIT_USER, LaunchError

_SKEW_SECONDS, _LEAST_GIB, _SLOW_PART = 2.0, 5.0, 0.5


@dataclass
class Report:
    """What is known of a host."""

    name: str
    slots: int
    hello: dict[str, Any] = field(default_factory=dict)
    survey: dict[str, Any] = field(default_factory=dict)
    skew_seconds: float = 0.0
    link_mbs: float | None = None
    findings: list[str] = field(default_factory=list)


def examine(plan: CrewPlan, config: RunConfig, console: Console) -> int:
    """Prints a table and what is wrong; the exit code."""
    reports, links = asyncio.run(_examined(plan, config))
    console.print(_table(reports))
    if links:
        console.print(
            f"{links['device']}: all-gather {links['all_gather_mbs']:,} MB/s, all-reduce"
            f" {links['all_reduce_mbs']:,} MB/s"
        )
    findings = [f"{report.name}: {line}" for report in reports for line in report.findings]
    for line in findings:
        console.print(f"[red]{line}[/red]", soft_wrap=True)
    if not findings:
        console.print("nothing is wrong")
    return EXIT_USER if findings else EXIT_DONE


async def _examined(plan: CrewPlan, config: RunConfig) -> tuple[list[Report], dict[str, Any]]:
    reports = [Report(member.host.name, len(member.host.devices)) for member in plan.members]
    environment, paths = values_of(plan.variables), _paths(config)
    answers = await asyncio.gather(
        *(
            _asked(plan, environment, paths, member, report)
            for member, report in zip(plan.members, reports, strict=True)
        )
    )
    agents = [agent for agent in answers if agent is not None]
    _compare(reports, plan)
    _find_missing(reports, files(paths))
    try:
        links = await _links(plan, agents, reports) if len(agents) == len(plan.members) else {}
    finally:
        await asyncio.gather(*(agent.dismissed() for agent in agents))
    return reports, links


async def _asked(
    plan: CrewPlan, environment: dict[str, str], paths: list[str], member: Member, report: Report
) -> Agent | None:
    """Fills the report; the agent, unless there is none."""
    port = plan.port if member is plan.members[0] else None
    order = plan.order(environment, port)
    try:
        agent = await Agent.reached(member, order)
        began = time.time()
        asked = {"paths": paths, "folder": str(plan.logs.parent)}
        report.survey = await agent.asked({"survey": asked}, "survey")
    except LaunchError as error:
        report.findings.append(str(error).removeprefix(f"{member.host.name}: "))
        return None
    report.skew_seconds = report.survey["time"] - (began + time.time()) / 2
    report.hello = agent.hello
    return agent


def _paths(config: RunConfig) -> list[str]:
    """What a run reads: files, folders and globs. Of a hub id there is no file, on any host."""
    model, data = config.model, config.data
    named = (model.name, model.tokenizer, data.train, data.valid, data.test)
    return [path for item in named if item for path in ([item] if isinstance(item, str) else item)]


def _compare(reports: list[Report], plan: CrewPlan) -> None:
    answered = [report for report in reports if report.hello]
    mine = digest(plan.folder / plan.run_file)
    for report in answered:
        report.findings += _differences(answered[0], report, plan, mine)


def _differences(first: Report, this: Report, plan: CrewPlan, run_file: str | None) -> Iterator[str]:
    yield from differences(this.hello, first.hello, first.name, str(plan.run_file), run_file)
    for path, found in this.survey["files"].items():
        expected = first.survey["files"][path]
        if found and expected and found != expected:
            yield f"{path}: has other names or sizes than on {first.name}"
    if this.survey["gpus"] and len(this.survey["gpus"]) < this.slots:
        yield f"{len(this.survey['gpus'])} GPUs, but {this.slots} slots"
    if set(this.survey["gpus"]) != set(first.survey["gpus"]):
        yield f"other devices than {first.name}"
    if abs(this.skew_seconds) > _SKEW_SECONDS:
        yield f"its clock is {this.skew_seconds:+.0f} s off"
    if this.survey["free_gib"] < _LEAST_GIB:
        yield f"{this.survey['free_gib']:.1f} GiB free where the run folder is to be"


def _find_missing(reports: list[Report], here: dict[str, str | None]) -> None:
    """Files that a host lacks. What is nowhere may be a hub id, unless it is an absolute path or a glob."""
    answered = [report for report in reports if report.hello]
    for path, found_here in here.items():
        has = {report.name: report.survey["files"][path] is not None for report in answered}
        if found_here is not None or any(has.values()) or path.startswith(("/", "~")) or "*" in path:
            for report in answered:
                report.findings += [] if has[report.name] else [f"{path}: is not there"]


async def _links(plan: CrewPlan, agents: list[Agent], reports: list[Report]) -> dict[str, Any]:
    """What the ranks measured; findings where they could not, or where one link is slower than the others."""
    if sum(report.slots for report in reports) == 1:
        return {}
    lines: list[str] = []

    async def heard(line: str) -> None:
        lines.append(line)

    try:
        ends = await Attempt(agents, ["links"], plan.master, heard).run()
    except LaunchError as error:
        reports[0].findings.append(str(error))
        return {}
    if (last := culprit(ends)) is not None:
        report = next(report for report in reports if report.name == last.host)
        words = "; ".join([last.told(), *last.tail[-1:]])
        report.findings.append(f"its ranks could not measure their links: {words}")
        return {}
    told = next(line for line in lines if "all_gather" in line)
    found: dict[str, Any] = json.loads(told[told.index("{") :])
    rates = [None, *found["from_first_mbs"]]
    first = 0
    for report in reports:
        report.link_mbs = min(rates[first : first + report.slots]) if first else None
        first += report.slots
        if found["device"] == "cpu" and report.survey["gpus"]:
            report.findings.append(f"its ranks ran on CPUs, though it has {len(report.survey['gpus'])} GPUs")
    _find_slow(reports)
    return found


def _find_slow(reports: list[Report]) -> None:
    known = [report for report in reports if report.link_mbs is not None]
    fastest = max((report.link_mbs or 0 for report in known), default=0)
    for report in known:
        if (report.link_mbs or 0) < _SLOW_PART * fastest:
            report.findings.append(f"its link gives {report.link_mbs:,} MB/s, the fastest {fastest:,}")


def _table(reports: list[Report]) -> Table:
    table = Table("host", "slots", "devices", "versions", "clock", "disk free", "link to the first")
    for report in reports:
        if not report.hello:
            table.add_row(report.name, str(report.slots), *["-"] * 5)
            continue
        versions = ", ".join(f"{name} {found}" for name, found in report.hello["versions"].items())
        table.add_row(
            report.name,
            str(report.slots),
            ", ".join(sorted(set(report.survey["gpus"]))) or "CPU",
            versions,
            f"{report.skew_seconds:+.2f} s",
            f"{report.survey['free_gib']:,.0f} GiB",
            "-" if report.link_mbs is None else f"{report.link_mbs:,} MB/s",
        )
    return table
