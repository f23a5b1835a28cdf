"""Google's published checkpoints: the table zoo.csv, and the download of its files.

    python3 -m models.zoo [WORD ...]    lists the files whose line has every WORD, or describes one

Sources: README.md of google-research/vision_transformer; timm's vision_transformer*.py (AugReg).
"""

import argparse
import csv
import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from models.configs import CONFIGS
from models.download import by_hand, check_address, download
from models.errors import UserError
from models.hub import fetch, is_hub_name

FOLDER = Path("checkpoint")
ZERO_HEAD = "its head is all zeros: for fine-tuning only"  # a note of the table
SOURCES = {"Google": "Google's README", "timm": "timm's results-imagenet.csv, with its own crop"}


@dataclass(frozen=True)
class File:
    """One published `.npz`. `resolution` is the side of the training images in pixels.

    `accuracy` is top-1 on ImageNet's validation images in percent, with the file's own head, as
    published by `source`, a key of SOURCES; None and "" if unknown.
    """

    bucket: str
    name: str
    variant: str
    classes: int
    resolution: int
    parameters: int
    pre_logits: bool
    classifier: str
    accuracy: float | None
    source: str
    note: str

    @property
    def key(self) -> str:
        return f"{self.bucket}/{self.name}"

    @property
    def url(self) -> str:
        return f"{base_url()}/{quote(self.key)}"


def base_url() -> str:
    """The bucket's address. $VIT_MODELS_URL names a mirror, which may be http on this machine."""
    url = os.environ.get("VIT_MODELS_URL") or "https://storage.googleapis.com/vit_models"
    return url.rstrip("/")


def _read_table() -> Iterator[File]:
    with Path(__file__).with_name("zoo.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            row |= {key: int(row[key]) for key in ("classes", "resolution", "parameters")}
            row["pre_logits"] = row["pre_logits"] == "yes"
            row["accuracy"] = float(row["accuracy"]) if row["accuracy"] else None
            yield File(**row)


FILES = tuple(_read_table())
BUCKETS = tuple(dict.fromkeys(file.bucket for file in FILES))


def find(name: str) -> File | None:
    """The first row with this NAME or BUCKET/NAME, with or without `.npz`."""
    bucket, _, name = name.removesuffix(".npz").rpartition("/")
    name = re.sub(r"^(R\d*)-ViT", r"\1+ViT", name) + ".npz"  # the earlier port's R50-ViT-B_16
    return next((f for f in FILES if f.name == name and bucket in ("", f.bucket)), None)


def resolve_checkpoint(given: str, variant=None, *, head=False, offline=False) -> Path:
    """The local file or folder that `given` means; downloaded if it is not there, unless `offline`.

    `given` is a path, an https:// address (or gs://vit_models/...), BUCKET/NAME, or a name of
    `models.hub`, whose files stay in the hub's cache. A missing path that ends in a name of the
    table is downloaded to exactly there: from the bucket that its folder is called, else from the
    first one that has it. A row that does not fit `variant`, or whose head is not trained if `head`
    is needed, is refused before the download. Raises UserError.
    """
    if is_hub_name(given):
        return fetch(given, offline)
    url, path, file = _address(given)
    if _is_here(path):
        return path
    if url is None:
        what = "a folder without weights or config.json" if path.is_dir() else "no such file"
        raise UserError(f"{given}: {what}. {_nearest(path.name)}")
    if file and variant and CONFIGS[file.variant] != CONFIGS[variant]:
        raise UserError(f"{given} fits {file.variant}, not {variant}. {_nearest(variant)}")
    if file and head and file.note == ZERO_HEAD:
        raise UserError(f"{given}: {file.note}; imagenet21k+imagenet2012/ has trained heads")
    if offline:
        raise UserError(f"{path} is missing and downloads are off; by hand: {by_hand(url, path)}")
    download(url, path)
    return path


def expected_variant(given: str) -> str | None:
    """The variant of the file that resolve_checkpoint would download; None if unknown."""
    return file.variant if (file := _address(given)[2]) else None


def _address(given: str) -> tuple[str | None, Path, File | None]:
    """(address, path, row of the table); no address for a file that is here or is unknown."""
    if _is_here(Path(given)):
        return None, Path(given), None
    given = re.sub("^gs://vit_models/", f"{base_url()}/", given)
    if "://" in given:
        check_address(given)
        key = unquote(re.sub(f"^({re.escape(base_url())}|https?:/)/", "", given.partition("?")[0]))
        if {"", ".", ".."} & set(re.split(r"[/\\]", key)):  # it could lead out of the folder
            raise UserError(f"{given}: the address names no file")
        return given, FOLDER / key, find(key)
    if "/" in given and (file := find(given)):
        return file.url, FOLDER / file.key, file
    path = Path(given)
    name = f"{path.parent.name}/{path.name}" if path.parent.name in BUCKETS else path.name
    file = find(name) if path.suffix == ".npz" else None
    return (file.url if file else None), path, file


def _is_here(path: Path) -> bool:
    """Whether it is a file, or a folder of Hugging Face."""
    return path.is_file() or (path / "config.json").is_file() or any(path.glob("*.safetensors"))


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(Path(name).stem, [Path(f.name).stem for f in FILES], 2, 0.7)
    keys = [file.key.removesuffix(".npz") for file in FILES if Path(file.name).stem in near]
    start = f"Did you mean {' or '.join(keys[:4])}? " if keys else ""
    return f"{start}`python3 -m models.zoo` lists Google's files"


def describe(file: File) -> str:
    """All that is known about one file, a line for each fact."""
    path, known = FOLDER / file.key, file.accuracy is not None
    lines = {
        "file": file.key,
        "variant": f"{file.variant}, {file.resolution} pixels",
        "head": f"{file.classes} classes, {file.classifier}{'+pre_logits' * file.pre_logits}",
        "parameters": f"{file.parameters:,}, {file.parameters * 4 / 2**20:.0f} MiB in float32",
        "ImageNet top-1": f"{file.accuracy} % ({SOURCES[file.source]})" if known else "unknown",
        "address": file.url,
        "stored": f"{path}, {'here' if path.is_file() else 'not here yet'}",
        "note": file.note,
        "same name": ", ".join(f.key for f in FILES if f.name == file.name and f is not file),
    }
    return "\n".join(f"{name:15} {value}" for name, value in lines.items() if value)


def listing(files: list[File]) -> str:
    """The table as text, a line for each file."""
    rows = [("variant", "classes", "px", "MiB", "head", "top-1", "by", "bucket/file")]
    for f in files:
        size, head = f"{f.parameters * 4 / 2**20:.0f}", f.classifier + "+pre_logits" * f.pre_logits
        top1, by = ("-", "-") if f.accuracy is None else (f"{f.accuracy:.2f}", f.source)
        rows.append((f.variant, str(f.classes), str(f.resolution), size, head, top1, by, f.key))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m models.zoo", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="words, or the name of one file")
    words = parser.parse_args(argv).words
    if file := find(" ".join(words)):
        return print(describe(file))
    chosen = [f for f in FILES if all(w.lower() in f"{f.variant} {f.key}".lower() for w in words)]
    if not chosen:
        parser.error(f"no file has {' '.join(words)!r}. {_nearest(words[0])}")
    try:
        print(listing(chosen), flush=True)
    except BrokenPipeError:  # the reader has enough, as `head` often does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
