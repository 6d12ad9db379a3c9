"""The processes of one node: started, heard, and ended, all of them and no others.

Every rank leads a session of its own. The kernel kills it when we die, however we die; what it leaves behind
is in its process group, and nobody else is. Its lines go to a file and to whoever listens.

Knows nothing of other nodes.
"""

import asyncio
import ctypes
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from launcher import survey
from launcher.command import Team, rank_command, rank_environment
from launcher.ends import End

_TAIL_LINES, _LONGEST_LINE, _LONGEST_IN_TAIL = 40, 1 << 16, 2000
_ORPHAN_SECONDS = 4.0  # for what a rank leaves behind: its mirror tells MLflow how it ended
_DRAIN_SECONDS = 1.0  # for lines that are still in a pipe when the rank is gone
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

Heard = Callable[[int, str], Awaitable[None]]


@dataclass
class _Rank:
    number: int
    process: asyncio.subprocess.Process
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))
    by_us: bool = False
    is_over: "asyncio.Future[None]" = field(default_factory=asyncio.Future)


class Ranks:
    """The ranks of a node, from start to end."""

    def __init__(self, team: Team, words: Sequence[str], logs: Path | None, heard: Heard) -> None:
        """`words`: the arguments of prefix-ds. `logs`: folder of a file a rank. `heard` gets each line."""
        self._team, self._words, self._logs, self._heard = team, words, logs, heard
        self._ranks: list[_Rank] = []
        self._telling: set[asyncio.Future[None]] = set()
        self._is_stopping = False
        self.host = socket.gethostname()

    async def run(self, environment: Mapping[str, str]) -> AsyncIterator[End]:
        """Starts all; gives the end of each, in the order in which they end."""
        environment = _with_interface(environment, self._team)
        for number in self._team.ranks():
            process = await self._started(number, environment)
            self._ranks.append(_Rank(number, process))
        if self._is_stopping:  # asked for before all were there to hear it
            self.signal(signal.SIGTERM)
        ending = [asyncio.ensure_future(self._ended(rank)) for rank in self._ranks]
        for end in asyncio.as_completed(ending):
            yield await end

    async def _started(self, number: int, environment: Mapping[str, str]) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *rank_command(self._words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**environment, **rank_environment(self._team, number), "PATH": _path(environment)},
            start_new_session=True,
            preexec_fn=_dying_with(os.getpid()),
        )

    async def _ended(self, rank: _Rank) -> End:
        listening = asyncio.ensure_future(self._listen(rank))
        code = await rank.process.wait()
        rank.is_over.set_result(None)
        await asyncio.wait([listening], timeout=_DRAIN_SECONDS)  # a child may hold the pipe open
        listening.cancel()
        await _end_group(rank.process.pid, _ORPHAN_SECONDS)
        return End(self.host, rank.number, code, tuple(rank.tail), rank.by_us)

    async def _listen(self, rank: _Rank) -> None:
        """Lines as they come. While whoever listens is slow, the rank's print waits; when it is over nothing
        does, so that its last lines are kept."""
        assert rank.process.stdout is not None
        with _log_file(self._logs, self.host, rank.number) as log:
            async for line in _lines(rank.process.stdout):
                rank.tail.append(line[:_LONGEST_IN_TAIL])
                log.write(line)
                telling = asyncio.ensure_future(self._heard(rank.number, line))
                self._telling.add(telling)
                telling.add_done_callback(self._telling.discard)
                await asyncio.wait([telling, rank.is_over], return_when=asyncio.FIRST_COMPLETED)

    def signal(self, number: signal.Signals) -> None:
        """Sends it to every rank that lives."""
        for rank in self._living():
            os.kill(rank.process.pid, number)

    def kill(self) -> None:
        """Ends every rank at once; what it has started has a few seconds more, to tell MLflow."""
        for rank in self._living():
            rank.by_us = True
            os.kill(rank.process.pid, signal.SIGKILL)

    def _living(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.process.returncode is None]

    async def stop(self, grace_seconds: float) -> None:
        """Asks every rank to write a checkpoint and end; kills what still lives after the grace."""
        self._is_stopping = True
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while self._living() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.kill()


def _with_interface(environment: Mapping[str, str], team: Team) -> dict[str, str]:
    """gloo takes the interface of the host's own name, which often is the loopback."""
    name = survey.interface_towards(team.master) if team.is_spread else None
    return ({"GLOO_SOCKET_IFNAME": name} if name else {}) | dict(environment)


def _path(environment: Mapping[str, str]) -> str:
    """With our Python's folder first: DeepSpeed looks there for ninja, and nobody has activated anything."""
    folder = Path(sys.executable).parent  # not resolved: it is that of the virtual environment
    return os.pathsep.join([str(folder), environment.get("PATH", os.defpath)])


def _dying_with(parent: int) -> Callable[[], None]:
    def ask() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before we had asked
                os._exit(1)

    return ask


def _signal_group(group: int, number: signal.Signals | int) -> bool:
    """Whether there was anybody."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


async def _end_group(group: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while _signal_group(group, 0) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    _signal_group(group, signal.SIGKILL)


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines; one that is too long to keep comes in pieces, and of one that a bar rewrites the last state."""
    rest = b""
    while piece := await stream.read(_LONGEST_LINE):
        *whole, rest = (rest + piece).split(b"\n")
        if len(rest) > _LONGEST_LINE:
            whole, rest = [*whole, rest], b""
        for line in whole:
            yield _text(line)
    if rest:
        yield _text(rest)


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]


class _LogFile:
    """Lines of a rank on its node's disk. A disk that is full costs lines, not the run."""

    def __init__(self, file: IO[str] | None) -> None:
        self._file = file

    def write(self, line: str) -> None:
        if self._file is not None:
            try:
                print(line, file=self._file, flush=True)
            except OSError:
                self._file = None

    def __enter__(self) -> "_LogFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _log_file(folder: Path | None, host: str, rank: int) -> _LogFile:
    if folder is None:
        return _LogFile(None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _LogFile((folder / f"{host}-rank-{rank}.log").open("a", encoding="utf-8"))
    except OSError:
        return _LogFile(None)
