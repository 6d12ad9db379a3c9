"""What outlives the process: checkpoints and the best result, written by the ranks that hold them.

A prefix is whole on every rank, so rank 0 alone touches the run folder, on writing and on reading; the others
are told. A model trained in shards is written by all ranks, a file each, and goes on only on as many. A disk
that fails on one rank is an error of all.

Knows nothing of when to save.
"""

from dataclasses import asdict
from typing import Any

from prefix_ds.checkpoint import (
    Checkpoint,
    begin,
    discard,
    latest,
    pending_folder,
    prune,
    save_checkpoint,
    seal,
    write_tensors,
)
from prefix_ds.config import RunConfig, fixed_keys
from prefix_ds.dist import World, gathered, on_first, together
from prefix_ds.engine.step import Engine
from prefix_ds.errors import RunError
from prefix_ds.progress import Progress
from prefix_ds.run_folder import RunFolder, refuse_another


class RunMemory:
    """The memory of one run, in its folder. Every rank calls each method."""

    def __init__(self, folder: RunFolder, world: World, config: RunConfig, data: str) -> None:
        """Keeps `run.keep` checkpoints; the result is a prefix or a model, as `train.method` says.

        `data` is a digest of what is trained on: a run goes on with the same, and with the same fixed keys.
        """
        self.keys = fixed_keys(config)
        self.folder, self.world, self.keep, self.data = folder, world, config.run.keep, data
        self.result = folder.prefix if config.train.method == "prefix" else folder.model

    def save(self, engine: Engine, progress: Progress) -> None:
        """Writes a checkpoint; older ones beyond `keep` go. Raises RunError."""
        ranks = self.world.size if engine.every_rank_saves else None
        state = {"progress": asdict(progress), "ranks": ranks, "data": self.data, "keys": self.keys}
        if engine.every_rank_saves:
            self._save_by_all(engine, progress.step, state)
        else:
            on_first(
                self.world, lambda: save_checkpoint(self.folder.path, progress.step, engine.tensors(), state)
            )
        on_first(self.world, lambda: prune(self.folder.path, self.keep, progress.step))

    def save_result(self, engine: Engine, progress: Progress) -> None:
        """Writes the best result so far. Raises RunError."""
        engine.write_result(self.result, progress)

    def newest(self) -> Checkpoint | None:
        """The newest sound checkpoint; None if there is none. Raises RunError for that of another run."""
        found = on_first(self.world, lambda: latest(self.folder.path))
        if found is not None:
            refuse_another(self.folder, found.state.get("keys", {}), self.keys)
            self._refuse_other_world(found)
            self._refuse_other_data(found)
        return found

    def restore(self, engine: Engine, found: Checkpoint | None) -> Progress:
        """Puts a checkpoint back into the engine and says where the run stands. Raises RunError."""
        if found is None:
            return Progress()
        if engine.every_rank_saves:
            tensors = together(lambda: found.tensors(name=self._file()))
        else:
            tensors = on_first(self.world, found.tensors)
        engine.restore(tensors)
        return Progress(**found.state["progress"])

    def _file(self) -> str:
        return f"rank-{self.world.rank:04d}.safetensors"

    def _save_by_all(self, engine: Engine, step: int, state: dict[str, Any]) -> None:
        run = self.folder.path
        file = pending_folder(run, step) / self._file()
        try:
            on_first(self.world, lambda: begin(run, step))
            digests = gathered(together(lambda: write_tensors(file, engine.tensors())))
            on_first(self.world, lambda: seal(run, step, digests, state))
        except RunError:  # on all ranks alike
            on_first(self.world, lambda: discard(run, step))
            raise

    def _refuse_other_world(self, found: Checkpoint) -> None:
        ranks = found.state["ranks"]
        if ranks not in (None, self.world.size):
            raise RunError(
                f"{found.folder}: was written by {ranks} ranks, here are {self.world.size}: "
                "a run with train.method full or pretrain goes on only on as many ranks"
            )

    def _refuse_other_data(self, found: Checkpoint) -> None:
        if found.state.get("data", self.data) != self.data:
            raise RunError(
                f"{found.folder}: data.train has other examples now than this run was trained on (changed "
                "files, a hub id without a revision, another tokenizer): put them back, or choose another "
                "run.folder"
            )
