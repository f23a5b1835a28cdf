"""Which device is taken, and how many workers the shared memory of the machine has room for."""

from types import SimpleNamespace

import pytest
import torch

from models.errors import UserError
from utils import hardware

SEVERAL = " for several processes"
MACHINES = [(1, 1, 0, "cuda", {}), (1, 1, 1, "cuda", {"mps": SEVERAL})]
MACHINES += [(0, 1, 0, "cpu", {"cuda": ""}), (0, 1, 1, "cpu", {"cuda": SEVERAL, "mps": SEVERAL})]
MACHINES += [(0, 0, 0, "cpu", {"cuda": "", "mps": ""})]


@pytest.mark.parametrize("cuda, mps, several, best, missing", MACHINES)
def test_the_device(cuda, mps, several, best, missing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert hardware.choose_device("auto", bool(several)) == torch.device(best)
    for name in {"cpu", "cuda", "mps"} - {*missing}:
        assert hardware.choose_device(name, bool(several)) == torch.device(name)
    for name, why in missing.items():
        with pytest.raises(UserError, match=f"no device {name} here{why}: take auto or cpu"):
            hardware.choose_device(name, bool(several))


@pytest.mark.parametrize(
    "free, ranks, workers",
    [(64, 1, 2), (128, 2, 2), (64, 8, 0), (9, 1, 0), (1000, 1, 4)],
)
def test_workers_that_fit_into_the_shared_memory(free, ranks, workers, monkeypatch, capsys):
    """Batches of 9 MiB: two ahead for each worker, and as many for the main process."""
    if not hardware.Path("/dev/shm").is_dir():
        pytest.skip("this system has no /dev/shm")
    usage = SimpleNamespace(free=free * 2**20)
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    hardware.fitting_workers.cache_clear()
    for _ in range(2):
        assert hardware.fitting_workers(4, 9 * 2**20) == workers
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (workers < 4)  # once, and not for every batch
    if lines:
        assert f"{workers} of 4 workers" in lines[0] and "--shm-size" in lines[0]
    monkeypatch.setenv("RANK", "1")
    hardware.fitting_workers.cache_clear()
    assert hardware.fitting_workers(4, 9 * 2**20) == workers and not capsys.readouterr().err
    hardware.fitting_workers.cache_clear()
