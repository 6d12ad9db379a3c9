"""`prefix-ds import`: a PEFT prefix becomes a run folder, to generate with or to export again.

PEFT's files name no layers, so the base is loaded to see where a prefix enters it.
"""

from collections.abc import Sequence
from pathlib import Path

from prefix_ds.config import RunConfig, parse_config
from prefix_ds.dist import joined_world
from prefix_ds.errors import RunError
from prefix_ds.export import PeftPrefix, import_peft, read_peft
from prefix_ds.logs import configure_logging
from prefix_ds.opening import open_trained
from prefix_ds.progress import Progress
from prefix_ds.result import prefix_facts
from prefix_ds.run_folder import RunFolder, write_config


def import_run(adapter: Path, out: Path, overrides: Sequence[str]) -> None:
    """Makes `out` a run folder with the adapter's prefix; `model.name=` names the base if PEFT does not.

    Raises PrefixError.
    """
    configure_logging()
    folder = RunFolder(out)
    if out.exists():
        raise RunError(f"{out}: exists; name a new folder")
    prefix = read_peft(adapter)
    config = _config_of(prefix, overrides)
    with joined_world() as world:
        opened = open_trained(folder, config, world, with_prefix=False)
        facts = prefix_facts(config.model, opened.lm, Progress())
        import_peft(adapter, folder.prefix, opened.lm.slots, facts)
        write_config(folder, config)


def _config_of(prefix: PeftPrefix, overrides: Sequence[str]) -> RunConfig:
    length = prefix.layers[0][0].shape[1]
    own = [f"model.name={prefix.base}", "prefix.init=random", f"prefix.length={length}"]
    return parse_config("", [*own, *overrides], str(prefix.path))
