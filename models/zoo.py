"""Google's published checkpoints: which exist, what is in them, where they are, and fetching them.

    python3 -m models.zoo [WORD ...]    the files whose line holds every WORD
    python3 -m models.zoo NAME          one file, and where it would be stored

Names and recommended AugReg files: README.md of google-research/vision_transformer; further AugReg
files: the addresses in timm's vision_transformer.py and vision_transformer_hybrid.py.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import torch

from models.configs import CONFIGS, ViTConfig
from models.download import DownloadError, by_hand, check_url, download, tell, verify
from models.modeling import VisionTransformer

FOLDER = Path("checkpoint")
ZERO_HEAD = "its head is all zeros: for fine-tuning only"


@dataclass(frozen=True)
class File:
    """One published `.npz`. `resolution` is the side in pixels of the images it was trained on.

    `accuracy` is the published top-1 on ImageNet's validation images in percent, of the file's own
    head, and `source` says who published it; None where no figure is known.
    """

    bucket: str
    name: str
    variant: str
    classes: int
    resolution: int
    pre_logits: bool = False
    classifier: str = "token"
    accuracy: float | None = None
    source: str = ""
    note: str = ""

    @property
    def key(self) -> str:
        return f"{self.bucket}/{self.name}"

    @property
    def url(self) -> str:
        return f"{base_url()}/{quote(self.key)}"

    @property
    def stored(self) -> Path:
        """Keyed by bucket too: most names occur in several."""
        return FOLDER / self.bucket / self.name

    @property
    def config(self) -> ViTConfig:
        row = CONFIGS[self.variant]
        width = row.hidden_size if self.pre_logits else None
        return replace(row, classifier=self.classifier, representation_size=width)

    @property
    def parameters(self) -> int:
        return count_parameters(self.config, self.resolution, self.classes)

    @property
    def mib(self) -> float:
        """Size of the parameters in MiB, all published in float32; the server's is the truth."""
        return self.parameters * 4 / 2**20


@lru_cache
def count_parameters(config: ViTConfig, resolution: int, classes: int) -> int:
    with torch.device("meta"):
        model = VisionTransformer(config, resolution, classes)
    return sum(p.numel() for p in model.parameters())


def base_url() -> str:
    """The bucket's address; $VIT_MODELS_URL names a mirror, which may be http on this machine."""
    url = os.environ.get("VIT_MODELS_URL") or "https://storage.googleapis.com/vit_models"
    return url.rstrip("/")


# ------------------------------------------------------------------------------------- the table

README, TIMM = "Google's README", "timm's results-imagenet.csv, with its own crop"

_I21K = ["ViT-B_8", "ViT-B_16", "ViT-B_32", "ViT-L_16", "ViT-L_32", "ViT-H_14", "R50+ViT-B_16",
         "R26+ViT-B_32", "R50+ViT-L_32"]  # fmt: skip
# Fine-tuned name -> published accuracy. Trained at 384 pixels unless the name ends in -224.
_I21K_I1K = {
    "ViT-B_16-224": (81.2, README),
    "ViT-B_16": (84.200, TIMM),
    "ViT-B_32": (None, ""),
    "ViT-B_8": (None, ""),
    "ViT-L_16-224": (82.7, README),
    "ViT-L_16": (None, ""),
    "ViT-L_32": (81.510, TIMM),
    "R50+ViT-B_16": (84.976, TIMM),
}
# Pre-trained AugReg file -> {learning rate and resolution of a fine-tuned one: accuracy}.
# The names of those whose accuracy is Google's are the ones that its README recommends.
_AUGREG = {
    "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0": {
        "0.03-res_384": (78.22, README),
        "0.03-res_224": (75.454, TIMM),
    },
    "S_32-i21k-300ep-lr_0.001-aug_none-wd_0.1-do_0.0-sd_0.0": {"0.01-res_384": (79.58, README)},
    "S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0": {
        "0.03-res_384": (80.486, TIMM),
        "0.03-res_224": (75.994, TIMM),
    },
    "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0": {
        "0.03-res_384": (83.73, README),
        "0.03-res_224": (81.384, TIMM),
    },
    "S_16-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0": {
        "0.01-res_384": (81.116, TIMM),
        "0.01-res_224": (78.846, TIMM),
    },
    "B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0": {
        "0.01-res_384": (83.59, README),
        "0.03-res_384": (83.350, TIMM),
    },
    "B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0": {"0.03-res_224": (80.716, TIMM)},
    "B_32-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.1-sd_0.1": {
        "0.01-res_384": (78.752, TIMM),
        "0.01-res_224": (74.894, TIMM),
    },
    "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0": {
        "0.03-res_384": (85.49, README),
        "0.01-res_384": (85.996, TIMM),
        "0.01-res_224": (84.532, TIMM),
    },
    "B_16-i1k-300ep-lr_0.001-aug_strong2-wd_0.1-do_0.1-sd_0.1": {
        "0.01-res_384": (81.102, TIMM),
        "0.01-res_224": (79.154, TIMM),
    },
    "B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0": {"0.01-res_224": (85.798, TIMM)},
    "L_16-i21k-300ep-lr_0.001-aug_strong1-wd_0.1-do_0.0-sd_0.0": {"0.01-res_384": (85.59, README)},
    "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1": {
        "0.01-res_384": (87.084, TIMM),
        "0.01-res_224": (85.834, TIMM),
    },
    "R_Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0": {
        "0.03-res_384": (75.40, README),
        "0.03-res_224": (71.798, TIMM),
    },
    "R26_S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0": {
        "0.01-res_384": (83.85, README)
    },
    "R26_S_32-i21k-300ep-lr_0.001-aug_light0-wd_0.03-do_0.1-sd_0.1": {
        "0.03-res_224": (81.864, TIMM)
    },
    "R26_S_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0": {
        "0.03-res_384": (84.048, TIMM)
    },
    "R50_L_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1": {
        "0.01-res_384": (85.99, README),
        "0.01-res_224": (84.422, TIMM),
    },
    "R50_L_32-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0": {
        "0.01-res_384": (86.182, TIMM)
    },
}
_SAM = {
    "ViT-B_16": (80.244, TIMM),
    "ViT-B_32": (73.694, TIMM),
    "ViT-L_16": (None, ""),
    "ViT-L_32": (None, ""),
    "ViT-S_16": (None, ""),
}
_GSAM = ["ViT-S_32", "ViT-S_16", "ViT-B_32", "ViT-B_16"]


def _table() -> list[File]:
    files = []
    for name in _I21K:
        files.append(File("imagenet21k", f"{name}.npz", name, 21843, 224, pre_logits=True,
                          note=ZERO_HEAD))  # fmt: skip
    for name, (accuracy, source) in _I21K_I1K.items():
        files.append(File("imagenet21k+imagenet2012", f"{name}.npz", name.removesuffix("-224"),
                          1000, 224 if name.endswith("-224") else 384,
                          accuracy=accuracy, source=source))  # fmt: skip
    for name, fine_tuned in _AUGREG.items():
        hybrid, size = re.match(r"(R\d*_)?([A-Za-z]+_\d+)-", name).groups()
        variant = (hybrid or "").replace("_", "+") + f"ViT-{size}"
        if "-i21k-" in name:
            files.append(File("augreg", f"{name}.npz", variant, 21843, 224))
        for how, (accuracy, source) in fine_tuned.items():
            files.append(File("augreg", f"{name}--imagenet2012-steps_20k-lr_{how}.npz", variant,
                              1000, int(how[-3:]), accuracy=accuracy, source=source))  # fmt: skip
    for name, (accuracy, source) in _SAM.items():
        note = "about three times this size: holds more than parameters" if "S_16" in name else ""
        files.append(File("sam", f"{name}.npz", name, 1000, 224, accuracy=accuracy, source=source,
                          note=note))  # fmt: skip
    for name in _GSAM:
        files.append(File("gsam", f"{name}.npz", name, 1000, 224, classifier="gap"))
    return files


FILES: tuple[File, ...] = tuple(_table())
BUCKETS = tuple(dict.fromkeys(file.bucket for file in FILES))


# --------------------------------------------------------------------------------------- finding


def find(name: str, bucket: str | None = None) -> File | None:
    """The row of that file name; without a bucket, the first one in the table's order.

    The earlier port's spelling R50-ViT-B_16 is understood.
    """
    name = re.sub(r"^(R\d*)-ViT", r"\1+ViT", name)
    rows = [file for file in FILES if file.name == name and bucket in (None, file.bucket)]
    return rows[0] if rows else None


def locate(
    given: str,
    *,
    variant: str | None = None,
    head: bool = False,
    offline: bool = False,
    say: Callable[[str], None] = tell,
) -> Path:
    """The local file that `given` means, fetched first if need be.

    `given` is a path, an https:// address (gs://vit_models/ is understood), or BUCKET/NAME. A path
    that does not exist but ends in a name of the table is fetched to just there, from the bucket
    that its folder is called, else from the first that has it. `variant` is what the file is meant
    to be, and `head` says that its own head is wanted: rows that do not fit are refused before
    anything is fetched.
    Raises DownloadError with one sentence.
    """
    path = Path(given)
    if path.is_file():
        verify(path)
        return path
    url, path, file = _address(given)
    if url is None:
        nearest = "" if path.suffix == ".bin" else f". {_nearest(path.name)}"
        raise DownloadError(f"{given}: no such file{nearest}")
    if path.is_file():
        verify(path)
        return path
    if file and variant and CONFIGS[file.variant] != CONFIGS[variant]:
        raise DownloadError(f"{given}: the file fits {file.variant}, not {variant}. "
                            f"{_nearest(f'{variant}.npz')}")  # fmt: skip
    if file and head and file.note == ZERO_HEAD:
        raise DownloadError(f"{given}: {file.note}; imagenet21k+imagenet2012/ has heads")
    if offline:
        raise DownloadError(f"{path}: no such file, and --offline forbids fetching {url}; by hand: "
                            f"{by_hand(url, path)}")  # fmt: skip
    download(url, path, trusted=base_url(), say=say)
    return path


def variant_of(given: str) -> str | None:
    """The variant of the file that `locate` would fetch; None where it would fetch none."""
    file = None if Path(given).is_file() else _address(given)[2]
    return file.variant if file else None


def _address(given: str) -> tuple[str | None, Path, File | None]:
    """(URL, path to store it at, row of the table), each None where there is none."""
    given = re.sub("^gs://vit_models/", f"{base_url()}/", given)
    if "://" in given:
        check_url(given, base_url())
        if given.startswith(f"{base_url()}/"):
            key = unquote(given.removeprefix(f"{base_url()}/"))
        else:
            key = urlsplit(given).hostname + unquote(urlsplit(given).path)
        if {"", ".", ".."} & set(re.split(r"[/\\]", key)):
            raise DownloadError(f"{given}: the address names no file")
        bucket, _, name = key.rpartition("/")
        return given, FOLDER / key, find(name, bucket)
    bucket, _, name = given.rpartition("/")
    if bucket in BUCKETS:
        file = find(name, bucket) or find(f"{name}.npz", bucket)
        return (file.url, file.stored, file) if file else (None, Path(given), None)
    path = Path(given)
    file = find(path.name, path.parent.name if path.parent.name in BUCKETS else None)
    return (file.url if file else None), path, file


def _nearest(name: str) -> str:
    stems = {file.key.removesuffix(".npz"): Path(file.name).stem for file in FILES}
    near = difflib.get_close_matches(Path(name).stem, stems.values(), 2, 0.7)
    some = [key for key, stem in stems.items() if stem in near][:4]
    start = f"Did you mean {' or '.join(some)}? " if some else ""
    return f"{start}`python3 -m models.zoo` lists Google's files"


# ------------------------------------------------------------------------------------ the listing


def describe(file: File) -> str:
    """All that is known of one row, a line each."""
    head = "class token" if file.classifier == "token" else "mean of all patches, no class token"
    accuracy = "not published" if file.accuracy is None else f"{file.accuracy} % ({file.source})"
    lines = {
        "file": file.key,
        "variant": file.variant,
        "head": f"{file.classes} classes on the {head}"
        + (", through pre_logits" if file.pre_logits else ""),
        "resolution": f"{file.resolution} pixels",
        "parameters": f"{file.parameters:,}, {file.mib:,.0f} MiB in float32",
        "ImageNet top-1": accuracy,
        "address": file.url,
        "stored": f"{file.stored}, {'here' if file.stored.is_file() else 'not here yet'}",
        "use": f"--pretrained_dir {file.key.removesuffix('.npz')}",
        "note": file.note,
    }
    others = [f.key for f in FILES if f.name == file.name and f is not file]
    lines["same name"] = ", ".join(others)
    return "\n".join(f"{name:15} {value}" for name, value in lines.items() if value)


def listing(files: list[File]) -> str:
    """The table, a line a file."""
    rows = [("variant", "classes", "px", "MiB", "head", "top-1", "by", "bucket/file")]
    for file in files:
        head = file.classifier + ("+pre_logits" if file.pre_logits else "")
        known = (
            ("-", "-")
            if file.accuracy is None
            else (f"{file.accuracy:.2f}", file.source.split("'")[0])
        )
        rows.append((file.variant, str(file.classes), str(file.resolution), f"{file.mib:.0f}",
                     head, *known, file.key))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m models.zoo", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="list the files whose line holds "
                        "all of these words; one file's name tells all of it")  # fmt: skip
    words = parser.parse_args(argv).words
    if len(words) == 1:
        bucket, _, name = words[0].rpartition("/")
        file = find(f"{name.removesuffix('.npz')}.npz", bucket or None)
        if file:
            print(describe(file))
            return 0
    lines = {file: f"{file.variant} {file.key}".lower() for file in FILES}
    chosen = [file for file, line in lines.items() if all(word.lower() in line for word in words)]
    if not chosen:
        print(f"models.zoo: error: no file matches {' '.join(words)!r}. {_nearest(words[0])}",
              file=sys.stderr)  # fmt: skip
        return 2
    with suppress(BrokenPipeError):  # `| head` has seen enough
        print(listing(chosen), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
