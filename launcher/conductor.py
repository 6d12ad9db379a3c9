"""Conducts a job on some hosts: reaches them, runs its ranks, names the one that ended it, and starts again
from the latest checkpoint if it may.

Knows nothing of how hosts are reached.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any

from launcher.agent import Agent
from launcher.attempt import Attempt
from launcher.crew import CrewPlan, Member
from launcher.ends import End, culprit
from launcher.survey import differences, digest
from launcher.terminal import Terminal
from prefix_ds.errors import EXIT_BUG, EXIT_DONE, EXIT_PEER, EXIT_STOPPED, EXIT_USER, LaunchError

_ENDED_AT_ONCE = 130  # by a second Ctrl-C, as shells say it
_PATIENCE_SECONDS = 60.0  # for hosts that were lost to come back, before going on without them
_BETWEEN_SECONDS = 3.0  # an agent that lost us has ended its ranks when this has passed a few times
_KILL_SECONDS = 8.0  # for agents to say that all ranks are killed, before that is believed without them
_SHOWN_LINES = 20


def submit(plan: CrewPlan) -> int:
    """Runs the job; its exit code. Raises LaunchError for what keeps it from starting."""
    environment = values_of(plan.variables)
    try:
        with Terminal() as terminal:
            return asyncio.run(_Conductor(plan, environment, terminal).run())
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is over: a Ctrl-C more would only hide the code


def values_of(names: Sequence[str]) -> dict[str, str]:
    """Of environment variables. Raises LaunchError for one that is not set."""
    for name in names:
        if name not in os.environ:
            raise LaunchError(f"--env: {name}: is not set here")
    return {name: os.environ[name] for name in names}


class _Conductor:
    def __init__(self, plan: CrewPlan, environment: dict[str, str], terminal: Terminal) -> None:
        self._plan, self._environment = plan, environment
        self._show, self._say = terminal.show, terminal.say
        self._asked = 0  # how often the user has asked for the end
        self._attempt: Attempt | None = None
        self._reaching: asyncio.Task[list[Agent]] | None = None
        self._trying: asyncio.Task[list[End]] | None = None
        self._leaving: list[Agent] = []
        self._telling: list[asyncio.Task[None]] = []

    async def run(self) -> int:
        """Attempts, until one need not be repeated."""
        loop = asyncio.get_running_loop()

        def noted(*_: object) -> None:
            with contextlib.suppress(RuntimeError):  # a Ctrl-C when all is over already
                loop.call_soon_threadsafe(self._ask)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, noted)  # asyncio's own handlers go before the process does
        restarts = 0
        while True:
            last = await self._tried(is_first=restarts == 0)
            is_too_early = self._asked and last is not None and last.code == -signal.SIGTERM
            if self._asked > 1 or is_too_early:  # ranks that have not begun to listen have nothing to save
                return _ENDED_AT_ONCE
            if last is None:
                return EXIT_DONE
            self._tell(last)
            is_final = last.code in (EXIT_BUG, EXIT_USER, EXIT_STOPPED) or restarts == self._plan.max_restarts
            if self._asked or is_final:
                return EXIT_PEER if last.rank is None else last.exit_code
            restarts += 1
            self._say(f"restart {restarts} of {self._plan.max_restarts}, from the latest checkpoint")

    def _ask(self) -> None:
        """The first time for a checkpoint, then for the end; where nothing runs there is nothing to save, and
        where all is over nothing begins again."""
        is_over = bool(self._leaving) and not (self._attempt or self._reaching)
        self._asked = max(self._asked, 1) if is_over else self._asked + (1 if self._attempt else 2)
        if self._reaching:
            self._reaching.cancel()
        elif self._attempt and self._asked == 1:
            self._say("stopping: every rank writes a checkpoint and ends; once more to end without")
            self._soon(self._attempt.stop(self._plan.grace_seconds))
        elif self._attempt and self._trying:
            self._soon(self._attempt.kill())
            asyncio.get_running_loop().call_later(_KILL_SECONDS, self._trying.cancel)
        else:
            self._kill_those_that_leave()

    def _soon(self, telling: Coroutine[Any, Any, None]) -> None:
        self._telling.append(asyncio.ensure_future(telling))

    async def _tried(self, *, is_first: bool) -> End | None:
        """One attempt, and who ended it badly, if anyone did."""
        self._reaching = asyncio.ensure_future(self._reached(is_first))
        try:
            agents = await self._reaching
        except asyncio.CancelledError:
            return None
        finally:
            self._reaching = None
        try:
            check_alike(agents, self._plan)
            is_first_there = agents[0].member is self._plan.members[0]
            master = self._plan.master if is_first_there else None  # it is the first host's address
            self._attempt = Attempt(agents, self._plan.words, master, self._show)
            self._trying = asyncio.ensure_future(self._attempt.run())
            return culprit(await self._trying)
        except asyncio.CancelledError:
            return None
        finally:
            self._attempt = None
            await self._dismiss(agents)

    async def _reached(self, is_first: bool) -> list[Agent]:
        """Agents on all hosts; on a restart, on those that answer in time, if they are enough."""
        agents: dict[str, Agent] = {}
        waits = 0 if is_first else round(_PATIENCE_SECONDS / _BETWEEN_SECONDS)
        if not is_first:
            await asyncio.sleep(_BETWEEN_SECONDS)
        try:
            for wait in range(waits, -1, -1):
                missing = [m for m in self._plan.members if m.host.name not in agents]
                errors = await self._reach(missing, agents)
                if errors and wait:
                    await asyncio.sleep(_BETWEEN_SECONDS)
            if errors and (is_first or len(agents) < self._plan.fewest):
                raise LaunchError(*(line for error in errors for line in error.args))
        except BaseException:
            await self._dismiss(agents.values())
            raise
        for error in errors:
            self._say(f"going on without {error}")
        return [agents[m.host.name] for m in self._plan.members if m.host.name in agents]

    async def _reach(self, members: Sequence[Member], agents: dict[str, Agent]) -> list[LaunchError]:
        """Adds those that answer; why the others do not."""
        answers = await asyncio.gather(
            *(Agent.reached(member, self._order(member)) for member in members), return_exceptions=True
        )
        agents |= {answer.name: answer for answer in answers if isinstance(answer, Agent)}
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, LaunchError):
                raise answer
        return [answer for answer in answers if isinstance(answer, LaunchError)]

    def _order(self, member: Member) -> dict[str, Any]:
        """The port is the first host's to open, which another may become."""
        may_be_first = member is self._plan.members[0] or self._plan.fewest < len(self._plan.members)
        return self._plan.order(self._environment, self._plan.port if may_be_first else None)

    async def _dismiss(self, agents: Iterable[Agent]) -> None:
        self._leaving = list(agents)
        if self._asked > 1:
            self._kill_those_that_leave()
        await asyncio.gather(*(agent.dismissed() for agent in self._leaving))
        self._leaving = []

    def _kill_those_that_leave(self) -> None:
        for agent in self._leaving:
            agent.kill()

    def _tell(self, last: End) -> None:
        """The culprit, below all that the others had to say, and its last lines below that."""
        if last.code == EXIT_USER and last.rank == 0:
            return  # it has said so itself
        self._say(last.told())
        if last.code not in (EXIT_USER, EXIT_STOPPED):
            for line in last.tail[-_SHOWN_LINES:]:
                self._say(f"    {line}")


def check_alike(agents: Sequence[Agent], plan: CrewPlan) -> None:
    """Raises LaunchError naming the host that differs from the first, or from here."""
    first = agents[0]
    mine = digest(plan.folder / plan.run_file)
    for agent in agents:
        for line in differences(agent.hello, first.hello, first.name, str(plan.run_file), mine):
            raise LaunchError(f"{agent.name}: {line}")
