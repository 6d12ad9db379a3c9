"""DeepSpeed's configuration: policy from a file, everything else from run.yaml.

A preset of `ds_configs/` (or a user's file) says how ZeRO-3 shards, prefetches and offloads. Precision,
clipping and batch sizes are keys of run.yaml; a file that sets one of them as well is refused, because two
places for one fact drift apart. The result is complete: nothing in it says "auto".

Knows nothing of models; needs neither torch nor DeepSpeed.
"""

import importlib.resources
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefix_ds.config import RunConfig
from prefix_ds.errors import ConfigError

Settings = dict[str, Any]  # leaves the process: DeepSpeed takes nothing else

# What run.yaml decides, and the key that does; the first three follow from others and have no key of their
# own.
_OURS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.micro_batch_tokens",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16": "model.dtype",
    "torch_autocast": "model.dtype",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "train.lr",
    "scheduler": "train.schedule",
}

# What DeepSpeed takes and a run cannot bear, or would not notice.
_METRICS = "metrics are written by the run and sent to MLflow"
_SPREAD = "ranks share the data, and ZeRO-3 the model"
_REFUSED = {
    "autotuning": "it starts runs of its own",
    "data_efficiency": "the run's data keys say what is in a batch",
    "expert_parallel": _SPREAD,
    "gradient_allreduce_op": "gradients are sums over parts of one batch",
    "hybrid_engine": "it replaces the engine",
    "pipeline": _SPREAD,
    "sequence_parallel_size": _SPREAD,
    "tensor_parallel": _SPREAD,
    **dict.fromkeys(("comet", "csv_monitor", "tensorboard", "wandb"), _METRICS),
}

_UNVERIFIED = (
    # they want DeepSpeed's own Adam; of a prefix there is nothing to offload
    "offload_optimizer",
    "zenflow",
    # it joins shards of one type, and a base in 8 bits has two
    "stage3_use_all_reduce_for_fetch_params",
    # ZeRO++: reported to freeze the loss, or to need kernels of CUDA that are not tested here
    "zero_hpz_partition_size",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
)


def deepspeed_settings(config: RunConfig, world_size: int) -> Settings:
    """The resolved DeepSpeed configuration of a run. Raises ConfigError."""
    name = config.engine.deepspeed
    settings = _read(name)
    for mistake in _mistakes(settings):
        raise ConfigError(f"engine.deepspeed: {name}: {mistake}")
    _refuse_auto(settings, name)
    _place_on_disk(settings, config)
    if config.train.method != "prefix":  # or a sum over micro-batches would be rounded to bfloat16 at each
        settings = {"data_types": {"grad_accum_dtype": "fp32"}} | settings
    return settings | {
        "train_batch_size": world_size,  # micro-batches vary in number: the engine counts them, not DeepSpeed
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "gradient_clipping": config.train.clip_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def _mistakes(settings: Settings) -> Iterator[str]:
    for key in settings:
        if key in _OURS:
            yield f"{key} is given twice: remove it, {_OURS[key]} of run.yaml says it"
        if key in _REFUSED:
            yield f"{key} has no place here: {_REFUSED[key]}"
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage != 3:
        yield f"zero_optimization.stage: {stage}: expected 3"
    for key in zero if isinstance(zero, dict) else ():
        if key in _UNVERIFIED:
            yield f"zero_optimization.{key}: not verified, leave it out"


def _place_on_disk(settings: Settings, config: RunConfig) -> None:
    """Tells an offload to NVMe its folder, which differs from machine to machine."""
    name, folder = config.engine.deepspeed, config.engine.nvme_folder
    offload = settings["zero_optimization"].get("offload_param")
    if not isinstance(offload, dict) or offload.get("device") != "nvme":
        if folder:
            raise ConfigError(
                f"engine.nvme_folder: {folder}: {name} keeps nothing on a disk; zero3_nvme does"
            )
        return
    if "nvme_path" in offload:
        raise ConfigError(
            f"engine.deepspeed: {name}: nvme_path is given twice: remove it, engine.nvme_folder says it"
        )
    if not folder:
        raise ConfigError(f"engine.nvme_folder: missing; {name} keeps the base on a disk of each host")
    if config.train.method != "prefix":
        raise ConfigError(f"train.method: {config.train.method}: {name} is for a base that stays as it is")
    if config.model.bits == 8:
        raise ConfigError(
            f"model.bits: 8: {name} keeps the base on a disk, through buffers of DeepSpeed that hold numbers "
            "of model.dtype; use 16 bits, or zero3_offload"
        )
    offload["nvme_path"] = folder


def preset_names() -> list[str]:
    """The names `engine.deepspeed` can have."""
    files = importlib.resources.files("ds_configs").iterdir()
    return sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json"))


def _read(name: str) -> Settings:
    is_preset = name in preset_names()
    if not is_preset and not Path(name).is_file():
        presets = ", ".join(preset_names())
        raise ConfigError(f"engine.deepspeed: {name!r} is neither a file nor a preset ({presets})")
    file = importlib.resources.files("ds_configs").joinpath(f"{name}.json") if is_preset else Path(name)
    try:
        settings = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError) as error:  # no permission, no text, no JSON, a key twice
        raise ConfigError(f"engine.deepspeed: {name}: cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"engine.deepspeed: {name}: expected an object, found {type(settings).__name__}")
    return settings


def _once(pairs: list[tuple[str, Any]]) -> Settings:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice")
    return dict(pairs)


def _refuse_auto(node: Any, name: str, path: str = "") -> None:
    if node == "auto":
        raise ConfigError(
            f'engine.deepspeed: {name}: {path}: "auto" stands for no value here; write one or leave it out'
        )
    for key, value in node.items() if isinstance(node, dict) else ():
        _refuse_auto(value, name, f"{path}.{key}" if path else key)
