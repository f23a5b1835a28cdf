"""Files become batches, in order, by workers that fit the machine; and who waits for them."""

from itertools import chain

import pytest
import torch

from flags import build_parser
from models.errors import UserError
from models.pixels import PLAIN
from tests.helpers import write_image
from utils import hardware, loading
from utils.images import Decoding, decode
from utils.loading import Waiting, decode_images
from utils.resize import resize


@pytest.mark.parametrize("num_workers", [0, 2])
def test_decoded_files_in_order_and_errors_in_their_place(num_workers, tmp_path):
    endings = ("png", "jpg")
    paths = [write_image(tmp_path / f"{i}.{endings[i % 2]}", size=(60 + i, 70)) for i in range(40)]
    paths[7].write_bytes(b"no image")
    found = list(decode_images(paths, (24, 20), batch_size=9, num_workers=num_workers))
    assert [len(batch) for batch in found] == [9, 9, 9, 9, 4]
    for i, (path, pixels) in enumerate(zip(paths, chain(*found), strict=True)):
        if i == 7:
            assert "7.jpg is not a readable image" in str(pixels)
            continue
        original = decode(path, Decoding())
        window = PLAIN.window(*original.sides, (24, 20))
        assert (pixels == resize(original, window, (24, 20), PLAIN).numpy()).all()
    assert list(decode_images([], (24, 20))) == []


@pytest.mark.parametrize("wait, noted", [(1.9, False), (4.0, True)])
def test_a_long_wait_is_noted_once_with_both_rates(wait, noted, monkeypatch):
    """Each step and the waiting for its batch take 10 seconds together."""
    now, lines, counts, waiting = [0.0], [], [], Waiting(torch.device("cpu"))
    monkeypatch.setattr(loading.time, "monotonic", lambda: now[0])

    def batches():
        for i in range(20):
            now[0] += wait if i >= 5 else 8.0  # at first the workers start
            yield i

    for i in waiting.measured(batches()):
        now[0] += 10 - wait
        if i % 5 == 4:
            waiting.report(50.0, 30.0, lines.append)
            counts.append(len(lines))
    assert counts == ([0, 1, 1, 1] if noted else [0, 0, 0, 0])
    rates = "note: training waits for images: 30 images/s are read, the model could take 50; "
    assert all(line.startswith(rates) for line in lines)


@pytest.mark.parametrize(
    "cores, processes, workers", [(1, 1, 1), (2, 1, 2), (64, 1, 16), (64, 8, 8), (4, 8, 1)]
)
def test_workers_share_the_cores(cores, processes, workers, monkeypatch):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert hardware.auto_workers() == workers
    parse = build_parser().parse_args
    assert parse(["--name", "run"]).num_workers == workers
    assert parse(["--name", "run", "--num_workers", "auto"]).num_workers == workers
    assert parse(["--name", "run", "--num_workers", "3"]).num_workers == 3
    with pytest.raises(UserError, match="--num_workers: 'some' is not"):
        parse(["--name", "run", "--num_workers", "some"])


MEMORY = "MemTotal: 9000 kB\nMemAvailable: 4000 kB\n"
GROUP = {"max": "3000000\n", "current": "2500000\n", "stat": "anon 7\ninactive_file 400000\n"}


@pytest.mark.parametrize(
    "memory, group, free",
    [
        (MEMORY, {}, 4096000),  # no container
        (MEMORY, GROUP | {"max": "max\n"}, 4096000),  # one without a limit
        (MEMORY, GROUP, 900000),
        (MEMORY, GROUP | {"max": "9000000\n"}, 4096000),
        (MEMORY, GROUP | {"max": "2000000\n"}, 0),
    ],
)
def test_free_memory_of_the_machine_and_of_the_container(memory, group, free, monkeypatch):
    files = {f"/sys/fs/cgroup/memory.{name}": text for name, text in group.items()}
    files["/proc/meminfo"] = memory

    def read(path):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(hardware.Path, "read_text", read)
    assert hardware.free_memory() == free
