"""A node of a job that a scheduler has started: in a pod, or as a Slurm task.

Knows nothing of where its number comes from.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.command import Team
from launcher.ends import SETTLE_SECONDS, End, culprit
from launcher.ranks import Ranks
from prefix_ds.errors import EXIT_DONE, EXIT_STOPPED

_HOST = socket.gethostname()


async def node_alone(team: Team, words: Sequence[str], logs: Path | None, grace_seconds: float) -> int:
    """Runs its ranks to their end, or to the scheduler's signal. The exit code."""
    ranks = Ranks(team, words, logs, _say_for)
    stopping: list[asyncio.Task[None]] = []
    is_asked = asyncio.Event()

    def stop() -> None:
        is_asked.set()
        stopping.append(asyncio.ensure_future(ranks.stop(grace_seconds)))

    for signal_ in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_, stop)
    await _known(team.master, is_asked)
    if is_asked.is_set():  # as a container's first process, it would not end by itself
        return EXIT_STOPPED
    ends = await _all_ends(ranks)
    last = culprit(ends)
    if last is None:
        return EXIT_DONE
    _say(last.told())
    return last.exit_code


async def _say_for(rank: int, line: str) -> None:
    _say(f"[{_HOST}:{rank}] {line}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def _known(host: str, is_asked: asyncio.Event) -> None:
    """Returns when the name has an address, as a pod's has once it runs, or on request."""
    is_told = False
    while not is_asked.is_set():
        try:
            await asyncio.get_running_loop().getaddrinfo(host, None)
            return
        except OSError as error:
            if not is_told:
                _say(f"waiting for {host}, which runs nowhere yet: {error}")
            is_told = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(is_asked.wait(), 1)


async def _all_ends(ranks: Ranks) -> list[End]:
    """Of this node's ranks; the first bad one makes the others end too."""
    ends: list[End] = []
    settling = None
    async for end in ranks.run(os.environ):
        ends.append(end)
        if end.ends_others and settling is None:
            settling = asyncio.ensure_future(_settle(ranks))
    if settling is not None:
        settling.cancel()
    return ends


async def _settle(ranks: Ranks) -> None:
    await asyncio.sleep(SETTLE_SECONDS)
    ranks.kill()
