"""How many workers the shared memory of the machine has room for."""

from types import SimpleNamespace

import pytest

from utils import hardware


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
