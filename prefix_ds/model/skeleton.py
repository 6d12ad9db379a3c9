"""A base that has shapes and no numbers, on torch's meta device.

Knows nothing of where weights come from.
"""

import copy
from typing import Any

import torch


def skeleton(config: Any, trust_remote_code: bool, dtype: torch.dtype | None = None) -> Any:
    """The base of a transformers configuration."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code, dtype=dtype
        )
    return base.eval()
