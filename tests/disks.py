"""Disks that become full at a moment of one's choice."""

import importlib


def fill_disk(folder):
    """Leaves no space on a disk."""
    with (folder / "full").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def fill_before(call, module, function, folder, _rank):
    """The disk is full from the n-th call of a function on."""
    calls = iter(range(1, 1000))
    home = importlib.import_module(module)
    real = getattr(home, function)

    def filling(*words, **options):
        if next(calls) == call:
            fill_disk(folder)
        return real(*words, **options)

    setattr(home, function, filling)
