"""What a base without numbers tells: whether its layers ever call the attention we put a prefix in.

The base is built on torch's meta device, where a forward pass has shapes and no values, so this costs neither
the weights nor the time to load them: under a second for 70 billion parameters. What the code of some bases
does depends on values (which expert a token goes to); there the pass breaks off, nothing is learnt, and the
trial of the loaded base decides. Rejected: a list of families, which knows no remote code.

Knows nothing of where weights come from.
"""

import copy
from typing import Any

import torch

from prefix_ds.model.attention import Joint
from prefix_ds.model.base import AttentionChoice, no_attention_to_join, switch_attention
from prefix_ds.model.trial import Trial


def check_skeleton(config: Any, attention: AttentionChoice, *, trust_remote_code: bool = False) -> None:
    """Raises ModelError if a base of this transformers configuration, loaded, could not take a prefix."""
    try:
        base = skeleton(config, trust_remote_code)
    except Exception:  # loading it says why
        return
    switch_attention(base, attention)
    trial = Trial(torch.device("meta"))
    Joint(base).source = trial
    try:
        base(input_ids=trial.ids_BT, use_cache=False)
    except Exception:  # without values it goes no further
        return
    if not trial.slots:
        raise no_attention_to_join(base)


def skeleton(config: Any, trust_remote_code: bool, dtype: torch.dtype | None = None) -> Any:
    """A base on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code, dtype=dtype
        )
    return base.eval()
