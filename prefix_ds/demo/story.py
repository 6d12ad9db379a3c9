"""`prefix-ds demo`: pretrain a small base, tune a prefix on it, fine-tune it in full, and compare.

Reads like a table of contents. Everything lies in one folder: the texts, the three run files and their runs,
a log a stage and the comparison. A demo that was stopped goes on; one that has ended is shown again.

Knows nothing of tensors; imports no torch.
"""

import importlib.resources
import signal
import time
from pathlib import Path

from rich.console import Console

from prefix_ds.config import read_config
from prefix_ds.demo.comparison import FILE as COMPARISON
from prefix_ds.demo.comparison import read_comparison
from prefix_ds.demo.corpus import corpus_files
from prefix_ds.demo.diary import opened_diary
from prefix_ds.demo.report import show
from prefix_ds.demo.stages import run_stage, steps_of
from prefix_ds.errors import Stopped
from prefix_ds.logs import configure_logging

STAGES = {
    "base": "1/4 a base from scratch",
    "prefix": "2/4 a prefix on the frozen base",
    "full": "3/4 all weights, to compare",
    "measure": "4/4 the comparison",
}


def demo(folder: Path) -> None:
    """Tells the story in `folder`. Raises RunError; Stopped on Ctrl-C, and then goes on the next time."""
    configure_logging()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    try:
        _tell(folder)
    except KeyboardInterrupt:
        raise Stopped(f"stopped; prefix-ds demo {folder} goes on from here") from None
    Console().print(f"This took {time.monotonic() - began:.0f} seconds.")


def demo_files(folder: Path) -> dict[str, str]:
    """What a demo in `folder` starts from: the run files and the texts, by their path in it."""
    runs = importlib.resources.files("prefix_ds.demo")
    place = str(folder).replace("'", "''")  # within a quoted YAML text
    files = {
        f"{name}.yaml": (runs / f"{name}.yaml").read_text(encoding="utf-8").replace("FOLDER", place)
        for name in ("base", "prefix", "full")
    }
    return files | {f"corpus/{name}": text for name, text in corpus_files().items()}


def _tell(folder: Path) -> None:
    console = Console()
    diary = opened_diary(folder, demo_files(folder))
    console.print("Four stages of two CPU processes each, about three minutes.")
    for name, title in STAGES.items():
        if name not in diary.finished:
            _run(folder, name, title)
            diary = diary.with_stage(folder, name)
        console.print(f"{title}: done")
    show(console, folder, read_comparison(folder))


def _run(folder: Path, name: str, title: str) -> None:
    log = folder / f"{name}.log"
    if name == "measure":
        (folder / COMPARISON).unlink(missing_ok=True)
        module = ["prefix_ds.demo.measure", str(folder)]
        run_stage(title, module, log, 1, lambda: (int((folder / COMPARISON).exists()), {}))
    else:
        module = ["prefix_ds", "train", str(folder / f"{name}.yaml")]
        steps = read_config(folder / f"{name}.yaml").train.max_steps or 0
        run_stage(title, module, log, steps, lambda: steps_of(folder / name))
