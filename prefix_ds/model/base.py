"""What a base is turned into before it can take a prefix: silent, and calling our attention.

Knows nothing of prefixes.
"""

from typing import Any, Literal

from torch import nn

from prefix_ds.errors import ModelError
from prefix_ds.model.attention import OVER_OWN, OVER_SDPA
from prefix_ds.model.families import check_family

AttentionChoice = Literal["auto", "sdpa", "eager"]


def family_of(base: Any) -> str:
    """The name of the base's family. Raises ModelError for those known not to work."""
    for family in (base.config.model_type, text_config(base).model_type):
        check_family(family)
    return str(base.config.model_type)


def text_config(base: Any) -> Any:
    """The configuration of the part that writes text: of most bases, the only one."""
    return base.config.get_text_config(decoder=True)


def silence(base: nn.Module) -> None:
    """No dropout and no jitter, by value too: layers that are computed again must be in train mode."""
    base.eval()
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def switch_attention(base: Any, choice: AttentionChoice) -> None:
    """The base calls our attention, over torch's or over its own. Raises ModelError for what it cannot do."""
    stock = text_config(base)._attn_implementation
    if choice == "sdpa" and not (base._supports_sdpa or stock in ("sdpa", OVER_SDPA)):
        raise ModelError(
            f"model.attention: sdpa, but the attention of {base.config.model_type} does more than sdpa can "
            "(a soft cap, sinks); use auto or eager"
        )
    over_own = choice == "eager" or (choice == "auto" and stock in ("eager", OVER_OWN))
    ours = OVER_OWN if over_own else OVER_SDPA
    base.set_attn_implementation(ours)
    if text_config(base)._attn_implementation != ours:
        raise no_attention_to_join(base)  # transformers has logged a warning and changed nothing


def no_attention_to_join(base: Any) -> ModelError:
    """The error for a base that our attention functions never hear of."""
    return ModelError(
        f"{base.config.model_type} cannot take a prefix: its layers never call the attention functions that "
        "transformers lets others register (it has attention code of its own, or no attention)"
    )
