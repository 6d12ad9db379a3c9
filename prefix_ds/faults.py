"""What it means when a device gives up: memory that is out, or a fault of its own.

Torch says both as plain errors, with a page of advice of its own. Memory is the user's to mend; after a fault
the same may succeed on another machine. Knows nothing of ranks.
"""

import contextlib
from collections.abc import Iterator

from prefix_ds.errors import DeviceLost, ModelError

_NO_MEMORY = (
    "out of memory",  # CUDA's allocator
    "can't allocate memory",  # the CPU's
    "CUBLAS_STATUS_ALLOC_FAILED",  # cuBLAS takes memory of its own, at the first product
)
_ADVICE = (
    "lower train.micro_batch_tokens (for texts generate.batch_size), set model.recompute=auto or"
    " model.bits=8, or take more devices; `prefix-ds plan` tells what fits"
)
# Of CUDA's runtime: devices unavailable, ECC, NVLink, hardware stack, launch failure, contained fault, not
# ready, unknown. All others say what the program did.
_FAULTS = frozenset({46, 214, 220, 714, 719, 721, 802, 999})


@contextlib.contextmanager
def device_may_fail(place: str) -> Iterator[None]:
    """Raises ModelError where memory is out, DeviceLost where the device at `place` broke."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = (str(error).splitlines() or [""])[0]
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY):
            mistake = ModelError(f"{place}: {said or 'out of memory'}; {_ADVICE}")
            mistake.teller = "rank"
            raise mistake from error
        if getattr(error, "error_code", None) in _FAULTS:
            raise DeviceLost(f"{place}: the device failed: {said}") from error
        raise
