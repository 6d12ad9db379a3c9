"""Runs a stage of the demo in processes of its own, as a user would, and shows how far it has come.

A stage is two CPU ranks under torchrun. Their output goes to a log file, and what is shown here is read from
files they write, so one process alone writes on the terminal. torchrun gets a session of its own: Ctrl-C
reaches this process, which asks it to end its ranks (they write a checkpoint) and waits.

Knows nothing of what a stage computes; imports no torch.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from prefix_ds.dist import environment_with
from prefix_ds.errors import RunError
from prefix_ds.tracking import progress_bar, read_metrics

NUM_RANKS = 2
_PATIENCE_SECONDS = 45  # torchrun itself waits 30 for its ranks

Answer = tuple[int, dict[str, float | str]]  # how much is done, and values worth showing


def run_stage(title: str, module: Sequence[str], log: Path, total: int, look: Callable[[], Answer]) -> None:
    """Runs `python -m MODULE ...` on all ranks until it ends well; `look` says how much of `total` is done.

    Raises RunError. Whatever ends this function ends the ranks too.
    """
    with log.open("w", encoding="utf-8") as output, progress_bar(title, total) as bar:
        child = _started(module, output.fileno())
        told = 0
        try:
            while child.poll() is None:
                time.sleep(0.5)
                done, shown = look()
                if done > told:
                    bar.at(done, **shown)
                    told = done
        finally:
            _ended(child)
    if child.returncode:
        raise RunError(f"{log}: {title}: ended with exit code {child.returncode}", *_last_words(log))


def steps_of(run: Path) -> Answer:
    """The last step in a run's metrics, with its loss."""
    losses = [(r.step, r.values["train/loss"]) for r in read_metrics(run) if "train/loss" in r.values]
    return (losses[-1][0], {"loss": losses[-1][1]}) if losses else (0, {})


def _last_words(log: Path) -> list[str]:
    """The end of what the ranks said, without torchrun's report that follows."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    report = next((n for n, line in enumerate(lines) if "failed (exitcode" in line), len(lines))
    return lines[max(0, report - 15) : report]


def _started(module: Sequence[str], output: int) -> subprocess.Popen[bytes]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_RANKS), "-m"]
    return subprocess.Popen(
        [sys.executable, *launch, *module],
        stdout=output,
        stderr=subprocess.STDOUT,
        # No GPU, and no second thread for matrices this small: the same story everywhere.
        env=environment_with(
            CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", PREFIX_DS_THREADS="1"
        ),
        start_new_session=True,
    )


def _ended(child: subprocess.Popen[bytes]) -> None:
    """Asks a child that still runs to end, and then makes it."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_PATIENCE_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            _killed(child)


def _killed(child: subprocess.Popen[bytes]) -> None:
    """Kills torchrun and its ranks, which have sessions of their own."""
    import psutil

    for process in psutil.Process(child.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    child.kill()
    child.wait()
