"""What makes a prefix as good as it can be: one thing changed at a time, at equal steps, on bases pretrained here.

    python -m tests.benchmarks.study FOLDER [--quick] [TASK] [PART OF A VARIANT'S NAME ...]

TASK is E2E (the default), DialogSum or Multi30k, with the base, data and steps of `tests.benchmarks.quality`.
Start, length, learning rate, MLP, weight decay, schedule, layers: each variant of the standing choice runs with
three seeds, two runs at a time. Printed: the best validation loss in nats a target token, mean and deviation
over seeds, and how far that is from the standing choice, seed by seed. Started again it goes on; a few variants
can be named. `--quick`: two variants, one seed, ten steps.
"""

import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks.quality import SEEDS, TASKS, best_of, in_twos, of_ours, pretrain, run_file, started

INSTRUCTION = "Write a sentence that says what the data say."
STANDING = "text, 64 positions, rate 0.1"
VARIANTS = {
    STANDING: ["train.lr=0.1"],
    "rate 0.005": ["train.lr=0.005"],
    "rate 0.01": ["train.lr=0.01"],
    "rate 0.03": ["train.lr=0.03"],
    "rate 0.3": ["train.lr=0.3"],
    "rate 1": ["train.lr=1"],
    "start: an instruction": ["train.lr=0.1", f"prefix.text={INSTRUCTION}"],
    "start: noise of 0.02": ["train.lr=0.1", "prefix.init=random", "prefix.init_std=0.02"],
    "start: noise of 0.02, rate 0.3": ["train.lr=0.3", "prefix.init=random", "prefix.init_std=0.02"],
    "start: noise of 0.5": ["train.lr=0.1", "prefix.init=random", "prefix.init_std=0.5"],
    "start: noise of 1, rate 0.3": ["train.lr=0.3", "prefix.init=random", "prefix.init_std=1"],
    "start: as good as zero": ["train.lr=0.1", "prefix.init=random", "prefix.init_std=1e-6"],
    "as long as the text": ["train.lr=0.1", "prefix.length=null"],
    "16 positions, noise": ["train.lr=0.1", "prefix.length=16", "prefix.init=random", "prefix.init_std=0.02"],
    "128 positions": ["train.lr=0.1", "prefix.length=128"],
    "128 positions, rate 0.3": ["train.lr=0.3", "prefix.length=128"],
    "256 positions": ["train.lr=0.1", "prefix.length=256"],
    "256 positions, rate 0.3": ["train.lr=0.3", "prefix.length=256"],
    "second decay rate 0.98": ["train.lr=0.1", "train.betas=[0.9,0.98]"],
    "MLP of 512, rate 0.003": ["train.lr=0.003", "prefix.reparam_dim=512"],
    "MLP of 512, rate 0.01": ["train.lr=0.01", "prefix.reparam_dim=512"],
    "weight decay 0.01": ["train.lr=0.1", "train.weight_decay=0.01"],
    "weight decay 0.1": ["train.lr=0.1", "train.weight_decay=0.1"],
    "linear": ["train.lr=0.1", "train.schedule=linear"],
    "constant": ["train.lr=0.1", "train.schedule=constant"],
    "no warmup": ["train.lr=0.1", "train.warmup_steps=0"],
    "no clipping": ["train.lr=0.1", "train.clip_norm=0"],
    "upper half of the layers": ["train.lr=0.1", "prefix.layers=[4,5,6,7]"],
    "lower half of the layers": ["train.lr=0.1", "prefix.layers=[0,1,2,3]"],
    "the first position frozen": ["train.lr=0.1"],
    "start: words of the vocabulary": ["train.lr=0.1", "prefix.init=vocabulary"],
    "start: words of the vocabulary, rate 0.3": ["train.lr=0.3", "prefix.init=vocabulary"],
    "constant, rate 0.3": ["train.lr=0.3", "train.schedule=constant"],
    "start: noise as wide as the vocabulary's": ["train.lr=0.1", "prefix.init=random"],
    "start: noise as wide as the vocabulary's, rate 0.3": ["train.lr=0.3", "prefix.init=random"],
}
PROGRAMS = {"the first position frozen": "tests.benchmarks.frozen_first"}


def main():
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    quick, folder = "--quick" in sys.argv, Path(words[0]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    pretrain(folder, quick)
    task = next((task for task in TASKS if task.name in words[1:]), TASKS[0])
    parts = [word for word in words[1:] if word != task.name]
    names = [name for name in VARIANTS if name == STANDING or not parts or any(p in name for p in parts)]
    names, seeds = (names[:2], SEEDS[:1]) if quick else (names, SEEDS)
    asked = [(name, seed) for seed in seeds for name in names]
    run = run_file(task, folder, quick)
    found = dict(zip(asked, in_twos(lambda one: loss_of(run, *one), asked), strict=True))
    show(task, found)


def loss_of(run, name, seed):
    """The best validation loss; trained where it has not been yet."""
    folder = run.parent / f"study-{run.stem}-{list(VARIANTS).index(name)}-{seed}"
    result = folder.with_suffix(".json")
    if not result.is_file():
        words = (f"run.folder={folder}", f"train.seed={seed}", *VARIANTS[name])
        started(PROGRAMS.get(name, "prefix_ds"), "train", run, *words, threads=1)
        result.write_text(json.dumps(of_ours(folder) | {"variant": name}))
    return best_of(json.loads(result.read_text()))


def show(task, found):
    table = Table("variant", "loss", "beside the standing choice, seed by seed", title=task.name)
    seeds = sorted({seed for _, seed in found})
    losses = {name: [found[name, seed] for seed in seeds] for name, seed in found if seed == seeds[0]}
    for name, by_seed in sorted(losses.items(), key=lambda one: statistics.mean(one[1])):
        apart = ", ".join(f"{a - b:+.4f}" for a, b in zip(by_seed, losses[STANDING], strict=True))
        deviation = f" ± {statistics.stdev(by_seed):.4f}" if len(seeds) > 1 else ""
        table.add_row(name, f"{statistics.mean(by_seed):.4f}{deviation}", apart)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
