"""A node that does what its launcher says, at the other end of standard input and output.

All that the node needs to know comes that way, names, values and secrets, and nothing stands on a command
line. When the launcher or the link is gone the ranks are ended.

Knows nothing of what lies between it and its launcher.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from launcher import survey, wire
from launcher.command import Team
from launcher.ranks import Ranks
from prefix_ds.errors import EXIT_DONE, LaunchError

_ALONE_SECONDS, _SILENT_SECONDS = 8.0, 2.0  # for a checkpoint when the launcher is gone, or the link
_WAITING_LINES = 1000
_LAST_LINES_SECONDS = 10.0  # for a slow link to take them, and the ends behind them


async def obey() -> int:
    """Until the launcher has closed its side and no rank lives. The exit code."""
    reader, writer = await _standard_streams()
    beating = asyncio.ensure_future(wire.beat(writer))
    try:
        await _Obeying(reader, writer).run()
    finally:
        beating.cancel()
    return EXIT_DONE


async def _standard_streams() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=wire.LONGEST_MESSAGE)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sys.stdout)
    return reader, asyncio.StreamWriter(transport, protocol, None, loop)


def _surveyed(asked: wire.Message) -> wire.Message:
    """What a doctor wants to know beyond the hello."""
    return {
        "files": survey.files(asked["paths"]),
        "gpus": survey.gpus(),
        "free_gib": survey.free_gib(Path(asked["folder"])),
        "time": time.time(),
    }


class _Obeying:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._ranks: Ranks | None = None
        self._running: asyncio.Future[None] | None = None
        self._environment = dict(os.environ)
        self._logs: Path | None = None
        self._grace_seconds = _ALONE_SECONDS

    async def run(self) -> None:
        """Until the launcher has closed its side and no rank lives, or ranks cannot be started."""
        for signal_ in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the launcher says when to stop
            asyncio.get_running_loop().add_signal_handler(signal_, lambda: None)
        self._hearing = asyncio.ensure_future(self._hear())
        await asyncio.wait([self._hearing])
        if self._ranks is not None:
            await self._ranks.stop(self._grace_seconds)
        if self._running is not None:
            await self._running
        await self._hearing

    async def _hear(self) -> None:
        try:
            async for message in wire.received(self._reader):
                await self._do(message)
        except wire.SilentError:
            self._grace_seconds = _SILENT_SECONDS

    async def _do(self, message: wire.Message) -> None:
        match message:
            case {"order": order}:
                await self._tell(self._answer(order))
            case {"survey": asked}:
                await self._tell({"survey": _surveyed(asked)})
            case {"team": team, "words": words}:
                self._running = asyncio.ensure_future(self._run(Team(**team), words))
                self._running.add_done_callback(self._end_if_it_failed)
            case {"stop": seconds} if self._ranks is not None:
                self._stopping = asyncio.ensure_future(self._ranks.stop(seconds))
            case {"kill": _} if self._ranks is not None:
                self._ranks.kill()

    def _end_if_it_failed(self, running: "asyncio.Future[None]") -> None:
        """The launcher waits for ends of ranks, or for ours: our last words are what went wrong."""
        if not running.cancelled() and running.exception() is not None:
            self._hearing.cancel()

    def _answer(self, order: wire.Message) -> wire.Message:
        """What this node is, or why it cannot take part."""
        self._environment |= order["environment"]
        self._logs = Path(order["logs"]) if order["logs"] else None
        try:
            os.chdir(order["folder"])
            port = survey.free_port(order["port"])
            if order["master"]:
                survey.check_address(order["master"])
        except OSError as error:
            return {"refused": f"{order['folder']}: {error.strerror}"}
        except LaunchError as error:
            return {"refused": str(error)}
        return {
            "hello": {
                "versions": survey.versions(),
                "run_file": survey.digest(Path(order["run_file"])),
                "address": survey.own_address(),
                "port": port,
                "pid": os.getpid(),
            }
        }

    async def _run(self, team: Team, words: list[str]) -> None:
        queue: asyncio.Queue[wire.Message] = asyncio.Queue(_WAITING_LINES)  # full: a rank's print waits
        telling = asyncio.ensure_future(self._tell_all(queue))

        async def heard(rank: int, line: str) -> None:
            await queue.put({"line": [rank, line]})

        self._ranks = Ranks(_counting_on_gpus(team, self._environment), words, self._logs, heard)
        async for end in self._ranks.run(self._environment):
            await queue.put({"end": asdict(end)})
        await asyncio.wait([asyncio.ensure_future(queue.join())], timeout=_LAST_LINES_SECONDS)
        telling.cancel()

    async def _tell_all(self, queue: asyncio.Queue[wire.Message]) -> None:
        while True:
            await self._tell(await queue.get())
            queue.task_done()

    async def _tell(self, message: wire.Message) -> None:
        await wire.send(self._writer, message)


def _counting_on_gpus(team: Team, environment: Mapping[str, str]) -> Team:
    """With those that the driver shows and nobody hides, a rank for each: torch must find them too."""
    usable = len(team.devices) or survey.usable_gpus(environment)
    return replace(team, gpus=min(usable, team.num_ranks) if survey.gpus() else 0)
