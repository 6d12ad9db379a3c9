"""One attempt at a job: the ranks of all hosts, from their start to the end of the last.

When one ends badly, the others have a few seconds to end by themselves, so that their reasons are known; then
all are ended. Knows nothing of restarts.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, replace

from launcher import wire
from launcher.agent import Agent
from launcher.command import Team, teams
from launcher.ends import SETTLE_SECONDS, End
from launcher.survey import is_loopback
from prefix_ds.errors import LaunchError

NODE_GONE = 255
_MAX_WAITING = 1000  # messages: an agent that says more is heard later


class Attempt:
    """Ranks on hosts whose agents have answered."""

    def __init__(
        self,
        agents: Sequence[Agent],
        words: Sequence[str],
        master: str | None,
        show: Callable[[str], Awaitable[None]],
    ) -> None:
        """`words`: arguments of prefix-ds. `master`: the first host's address; None: where we reached it.
        `show` gets what the ranks say, with host and rank. Raises LaunchError for an address that is none."""
        first = agents[0].hello
        _check_master(agents, master)
        sizes = [len(agent.member.host.devices) for agent in agents]
        self._agents, self._words = agents, words
        self._teams: list[Team] = list(teams(sizes, master or first["address"], first["port"]))
        self._running = {
            agent.name: set(team.ranks()) for agent, team in zip(agents, self._teams, strict=True)
        }
        self._is_alone, self._show = sum(sizes) == 1, show
        self._settling: asyncio.Task[None] | None = None

    async def run(self) -> list[End]:
        """The ends of all ranks, in the order of time."""
        queue: asyncio.Queue[tuple[Agent, wire.Message]] = asyncio.Queue(_MAX_WAITING)
        listening = [asyncio.ensure_future(agent.listen(queue)) for agent in self._agents]
        await self._start()
        ends: list[End] = []
        while any(self._running.values()):
            async for end in self._heard(*await queue.get()):
                ends.append(end)
                if end.ends_others and self._settling is None:
                    self._settling = asyncio.ensure_future(self._settle())
        for task in [*listening, *([self._settling] if self._settling else [])]:
            task.cancel()
        return ends

    async def _start(self) -> None:
        for agent, team in zip(self._agents, self._teams, strict=True):
            host = agent.member.host
            mine = replace(team, devices=() if host.has_all else host.devices)
            await agent.send({"team": asdict(mine), "words": list(self._words)})

    async def _heard(self, agent: Agent, message: wire.Message) -> AsyncIterator[End]:
        running = self._running[agent.name]
        match message:
            case {"line": [rank, line]}:
                await self._show(line if self._is_alone else f"[{agent.name}:{rank}] {line}")
            case {"end": end}:
                running.discard(end["rank"])
                yield End(**end | {"host": agent.name, "tail": tuple(end["tail"])})
            case {"gone": reason} if running:
                running.clear()
                yield End(agent.name, None, NODE_GONE, reason=reason)

    async def _settle(self) -> None:
        await asyncio.sleep(SETTLE_SECONDS)
        await self.kill()

    async def stop(self, grace_seconds: float) -> None:
        """Asks every rank for a checkpoint and its end; those that outlive the grace are killed."""
        await self._tell_all({"stop": grace_seconds})

    async def kill(self) -> None:
        """Ends every rank at once."""
        await self._tell_all({"kill": True})

    async def _tell_all(self, message: wire.Message) -> None:
        await asyncio.gather(*(agent.send(message) for agent in self._agents))


def _check_master(agents: Sequence[Agent], master: str | None) -> None:
    """Debian gives a machine's own name the address 127.0.1.1, at which the others would find themselves."""
    address = master or agents[0].hello["address"]
    if len(agents) > 1 and is_loopback(address):
        raise LaunchError(
            f"--master: {address}: the other hosts cannot reach {agents[0].name} there; give its address in "
            "the network between them with --master"
        )
