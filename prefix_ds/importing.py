"""`prefix-ds import`: a PEFT prefix becomes a run folder, to generate with or to export again.

PEFT's files name no layers, so the base is loaded to see where a prefix enters it.
"""

from collections.abc import Sequence
from pathlib import Path

from prefix_ds import __version__
from prefix_ds.checkpoint import PrefixFacts
from prefix_ds.config import RunConfig, config_text, parse_config
from prefix_ds.dist import joined_world
from prefix_ds.errors import RunError
from prefix_ds.export import PeftPrefix, import_peft, read_peft
from prefix_ds.files import telling_disk_errors, write_text_atomically
from prefix_ds.logs import configure_logging
from prefix_ds.opening import open_trained
from prefix_ds.result import config_digest, num_layers
from prefix_ds.run_folder import RunFolder


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
        facts = PrefixFacts(
            base=str(config.model.name),
            revision=config.model.revision,
            model_type=opened.lm.family,
            base_config_sha256=config_digest(opened.sharded.module.config),
            base_num_layers=num_layers(opened.sharded.module.config, opened.lm),
            step=0,
            valid_loss=None,
            version=__version__,
        )
        import_peft(adapter, folder.prefix, opened.lm.slots, facts)
        with telling_disk_errors(out):
            write_text_atomically(folder.config_file, config_text(config))


def _config_of(prefix: PeftPrefix, overrides: Sequence[str]) -> RunConfig:
    length = prefix.layers[0][0].shape[1]
    own = [f"model.name={prefix.base}", "prefix.init=random", f"prefix.length={length}"]
    return parse_config("", [*own, *overrides], str(prefix.path))
