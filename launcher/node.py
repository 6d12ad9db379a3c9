"""`python -m launcher.node`: the agent on a node, which starts the node's ranks and tells how they end.

Over ssh, and on one machine, it does what a launcher at the other end of its standard input says
(`--ordered`, see `ordered`). In a pod or a Slurm task it stands alone (`alone`): its number is in the
environment, and its exit code says what its ranks' do.

Rejected: torch's elastic agent, whose exit code is 1 for a user's mistake, a stop with a checkpoint and a bug
alike, whose ranks outlive it when it is killed, and which agrees on numbers that a scheduler has given
already.

Knows nothing of ssh, Slurm or Kubernetes.
"""

import argparse
import asyncio
import os
import sys
import traceback
from pathlib import Path

from launcher.alone import node_alone
from launcher.command import Team
from launcher.ends import lifted
from launcher.ordered import obey
from prefix_ds.errors import EXIT_BUG, EXIT_USER, LaunchError, PrefixError

_NUMBERS = ("JOB_COMPLETION_INDEX", "SLURM_NODEID", "PET_NODE_RANK")


def main() -> None:
    """Ends with what the ranks say."""
    asked = _arguments()
    code = _exit_code(asked)
    sys.exit(lifted(code) if asked.lifted else code)


def _exit_code(asked: argparse.Namespace) -> int:
    try:
        return asyncio.run(obey() if asked.ordered else _alone(asked))
    except PrefixError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return EXIT_USER
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
    parser.add_argument("--node", type=int, help=f"number of this node; left out: {' or '.join(_NUMBERS)}")
    parser.add_argument("--grace-seconds", type=float, default=3600, help="for a checkpoint, after SIGTERM")
    parser.add_argument("--logs", type=Path, help="folder for a file a rank")
    parser.add_argument("words", nargs="*", help="arguments of prefix-ds, after --")
    return parser.parse_args()


async def _alone(asked: argparse.Namespace) -> int:
    host, _, port = asked.master.rpartition(":")
    first, size = _number(asked) * asked.ranks, asked.nodes * asked.ranks
    team = Team(first, asked.ranks, size, host, int(port), gpus=asked.gpus)
    return await node_alone(team, asked.words, asked.logs, asked.grace_seconds)


def _number(asked: argparse.Namespace) -> int:
    given = [os.environ[name] for name in _NUMBERS if name in os.environ]
    number = asked.node if asked.node is not None else int(given[0]) if given else 0
    if not 0 <= number < asked.nodes:
        raise LaunchError(f"--node: {number}: expected 0 to {asked.nodes - 1}")
    return number


if __name__ == "__main__":
    main()
