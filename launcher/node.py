"""`python -m launcher.node`: the agent on a node, which starts the node's ranks and tells how they end.

Over ssh, and on one machine, it does what a launcher on the other side of its standard input says
(`--ordered`): all it needs to know comes that way, names, values and secrets, and nothing stands on a command
line. When the launcher or the link is gone it ends the ranks. In a pod or a Slurm task it stands alone: its
number is in the environment, and its exit code says what its ranks' do.

Rejected: torch's elastic agent, whose exit code is 1 for a user's mistake, a stop with a checkpoint and a bug
alike, whose ranks outlive it when it is killed, and which agrees on numbers that a scheduler has given
already.

Knows nothing of ssh, Slurm or Kubernetes.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from launcher import survey, wire
from launcher.command import Team
from launcher.ends import End, culprit, lifted
from launcher.ranks import Ranks
from prefix_ds.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_PEER,
    EXIT_STOPPED,
    EXIT_USER,
    LaunchError,
    PeerLost,
    PrefixError,
)

SETTLE_SECONDS = 5.0  # after one rank's end, for the others to say why they end
_ALONE_SECONDS, _SILENT_SECONDS = 8.0, 2.0  # for a checkpoint when the launcher is gone, or the link
_WAITING_LINES = 1000
_NAME_SECONDS = 300.0  # until the first pod's name is known
_NUMBERS = ("JOB_COMPLETION_INDEX", "SLURM_NODEID", "PET_NODE_RANK")


def main() -> None:
    """Ends with what the ranks say."""
    asked = _arguments()
    code = _exit_code(asked)
    sys.exit(lifted(code) if asked.lifted else code)


def _exit_code(asked: argparse.Namespace) -> int:
    try:
        return asyncio.run(_obey() if asked.ordered else _alone(asked))
    except PrefixError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_USER
    except PeerLost as lost:
        print(lost, file=sys.stderr)  # noqa: T201
        return EXIT_PEER
    except Exception:
        traceback.print_exc()
        return EXIT_BUG


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launcher.node", description="Starts a node's ranks.")
    parser.add_argument("--ordered", action="store_true", help="do what standard input says")
    parser.add_argument("--lifted", action="store_true", help="end with 201 for 1, and 202 for 2")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1, help="of each node")
    parser.add_argument("--gpus", type=int, default=0, help="of each node, if they must be there")
    parser.add_argument("--master", default="127.0.0.1:29500", help="HOST:PORT of the first node")
    parser.add_argument("--node", type=int, help=f"number of this node; none: {' or '.join(_NUMBERS)}")
    parser.add_argument("--grace-seconds", type=float, default=3600, help="for a checkpoint, after SIGTERM")
    parser.add_argument("--logs", type=Path, help="folder for a file a rank")
    parser.add_argument("words", nargs="*", help="arguments of prefix-ds, after --")
    return parser.parse_args()


async def _alone(asked: argparse.Namespace) -> int:
    """A node whose number the scheduler has given."""
    host, _, port = asked.master.rpartition(":")
    number = _number(asked)
    first, size = number * asked.ranks, asked.nodes * asked.ranks
    team = Team(first, asked.ranks, size, host, int(port), gpus=asked.gpus)
    ranks = Ranks(team, asked.words, asked.logs, _say_for)
    stopping: list[asyncio.Task[None]] = []
    is_asked = asyncio.Event()

    def stop() -> None:
        is_asked.set()
        stopping.append(asyncio.ensure_future(ranks.stop(asked.grace_seconds)))

    for signal_ in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_, stop)
    await _known(host, is_asked)
    if is_asked.is_set():  # as a container's first process, it would not end by itself
        return EXIT_STOPPED
    ends = await _all_ends(ranks, team, os.environ)
    last = culprit(ends)
    if last is None:
        return EXIT_DONE
    _say(last.told())
    return last.exit_code


_HOST = socket.gethostname()


async def _say_for(rank: int, line: str) -> None:
    _say(f"[{_HOST}:{rank}] {line}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _number(asked: argparse.Namespace) -> int:
    given = [os.environ[name] for name in _NUMBERS if name in os.environ]
    number = asked.node if asked.node is not None else int(given[0]) if given else 0
    if not 0 <= number < asked.nodes:
        raise LaunchError(f"--node: {number}: expected 0 to {asked.nodes - 1}")
    return number


async def _known(host: str, is_asked: asyncio.Event) -> None:
    """Returns when the name has an address, as a pod's has once it runs, or on request. Raises PeerLost."""
    deadline = time.monotonic() + _NAME_SECONDS
    while not is_asked.is_set():
        try:
            await asyncio.get_running_loop().getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerLost(f"--master: {host}: {error.strerror or error}") from None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(is_asked.wait(), 1)


async def _all_ends(ranks: Ranks, team: Team, environment: Mapping[str, str]) -> list[End]:
    """Of this node's ranks; the first bad one makes the others end too."""
    ends: list[End] = []
    settling = None
    async for end in ranks.run(_with_interface(environment, team)):
        ends.append(end)
        if end.ends_others and settling is None:
            settling = asyncio.ensure_future(_settle(ranks))
    if settling is not None:
        settling.cancel()
    return ends


async def _settle(ranks: Ranks) -> None:
    await asyncio.sleep(SETTLE_SECONDS)
    ranks.kill()


def _counting_on_gpus(team: Team, environment: Mapping[str, str]) -> Team:
    """With those that the driver shows and nobody hides, a rank for each: torch must find them too."""
    usable = len(team.devices) or survey.usable_gpus(environment)
    return replace(team, gpus=min(usable, team.num_ranks) if survey.gpus() else 0)


def _with_interface(environment: Mapping[str, str], team: Team) -> dict[str, str]:
    """gloo takes the interface of the host's own name, which often is the loopback."""
    name = survey.interface_towards(team.master) if team.is_spread else None
    return ({"GLOO_SOCKET_IFNAME": name} if name else {}) | dict(environment)


async def _obey() -> int:
    """A node whose launcher is at the other end of standard input and output."""
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

    async def run(self) -> None:
        """Until the launcher has closed its side and no rank lives."""
        for signal_ in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the launcher says when to stop
            asyncio.get_running_loop().add_signal_handler(signal_, lambda: None)
        grace_seconds = _ALONE_SECONDS
        try:
            async for message in wire.received(self._reader):
                await self._do(message)
        except wire.SilentError:
            grace_seconds = _SILENT_SECONDS
        if self._ranks is not None:
            await self._ranks.stop(grace_seconds)
        if self._running is not None:
            await self._running

    async def _do(self, message: wire.Message) -> None:
        match message:
            case {"order": order}:
                await self._tell(self._answer(order))
            case {"survey": asked}:
                await self._tell({"survey": _surveyed(asked)})
            case {"team": team, "words": words}:
                self._running = asyncio.ensure_future(self._run(Team(**team), words))
            case {"stop": seconds} if self._ranks is not None:
                self._stopping = asyncio.ensure_future(self._ranks.stop(seconds))
            case {"kill": _} if self._ranks is not None:
                self._ranks.kill()

    def _answer(self, order: wire.Message) -> wire.Message:
        """What this node is, or why it cannot take part."""
        self._environment |= order["environment"]
        self._logs = Path(order["logs"]) if order["logs"] else None
        try:
            os.chdir(order["folder"])
            port = survey.free_port(order["port"])
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
        async for end in self._ranks.run(_with_interface(self._environment, team)):
            await queue.put({"end": asdict(end)})
        await asyncio.wait([asyncio.ensure_future(queue.join())], timeout=1)
        telling.cancel()

    async def _tell_all(self, queue: asyncio.Queue[wire.Message]) -> None:
        while True:
            await self._tell(await queue.get())
            queue.task_done()

    async def _tell(self, message: wire.Message) -> None:
        await wire.send(self._writer, message)


if __name__ == "__main__":
    main()
