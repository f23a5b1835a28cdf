"""The data sets: CIFAR, handwritten digits, and the user's own folders of images.

Small images are decoded once and held as uint8; others stay files, which the stream's workers
read. C channels, h w pixels.
"""

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from tqdm import tqdm

from utils.cifar import archive_of, read_cifar
from utils.seeds import named_seed
from utils.shell import printable
from utils.stream import (
    PIL_MODES,
    SMALL_SIDE,
    DataError,
    ImageSet,
    image_files,
    one_line,
    read_image,
    to_tensor,
)

SMALL_TOTAL = 2**31  # bytes of them at most


@dataclass(frozen=True)
class Data:
    """What a run needs. `held_out` selects the best weights; `test`, if any, is looked at last."""

    train: ImageSet
    held_out: ImageSet
    test: ImageSet | None
    classes: tuple[str, ...]
    source: str
    held_out_name: str = "test"  # what its accuracy is called: "val" or "test"

    def final(self) -> tuple[ImageSet, str]:
        """The images that the result is stated for, and what they are called."""
        return (self.held_out, self.held_out_name) if self.test is None else (self.test, "test")

    @property
    def counts(self) -> str:
        return (f"{len(self.train)} to train on, {len(self.held_out)} {self.held_out_name}, "
                f"{len(self.classes)} classes")  # fmt: skip

    @property
    def facts(self) -> str:
        """What a resumed run must find again: counts, and checksums of images and classes."""
        classes = zlib.crc32("\0".join(self.classes).encode())
        return (f"{self.counts}, checksums {self.train.checksum} {self.held_out.checksum} "
                f"{classes:08x}")  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """How images are read: channels, whether broken files are left out and missing data is fetched,
    bars and lines."""

    channels: int
    skip_unreadable: bool
    offline: bool
    progress: bool
    say: Callable[[str], None]


# ------------------------------------------------------------------------------- the data sets


def load_data(
    name: str,
    data_dir: str | Path,
    *,
    val_fraction: float,
    seed: int,
    channels: int = 3,
    skip_unreadable: bool = False,
    offline: bool = False,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> Data:
    """The data set `name` of DATASETS, its images with `channels` channels (1, 3 or 4).

    With `val_fraction`, that part of every class of the training images is held out by `seed`,
    and the test images are kept for the end. Raises DataError with one sentence.
    """
    how = Reading(channels, skip_unreadable, offline, progress, say)
    data = DATASETS[name](Path(data_dir), how)
    if val_fraction:
        train, val = split(data.train.labels, val_fraction, seed)
        test = data.test if data.test is not None else data.held_out
        test = None if test is None or not len(test) else test
        if data.test is not None:
            say(f"note: --val_fraction takes the place of {data_dir}/val, which is not used")
        held_out = data.train.subset(val)
        data = replace(data, train=data.train.subset(train), held_out=held_out, test=test,
                       held_out_name="val")  # fmt: skip
    if not len(data.held_out):
        raise _nothing_held_out(data_dir)
    return data


def _nothing_held_out(data_dir: str | Path) -> DataError:
    return DataError(f"{data_dir} has neither val/ nor test/: hold out a part of the training "
                     "images with --val_fraction 0.1, say")  # fmt: skip


def check_source(
    name: str, data_dir: Path, val_fraction: float = 0.0, training: bool = True
) -> None:
    """Raise DataError for what can be seen to be wrong without reading or fetching anything."""
    if name in ("cifar10", "cifar100"):
        archive_of(name, data_dir)
    if name != "folder":
        return
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder")
    if training or val_fraction:
        classes = _training_folder(data_dir)[1]
        parts = [data_dir / part for part in ("val", "test") if (data_dir / part).is_dir()]
        for part in parts:
            _check_classes(part, classes)
        if not val_fraction and not parts:
            raise _nothing_held_out(data_dir)


def _check_classes(root: Path, classes: tuple[str, ...]) -> None:
    if odd := set(class_folders(root)) - set(classes):
        raise DataError(f"{root / min(odd)} is a class that the training images lack")


def load_evaluation(
    name: str, data_dir: str | Path, classes: tuple[str, ...], *, by_name: bool, **options
) -> tuple[ImageSet, str, str, tuple[str, ...]]:
    """(images, what they are called, source, class names) to evaluate a trained model of `classes`
    on.

    The test images, or where there are none the validation images. Of folders only those are read:
    `test/`, `val/` or the folder itself may hold the class folders, and need not have all classes.
    They are the model's by their names, or with `by_name` false also by their sorted order, and
    always so where the model's names are numbers, which stand for none.
    `options` are load_data's. Raises DataError with one sentence.
    """
    if name == "folder" and not options["val_fraction"]:
        root = Path(data_dir)
        for part in ("val", "test"):
            # ImageNet's own test/ has no labels, hence no class folders.
            if class_folders(Path(data_dir) / part):
                root = Path(data_dir) / part
        if not root.is_dir():
            raise DataError(f"{root}: no such folder")
        if root == Path(data_dir) and (root / "train").is_dir() and "train" not in classes:
            raise DataError(f"{root} has train/, but neither val/ nor test/ to evaluate on: give "
                            "the --val_fraction and --seed of the training, or --data_dir the "
                            "folder that holds the class folders")  # fmt: skip
        found = class_folders(root)
        if not found:
            raise DataError(f"{root} holds no class folders")
        how = Reading(**{key: options[key] for key in Reading.__dataclass_fields__})
        images = _read_class_folders(root, found, how)
        called, source = root.name if root.name in ("val", "test") else "test", str(root)
    else:
        data = load_data(name, data_dir, **options)
        images, called = data.final()
        found, source = data.classes, data.source
    place = {each: i for i, each in enumerate(classes)}
    nameless = not by_name and classes == tuple(str(i) for i in range(len(classes)))
    if nameless and len(found) != len(classes):
        raise DataError(f"{source} has {len(found)} classes, the model {len(classes)}, which the "
                        "file gives no names: they cannot be told apart")  # fmt: skip
    if not nameless and all(each in place for each in found):
        order = torch.tensor([place[each] for each in found])
    elif len(found) == len(classes) and not by_name:
        order = torch.arange(len(found))
        options.get("say", print)(
            "note: the model's classes are taken to be the data's in sorted order"
        )
        classes = found if nameless else classes
    else:
        odd = next(each for each in found if each not in place)
        raise DataError(f"{source} has the class {odd!r}, which the model's {len(classes)} classes "
                        f"({', '.join(classes[:3])}, ...) lack")  # fmt: skip
    return replace(images, labels=order[images.labels]), called, source, classes


def split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(training, validation) indices, both sorted: `fraction` of each class, at least one image.

    Raises DataError where a class would be left without training images.
    """
    generator = torch.Generator().manual_seed(named_seed(seed, "split"))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = max(1, round(len(members) * fraction))
        if count >= len(members):
            raise DataError(
                f"--val_fraction {fraction} leaves class {int(label)}, which has "
                f"{len(members)} images, without training images"
            )
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def _in_memory(pixels: np.ndarray, labels, channels: int) -> ImageSet:
    """Pixels uint8 (n, h, w, 3) or (n, h, w) as an ImageSet with `channels` channels."""
    pixels = torch.from_numpy(np.ascontiguousarray(pixels))
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)  # (n, C, h, w)
    if channels == 1 and pixels.shape[1] == 3:  # Pillow's luma
        r, g, b = pixels.int().unbind(1)
        pixels = ((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16).byte()[:, None]
    elif channels >= 3 and pixels.shape[1] == 1:
        pixels = pixels.expand(-1, 3, -1, -1)
    if channels == 4:
        pixels = torch.cat([pixels, torch.full_like(pixels[:, :1], 255)], dim=1)
    return ImageSet(torch.as_tensor(labels, dtype=torch.int64), pixels.contiguous())


def _digits(data_dir: Path, how: Reading) -> Data:
    from sklearn.datasets import load_digits

    digits = load_digits()
    everything = _in_memory((digits.images * (255 / 16)).round().astype(np.uint8),
                            digits.target, how.channels)  # fmt: skip
    train, test = split(everything.labels, 0.2, seed=0)  # the same test images for every --seed
    classes = tuple(str(name) for name in digits.target_names)
    source = "scikit-learn's handwritten digits"
    return Data(everything.subset(train), everything.subset(test), None, classes, source)


def _cifar(data_dir: Path, how: Reading, *, name: str) -> Data:
    found = read_cifar(name, data_dir, how.say, how.offline)
    train, test = (_in_memory(*part, how.channels) for part in (found.train, found.test))
    return Data(train, test, None, found.classes, found.source)


# --------------------------------------------------------------------------- folders of images


def _folder(data_dir: Path, how: Reading) -> Data:
    """`train/` and `val/` or `test/` (or both) in `data_dir`, a folder of images for each class.

    A folder without `train/` that holds class folders itself is a training set.
    """
    root, classes = _training_folder(data_dir)
    train = _read_class_folders(root, classes, how)
    parts = {part: _read_class_folders(data_dir / part, classes, how)
             for part in ("val", "test") if (data_dir / part).is_dir()}  # fmt: skip
    nothing = ImageSet(torch.zeros(0, dtype=torch.int64), paths=())
    held_out = parts.get("val", parts.get("test", nothing))
    test = parts["test"] if len(parts) == 2 else None
    name = "val" if "val" in parts else "test"
    return Data(train, held_out, test, classes, f"{data_dir}, {len(classes)} classes", name)


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the folders in `root`, sorted, without hidden ones; () where there is no `root`.

    Raises DataError for a name that is no UTF-8.
    """
    names = sorted(d.name for d in root.glob("*") if d.is_dir() and not d.name.startswith("."))
    for name in names:
        if name != printable(name):  # it could be neither drawn nor written
            raise DataError(f"{printable(str(root / name))}: a class needs a name in UTF-8")
    return tuple(names)


def _training_folder(data_dir: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder that holds a folder of training images for each class, and the classes."""
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder")
    root = data_dir / "train"
    if not root.is_dir():
        if (data_dir / "val").is_dir() or (data_dir / "test").is_dir():
            raise DataError(f"{data_dir} has no train/ folder")
        root = data_dir
    classes = class_folders(root)
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise DataError(f"{root} needs a folder for each of two or more classes; it has {found}")
    return root, classes


def _read_class_folders(root: Path, classes: tuple[str, ...], how: Reading) -> ImageSet:
    _check_classes(root, classes)
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = image_files(root / name)
        if not files and (root.name not in ("val", "test")):
            raise DataError(f"{root / name} holds no images")
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise DataError(f"{root} holds no images")
    mode = PIL_MODES[how.channels]
    # A look at the heads finds most broken files in seconds; only a decode finds all of them.
    look = partial(_decoded_size, mode=mode) if how.skip_unreadable else _image_size
    sizes = _in_threads(look, paths, f"look at {root}", how)
    broken = [size for size in sizes if isinstance(size, DataError)]
    if broken and not how.skip_unreadable:
        raise broken[0]
    for error in broken:
        how.say(f"left out: {error}")
    whole = [i for i, size in enumerate(sizes) if not isinstance(size, DataError)]
    if len({labels[i] for i in whole}) < len(set(labels)):
        raise DataError(f"{root} has a class without a single readable image")
    paths, sizes = [paths[i] for i in whole], {sizes[i] for i in whole}
    labels = torch.tensor([labels[i] for i in whole], dtype=torch.int64)

    side = max(max(size) for size in sizes)
    if len(sizes) == 1 and side <= SMALL_SIDE and len(paths) * side**2 * how.channels < SMALL_TOTAL:
        images = _in_threads(partial(_decoded, mode=mode), paths, f"decode {root}", how)
        for error in images:
            if isinstance(error, DataError):
                raise error
        return ImageSet(labels, torch.stack(images), tuple(paths), mode)
    return ImageSet(labels, paths=tuple(paths), mode=mode)


def _in_threads(work: Callable, paths: list[Path], title: str, how: Reading) -> list:
    """[work(path) for path in paths], or a DataError in its place; Pillow lets threads run."""

    def attempt(path: Path):
        try:
            return work(path)
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool:
        done = pool.map(attempt, paths)
        hidden = not how.progress or None
        return list(tqdm(done, desc=title, total=len(paths), unit="file", disable=hidden))


def _decoded(path: Path, mode: str) -> Tensor:
    return to_tensor(read_image(path, mode))


def _decoded_size(path: Path, mode: str) -> tuple[int, int]:
    return read_image(path, mode).size


def _image_size(path: Path) -> tuple[int, int]:
    """(width, height) after the turn that EXIF asks for, from the file's head alone."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return image.size[::-1] if turned else image.size
    except Exception as error:  # decoders raise whatever they like
        raise DataError(f"{path} is not a readable image ({one_line(error)})") from None


DATASETS: dict[str, Callable[..., Data]] = {
    "cifar10": partial(_cifar, name="cifar10"),
    "cifar100": partial(_cifar, name="cifar100"),
    "digits": _digits,
    "folder": _folder,
}
