"""Every test runs offline, and on few threads: two cores are shared by the suite's processes."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# Few tests that take long each: first, so that no core waits for another at the end.
LONG = ("recipe", "gan", "processes", "resume", "critic", "commands", "hub", "accelerate", "exactness")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not any(name in item.path.stem for name in LONG))
