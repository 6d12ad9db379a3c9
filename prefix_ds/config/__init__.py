"""Every knob of a run: the page of keys, and how a file becomes one."""

from prefix_ds.config.keys import (
    DataKeys,
    EngineKeys,
    EvaluateKeys,
    GenerateKeys,
    MlflowKeys,
    ModelKeys,
    PrefixKeys,
    RunConfig,
    RunKeys,
    TrainKeys,
)
from prefix_ds.config.reading import config_text, differing_keys, fixed_keys, parse_config, read_config

__all__ = [
    "DataKeys",
    "EngineKeys",
    "EvaluateKeys",
    "GenerateKeys",
    "MlflowKeys",
    "ModelKeys",
    "PrefixKeys",
    "RunConfig",
    "RunKeys",
    "TrainKeys",
    "config_text",
    "differing_keys",
    "fixed_keys",
    "parse_config",
    "read_config",
]
