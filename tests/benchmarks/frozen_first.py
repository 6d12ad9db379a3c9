"""`prefix-ds` with a prefix whose first position stays as it starts: an attention sink that training cannot move.

    python -m tests.benchmarks.frozen_first train run.yaml [KEY=VALUE ...]

For `tests.benchmarks.study`, which asks whether that makes a prefix better. Direct prefixes only.
"""

import torch

from prefix_ds.cli import main
from prefix_ds.prefix import Direct


def table(prefix):
    """As trained, but for the first row, which gets no gradient."""
    return torch.cat([prefix.table_PD[:1].detach(), prefix.table_PD[1:]])


if __name__ == "__main__":
    Direct.table = table
    main()
