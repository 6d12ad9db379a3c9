"""`prefix-ds import`: a PEFT prefix becomes a run folder, to generate with or to export again.

PEFT's files name no layers, so the base is loaded to see where a prefix enters it: in shards, on as many
ranks as there are. The first of them writes.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from prefix_ds.config import RunConfig, parse_config
from prefix_ds.dist import joined_world, on_first, peers_may_die
from prefix_ds.errors import RunError
from prefix_ds.export import PeftPrefix, import_peft, read_peft
from prefix_ds.files import whole_folder
from prefix_ds.logs import configure_logging
from prefix_ds.opening import Opened, open_trained
from prefix_ds.progress import Progress
from prefix_ds.result import prefix_facts
from prefix_ds.run_folder import RunFolder, write_config

log = logging.getLogger(__name__)


def import_run(adapter: Path, out: Path, overrides: Sequence[str]) -> None:
    """Makes `out` a run folder with the adapter's prefix; `model.name=` names the base if PEFT does not.

    Raises PrefixError. Every rank calls this.
    """
    configure_logging()
    folder = RunFolder(out)
    if out.exists():
        raise RunError(f"{out}: exists; name a new folder")
    config = _config_of(read_peft(adapter), overrides)
    with joined_world() as world, peers_may_die():
        opened = open_trained(folder, config, world, with_prefix=False)
        on_first(world, lambda: _write(folder, config, adapter, opened))


def _write(folder: RunFolder, config: RunConfig, adapter: Path, opened: Opened) -> None:
    facts = prefix_facts(config.model, opened.lm, Progress())
    with whole_folder(folder.path.absolute()) as path:
        building = RunFolder(path)
        import_peft(adapter, building.prefix, opened.lm.slots, facts)
        write_config(building, config)
    log.info("wrote %s: prefix and run.yaml", folder.path)


def _config_of(prefix: PeftPrefix, overrides: Sequence[str]) -> RunConfig:
    """The revision is that of the base that PEFT names, and of no other."""
    length = prefix.layers[0][0].shape[1]
    own = [f"model.name={prefix.base}", "prefix.init=random", f"prefix.length={length}"]
    if prefix.revision and not any(word.startswith("model.name=") for word in overrides):
        own.append(f"model.revision={prefix.revision}")
    return parse_config("", [*own, *overrides], str(prefix.path))
