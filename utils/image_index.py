"""From lists of files to ImageSets: which files are images, what they hold, what is left out.

The head of every file is looked at once. An index beside the logs keeps the answers, and the pixels
of small images, so that the next start on a large data set takes a second. n images, C channels,
h w size in pixels.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from models.errors import RunError, UserError
from utils.files import atomic_write
from utils.image_set import ImageSet
from utils.images import (
    Decoding,
    Head,
    Item,
    decode,
    depth_note,
    formats,
    has_transparent_pixels,
    image_suffixes,
    missing_plugin,
    read_head,
    read_image,
    sample,
    sampled_bit_depth,
)
from utils.resize import SMALL_SIDE
from utils.sources import ending, visible_files

FOLDER = Path("logs", ".index")
INDEXED_FILES = 1000  # a smaller data set is looked at again in no time
MEMORY_LIMIT = 2**31  # bytes of decoded images that may be held in memory


class Index:
    """The heads of image files; `left_out` counts the files that are no images."""

    def __init__(self, data_dir: Path, progress: bool = False):
        self.progress = progress
        self.left_out = Counter()  # of (reason, ending)
        self.file = FOLDER / f"{_digest(os.path.abspath(data_dir), Head._fields, formats())}.json"
        # Path -> "SIZE MTIME CTIME", then the numbers of its Head or why it is no image. Text,
        # because 100,000 short lists take seconds to read.
        self.known, self.seen = {}, {}
        with suppress(OSError, ValueError, TypeError, RecursionError):
            self.known = dict(json.loads(self.file.read_bytes()))

    def heads(self, paths: Sequence[Path], title: str) -> list[Head | UserError | None]:
        """The head of each image, the error of a damaged one, or None for another file."""
        keys = list(map(os.fspath, paths))
        stamps = list(map(_stamp, keys))
        known = zip((self.known.get(key, "") for key in keys), stamps, strict=True)
        found = [entry[len(stamp) :] if entry.startswith(stamp) else "" for entry, stamp in known]
        new = [i for i, what in enumerate(found) if not what]
        for i, what in zip(new, self.map(_look, [paths[i] for i in new], title), strict=True):
            found[i] = what
        for i, what in enumerate(found):
            if isinstance(what, str):  # an error is not kept: the file may be repaired
                self.seen[keys[i]] = stamps[i] + what
                found[i] = _to_head(what)
            if found[i] is None:
                self.left_out[what, ending(paths[i])] += 1
        return found

    def map(self, work: Callable, items: Sequence, title: str) -> list:
        """[work(item) for item in items] in threads: files may lie on a slow disk."""
        with ThreadPoolExecutor() as pool:
            return list(self.bar(pool.map(work, items), title, len(items)))

    def bar(self, iterable: Iterable, title: str, total: int) -> tqdm:
        hidden = not self.progress or None  # None: hidden if stderr is no terminal
        return tqdm(iterable, desc=title, total=total, unit="file", disable=hidden)

    def array(self, paths: Sequence, how: object, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What `make` returns for `paths`, decoded as `how` says. It is kept for the next start."""
        keys = list(map(os.fspath, paths))
        name = f"{self.file.stem}-{_digest(keys[0], how)}"
        file = self.file.with_name(f"{name}-{_digest(*keys, *map(self.seen.get, keys))}.npy")
        with suppress(OSError, ValueError, EOFError):
            return np.load(file, allow_pickle=False)
        array = make()
        if len(array) >= INDEXED_FILES:
            with suppress(OSError, RunError):  # a folder that refuses it is no error
                FOLDER.mkdir(parents=True, exist_ok=True)
                for old in FOLDER.glob(f"{name}-*.npy"):
                    old.unlink()
                with atomic_write(file) as temporary:
                    np.save(temporary, array)
        return array

    def report(self) -> str | None:
        """The counts of `left_out` in words; None if there are none."""
        reasons = []
        for reason in dict.fromkeys(why for why, _ in self.left_out):
            endings = {end: n for (why, end), n in self.left_out.items() if why == reason}
            listed = ", ".join(f"{n} {end}" for end, n in sorted(endings.items()))
            reasons.append(f"{sum(endings.values())} {reason} ({listed})")
        return f"files are left out: {'; '.join(reasons)}" if reasons else None

    def save(self) -> None:
        """Keep the index of a large data set for the next start."""
        content = self.known | self.seen
        if len(self.seen) >= INDEXED_FILES and content != self.known:
            with suppress(OSError, RunError):
                FOLDER.mkdir(parents=True, exist_ok=True)
                with atomic_write(self.file) as temporary:
                    temporary.write_text(json.dumps(content))


class ImageReader:
    """Makes the ImageSets of a data set; the first of them gives the bit depth of all."""

    def __init__(
        self, data_dir: Path, decoding: Decoding, skip_unreadable, log, progress, left_out=()
    ):
        self.decoding, self.skip_unreadable, self.log = decoding, skip_unreadable, log
        self.index, self.first = Index(data_dir, progress), True
        self.index.left_out.update(left_out)

    def read(
        self, where: str, paths: Sequence[Path | Item], labels: Sequence[int], listed: bool
    ) -> ImageSet:
        """The images among `paths`, in memory if they are small; all must be, if they are `listed`.

        Raises UserError.
        """
        named = isinstance(paths[0], Path)
        heads = self.index.heads(paths, f"check {where}") if named else self._sampled_heads(paths)
        if listed and None in heads:
            reason = next(iter(self.index.left_out))[0]
            raise UserError(f"{paths[heads.index(None)]} is in the table, but such files {reason}")
        rows = [row for row in zip(paths, labels, heads, strict=True) if row[2] is not None]
        if not rows:
            raise UserError(f"{where} holds no images")
        paths, labels, heads = zip(*rows, strict=True)
        self._inspect([row for row in rows if isinstance(row[2], Head)])
        images = ImageSet(torch.tensor(labels), None, paths, self.decoding)
        if self.skip_unreadable:
            images = self._mark_unreadable(images, where)
        elif errors := [head for head in heads if isinstance(head, UserError)]:
            raise errors[0]
        # EXIF may swap the sides of any.
        sizes = {tuple(sorted(head[:2])) for head in set(heads) if isinstance(head, Head)}
        side = max(max(size) for size in sizes)
        memory = len(images) * side**2 * self.decoding.channels
        if len(sizes) == 1 and side <= SMALL_SIDE and memory < MEMORY_LIMIT:
            decode = partial(self._decode_all, images, f"decode {where}")
            kept = named and images.unreadable is None
            pixels = self.index.array(paths, self.decoding, decode) if kept else decode()
            if len(pixels):
                return replace(images, pixels=torch.from_numpy(pixels))
        return images

    def _sampled_heads(self, items: Sequence[Item]) -> list[Head]:
        """The heads of a sample; the others are taken to be like the first. Raises UserError."""
        heads, error = {}, None
        for i in sample(range(len(items))):  # which is decoded, and takes a while
            try:
                heads[i] = read_head(items[i])
            except UserError as caught:
                error = caught
        if not heads:
            raise error
        first = next(iter(heads.values()))
        return [heads.get(i, first) for i in range(len(items))]

    def _inspect(self, rows: Sequence[tuple[Path | Item, int, Head]]) -> None:
        """Find the bit depth of the data set, and say what is odd about its pixels."""
        how, wide = self.decoding, [path for path, _, head in rows if head.wide]
        if how.bit_depth is None:
            self.decoding = replace(how, bit_depth=sampled_bit_depth(wide, how))
        elif line := depth_note(wide, how):
            self.log(f"note: {line}")
        candidates = sample([path for path, _, head in rows if head.transparent])
        how = how if self.first and how.channels != 4 and how.background else None
        if how and any(has_transparent_pixels(path, how) for path in candidates):
            colour = "white" if how.background == (255,) * 3 else str(how.background)
            self.log(f"note: images have transparent pixels, and {colour} is put behind them")
        self.first = False

    def _mark_unreadable(self, images: ImageSet, where: object) -> ImageSet:
        """The images, with those marked that cannot be decoded; their errors are logged."""

        def error_of(path: Path | Item) -> UserError | None:
            try:
                read_image(path, images.decoding)
            except UserError as error:
                return error

        errors = self.index.map(error_of, images.paths, f"decode {where}")
        for error in filter(None, errors):
            self.log(f"left out: {error}")
        if all(errors):
            raise UserError(f"{where} has no readable image")
        return images.without([i for i, error in enumerate(errors) if error])

    def _decode_all(self, images: ImageSet, title: str) -> np.ndarray:
        """Pixels (n, C, h, w), 0 of unreadable images; an empty array if the sizes differ."""
        bad = images.unreadable
        good = range(len(images)) if bad is None else (~bad).nonzero().flatten().tolist()
        shape = decode(images.paths[good[0]], images.decoding).pixels.transpose(2, 0, 1).shape
        pixels = np.zeros((len(images), *shape), np.uint8)

        def fill(i: int) -> bool:
            decoded = decode(images.paths[i], images.decoding).pixels.transpose(2, 0, 1)
            if same := decoded.shape == shape:
                pixels[i] = decoded
            return same

        # Without threads: tiny images are decoded faster than threads take turns.
        filled = map(fill, self.index.bar(good, title, len(good)))
        return pixels if all(filled) else np.empty(0)

    def finish(self) -> None:
        """Say what was left out, in one line, and keep the index."""
        if line := self.index.report():
            self.log(f"note: {line}")
        self.index.save()


def image_files(folder: str | Path) -> Iterator[Path]:
    """The images below `folder`, sorted: each file is looked at when its turn comes.

    Damaged ones are among them, and other files are passed over. Raises UserError for no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    looked = ((path, _look(path)) for path in visible_files(folder))
    return (path for path, what in looked if isinstance(what, UserError) or _to_head(what))


def _stamp(file: str) -> str:
    """Size and times of the last changes; no numbers if there is no such file."""
    with suppress(OSError):
        status = os.stat(file)  # a rename changes ctime
        return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} "
    return "missing "


def _look(path: Path) -> str | UserError:
    """The head of an image as text, why it is no image, or the error of a damaged one."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        return "are no images"
    try:
        return " ".join(str(int(value)) for value in read_head(path))
    except UserError as error:
        if plugin := path.exists() and missing_plugin(path):
            return f"need {plugin}"
        known = path.suffix.lower() in image_suffixes() or not path.exists()
        return error if known else "are no images"


@cache
def _to_head(text: str) -> Head | None:
    return Head(*map(int, text.split())) if text[0].isdigit() else None


def _digest(*parts: object) -> str:
    content = "\0".join(map(str, parts)).encode(errors="surrogateescape")
    return hashlib.blake2b(content, digest_size=8).hexdigest()
