"""What stands in front of the text in training and generation, and in writing down a text's keys and values.

Knows nothing of the base.
"""

from collections.abc import Sequence

from torch import Tensor

from prefix_ds.model.attention import Front
from prefix_ds.prefix import KeyValue, Slot, check_table, keys_values_of


class Given:
    """A prefix, the same for all rows."""

    def __init__(self, table_PD: Tensor, slots: Sequence[Slot]) -> None:
        """Raises ValueError where the table does not fit the slots."""
        check_table(table_PD, slots)
        self._fronts = {
            slot.name: Front(key_NPH, value_NPH)
            for slot, (key_NPH, value_NPH) in zip(slots, keys_values_of(table_PD, slots), strict=True)
        }

        self._unseen = set(self._fronts)

    def front(self, slot: str, key_BNTH: Tensor, value_BNTH: Tensor) -> Front | None:
        """The slot's keys and values, if there are any."""
        self._unseen.discard(slot)
        return self._fronts.get(slot)

    def check_seen(self) -> None:
        """Raises RuntimeError where a slot was not asked for: nothing would see the prefix there."""
        if self._unseen:
            raise RuntimeError(
                f"the prefix was not seen at {sorted(self._unseen)[0]}: its attention was exchanged"
            )


class Recorder:
    """Nothing in front; what the first row's text has is kept."""

    def __init__(self) -> None:
        self.seen: dict[str, KeyValue] = {}

    def front(self, slot: str, key_BNTH: Tensor, value_BNTH: Tensor) -> None:
        """Keeps (key_NTH, value_NTH)."""
        self.seen[slot] = key_BNTH[0].clone(), value_BNTH[0].clone()
