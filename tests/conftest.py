"""No test reads the network, nor what other programs keep in the cache of `datasets`."""

import atexit
import os
import shutil
import tempfile

_CACHE = tempfile.mkdtemp(prefix="prefix-ds-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ |= {"HF_DATASETS_CACHE": _CACHE, "HF_HUB_OFFLINE": "1"}  # before a library reads them
