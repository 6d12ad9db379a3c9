"""Which files a checkpoint is made of, and what is in them.

One `model.safetensors`, or an index that names a file for each tensor. A hub id is downloaded by
transformers' own client, into its cache.

Knows nothing of what the tensors are for.
"""

import json
from pathlib import Path

from prefix_ds.config import ModelKeys
from prefix_ds.errors import ModelError
from prefix_ds.loading.tensor_file import StoredTensor, TensorFile

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def stored_tensors(keys: ModelKeys) -> dict[str, StoredTensor]:
    """All tensors of the base's checkpoint, by name. Raises ModelError; OSError from the hub."""
    one = _found(keys, _ONE)
    if one is not None:  # as transformers does: an index may be left of an earlier save
        return dict(TensorFile(one).tensors)
    index = _found(keys, _INDEX)
    if index is not None:
        return _indexed(index, keys)
    raise ModelError(
        f"model.name: {keys.name}: has neither {_ONE} nor {_INDEX} (or the hub cannot be reached)"
    )


def _indexed(index: Path, keys: ModelKeys) -> dict[str, StoredTensor]:
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index}: not an index of tensors: {error!r}") from None
    files = {name: _named(index, str(name), keys) for name in sorted(set(map(str, places.values())))}
    for tensor, name in places.items():
        if tensor not in files[name].tensors:
            raise ModelError(f"{index}: {tensor}: not in {name}, where the index says it is")
    return {tensor: files[name].tensors[tensor] for tensor, name in places.items()}


def _named(index: Path, name: str, keys: ModelKeys) -> TensorFile:
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise ModelError(f"{index}: {name!r}: expected the name of a .safetensors file beside the index")
    path = _found(keys, name, is_wanted=True)
    if path is None:
        raise ModelError(f"{index}: {name}: there is no such file")
    return TensorFile(path)


def _found(keys: ModelKeys, name: str, *, is_wanted: bool = False) -> Path | None:
    """A file of the base, downloaded if it is on the hub; OSError says why one that `is_wanted` is not."""
    if Path(str(keys.name)).is_dir():
        path = Path(str(keys.name)) / name
        return path if path.is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        keys.name, name, revision=keys.revision, _raise_exceptions_for_missing_entries=is_wanted
    )
    return None if found is None else Path(found)
