"""Settings and fixtures of all tests.

One thread per process: tests run side by side, and tiny models gain nothing from more. No GPU:
tests compare bits, and several processes would share one device.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for every process started
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest

for name in list(os.environ):
    # Most users do not set the first. The others would make every test one of several processes.
    if name in ("PYTHONUNBUFFERED", "RANK", "WORLD_SIZE") or name.startswith("SLURM_"):
        del os.environ[name]


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A new empty folder that is the current one, so that relative paths are written there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
