"""The launcher's end of the line to a node's agent: a child process, ssh or the agent itself.

Knows nothing of what a job is.
"""

import asyncio
import contextlib
import os
import signal
from collections import deque
from typing import Any

from launcher import wire
from launcher.crew import Member
from prefix_ds.errors import LaunchError, printable

REACH_SECONDS = 10.0
_LEAVE_SECONDS = 20.0  # for an agent whose input was closed, to end what it has started


class Agent:
    """An agent that answers. `hello` is what its node has (`launcher.survey`)."""

    def __init__(self, member: Member, process: asyncio.subprocess.Process) -> None:
        self.member, self.process = member, process
        self.hello: dict[str, Any] = {}
        self._errors: deque[str] = deque(maxlen=5)
        self._tasks = [asyncio.ensure_future(self._hear_errors())]

    @property
    def name(self) -> str:
        """The host's."""
        return self.member.host.name

    @classmethod
    async def reached(cls, member: Member, order: wire.Message) -> "Agent":
        """Starts it and waits for its answer. Raises LaunchError, naming the host."""
        try:
            process = await asyncio.create_subprocess_exec(
                *member.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # a terminal's Ctrl-C is for us alone
                limit=wire.LONGEST_MESSAGE,
            )
        except OSError as error:
            raise LaunchError(f"{member.host.name}: {member.command[0]}: {error.strerror}") from None
        agent = cls(member, process)
        try:
            await agent._introduced(order)
        except BaseException:
            await agent.dismissed(at_once=True)
            raise
        return agent

    async def _introduced(self, order: wire.Message) -> None:
        await self.send({"order": order})
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(REACH_SECONDS):
                async for message in wire.received(self.process.stdout, REACH_SECONDS):
                    if "refused" in message:
                        raise LaunchError(f"{self.name}: {message['refused']}")
                    self.hello = message["hello"]
                    break
        except (TimeoutError, wire.SilentError):
            raise LaunchError(f"{self.name}: no answer within {REACH_SECONDS:.0f} seconds") from None
        if not self.hello:
            raise LaunchError(f"{self.name}: {await self.last_words()}")
        assert self.process.stdin is not None
        self._tasks.append(asyncio.ensure_future(wire.beat(self.process.stdin)))

    async def send(self, message: wire.Message) -> None:
        """Tells it something; one that is gone is found by listening."""
        assert self.process.stdin is not None
        await wire.send(self.process.stdin, message)

    async def asked(self, message: wire.Message, name: str) -> Any:
        """Its answer to a question. Raises LaunchError, naming the host."""
        await self.send(message)
        assert self.process.stdout is not None
        try:
            async for answer in wire.received(self.process.stdout):
                return answer[name]
        except wire.SilentError:
            pass
        raise LaunchError(f"{self.name}: {await self.last_words()}")

    async def listen(self, queue: "asyncio.Queue[tuple[Agent, wire.Message]]") -> None:
        """Hands on what it says, and `{"gone": reason}` as the last."""
        assert self.process.stdout is not None
        try:
            async for message in wire.received(self.process.stdout):
                await queue.put((self, message))
            reason = await self.last_words()
        except wire.SilentError:
            reason = f"no sign of life for {wire.SILENCE_SECONDS:.0f} seconds"
        await queue.put((self, {"gone": reason}))

    async def last_words(self) -> str:
        """What ssh, or the agent's Python, said last."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.process.wait(), 2)
        await asyncio.wait(self._tasks[:1], timeout=0.5)
        code = self.process.returncode
        how = "its agent ended" if code is None else f"its agent ended with exit code {code}"
        return printable(self._errors[-1]) if self._errors else how

    async def _hear_errors(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            if text := line.decode(errors="replace").strip():
                self._errors.append(text)

    async def dismissed(self, *, at_once: bool = False) -> None:
        """Returns when its process is gone; an agent ends what it has started as soon as it hears no more."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), 0 if at_once else _LEAVE_SECONDS)
        except TimeoutError:
            self.kill()
            await self.process.wait()
        for task in self._tasks:
            task.cancel()

    def kill(self) -> None:
        """Ends its process; over there the agent hears no more, and ends what it has started."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
