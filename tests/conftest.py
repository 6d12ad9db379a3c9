"""No test reads the network, nor what other programs keep in the cache of `datasets`."""

import atexit
import os
import shutil
import subprocess
import tempfile
from collections import Counter

import pytest

_CACHE = tempfile.mkdtemp(prefix="prefix-ds-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ |= {"HF_DATASETS_CACHE": _CACHE, "HF_HUB_OFFLINE": "1"}  # before a library reads them


# Of few tests that take long: none of these files may be what one worker is left with at the end.
FIRST = ["hosts", "residency", "kubelet", "mlflow", "demo", "kill", "served"]


def pytest_collection_modifyitems(items):
    """Long files first, then those with most tests, as xdist has them."""
    counts = Counter(item.path for item in items)
    first = {f"test_{name}": number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: (first.get(item.path.stem, len(FIRST)), -counts[item.path], item.path))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a sound run.yaml, its base and its data."""
    from prefix_ds.config import config_text
    from tests.workshop import run_config  # loads torch, which most of what is collected does not need

    folder = tmp_path_factory.mktemp("place")
    (folder / "run.yaml").write_text(config_text(run_config(folder, "train.max_steps=1")))
    return folder


@pytest.fixture
def disk(tmp_path):
    """Mounts a small disk of its own at a folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mounted(*options):
        words = ["mount", "-t", "tmpfs", "-o", ",".join(["size=1m", *options]), "tmpfs", folder]
        if os.getuid() or subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("a disk of its own needs the right to mount one")
        return folder

    yield mounted
    subprocess.run(["umount", folder], capture_output=True, check=False)
