"""Find the model in files and folders of other libraries: wrappers, prefixes, shards.

DeiT and MAE store a state dict under `model`, DINO under `teacher` and `student`, timm under
`state_dict` and `state_dict_ema`; names begin with `module.` after DistributedDataParallel, with
`_orig_mod.` after torch.compile, with `model.` in Lightning. No list of these is needed: a model is
where a patch embedding is.
"""

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Parameter

from models.errors import UserError
from models.layouts import FOREIGN, METADATA_KEYS, TOWERS
from models.state_dict import PATCHES, RESNET_ROOT

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".tar")  # the last: .pth.tar
INDEX = "model.safetensors.index.json"
FOLDER_FILES = ("model.safetensors", INDEX, "pytorch_model.bin")  # the first that is there counts
TOP = "the top level"
# What leads to the first layer, by its name in every layout that is known.
_NAMES = [
    f"{theirs}.weight" for theirs, ours in FOREIGN if f"{ours}.weight" in (PATCHES, RESNET_ROOT)
]
_NAMES += [PATCHES, RESNET_ROOT, "embeddings.patch_embeddings.weight"]  # DINOv3: to name it
_HYBRIDS = r"(?<!blocks\.\d\.)(?<!blocks\.\d\d\.)"  # their ResNet has a `conv1` in every block
_FIRST = re.compile(rf"((?:.*?\.)??){_HYBRIDS}(?:{'|'.join(map(re.escape, _NAMES))})")
# Averages of weights come first, as in the loaders of timm and DINO.
_AVERAGE = re.compile(r"(?<![a-z])(ema|teacher|target)(?![a-z])|E(ma|MA)(?![a-z])")


class Ignored:
    """In place of a pickled argparse.Namespace, the flags of DeiT, MAE and timm: keeps nothing."""

    __slots__ = ()

    def __setstate__(self, state) -> None: ...


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a `.safetensors`, and its metadata of METADATA_KEYS. Raises UserError."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            stored = file.metadata() or {}
        return tensors, {key: json.loads(stored[key]) for key in METADATA_KEYS if key in stored}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"no safetensors file, or damaged ({error})") from error


def unwrap(content: Mapping) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """(tensors by their library's names, those names -> the file's own, what was chosen).

    A prefix is what comes before the name of a patch embedding: the `encoder.` of Hugging Face's
    `encoder.layer.0` is none, nor are TOWERS. Other names lose what they share with it: of
    `module.backbone.` and `module.head.bias` remains `head.bias`. Of several models an average is
    chosen (a name with ema, teacher or target), a student last, else the first. What was chosen is
    said with what the file holds beside it. Raises UserError.
    """
    found = {}  # what leads to a model -> (path of its dict, the dict, prefix of its names)
    for path, values in _dicts(content):
        names = [k for k, v in values.items() if isinstance(k, str) and isinstance(v, Tensor)]
        for match in filter(None, map(_FIRST.fullmatch, names)):
            tower = next(filter(match[1].endswith, TOWERS), "")
            prefix = match[1].removesuffix(tower)
            label = ".".join([*path, prefix]).rstrip(".") or TOP
            found[label] = path, values, prefix
    if not found:
        raise UserError(f"it holds no Vision Transformer of a known layout ({_shown(content)})")
    chosen = min(found, key=lambda label: (not _AVERAGE.search(label), "student" in label))
    path, values, prefix = found.pop(chosen)
    prefixes = [prefix, *(p for _, other, p in found.values() if other is values)]
    tensors, own_names = {}, {}
    for key, tensor in values.items():
        if not isinstance(tensor, Tensor):
            continue
        if not isinstance(key, str) or not key.isprintable():
            raise UserError(f"{_shown([key])} is no name of a tensor")
        if max(prefixes, key=lambda p: (key.startswith(p), _shared(key, p))) != prefix:
            continue  # of another model, which the note names
        name = key[_shared(key, prefix) :]
        if name in tensors:
            raise UserError(f"two of its tensors are {name}")
        plain = type(tensor) in (Tensor, Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_nested or tensor.is_meta:
            raise UserError(f"{key} is sparse, or otherwise no plain tensor")
        tensors[name], own_names[name] = tensor.detach(), key
    return tensors, own_names, _note(content, path, chosen, [*found])


def _shared(key: str, prefix: str) -> int:
    """Length of the parts, each with its full stop, that both begin with."""
    pairs = zip(key.split(".")[:-1], prefix.split("."), strict=False)
    return sum(len(part) + 1 for part, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _dicts(content: Mapping) -> Iterator[tuple[tuple[str, ...], Mapping]]:
    """(names that lead to it, dict) of every dict inside, each once: pickles can hold loops."""
    queue, seen = [((), content)], set()
    for path, values in queue:
        if id(values) not in seen and len(path) < 8:
            seen.add(id(values))
            yield path, values
            inner = [k for k, v in values.items() if isinstance(k, str) and isinstance(v, dict)]
            queue += [((*path, key), values[key]) for key in inner]


def _note(content: Mapping, path: tuple[str, ...], chosen: str, others: list[str]) -> str:
    """What was chosen, and everything that was not; empty for a bare state dict alone."""
    aside = []
    for i, step in enumerate([*path, None]):
        for key, value in content.items():
            label = ".".join([*path[:i], str(key)])
            read = key == step or (step is None and isinstance(value, Tensor))
            if not read and not any(f"{other}.".startswith(f"{label}.") for other in others):
                aside.append(key)
        content = content.get(step, {})
    note = f"taken from {_shown([chosen])}" if chosen != TOP or others else ""
    note += f", not from {_shown(others)}" if others else ""
    return "; ".join(filter(None, [note, aside and f"not read: {_shown(aside)}"]))


def _shown(names: Iterable) -> str:
    """Names of an untrusted file on one line."""
    names = [name if isinstance(name, str) else type(name).__name__ for name in names]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(ascii(name)[:60] for name in names[:8]) + more


def conversion(path: str | Path) -> str:
    """The shell line that keeps the tensors of a file that needs pickle, and runs its code."""
    # Modules, optimizers and lists become dicts; what is neither a dict nor a tensor goes out.
    code = (
        f"import torch; f = {json.dumps(str(path), ensure_ascii=False)}; "
        'd = lambda x: x.state_dict() if hasattr(x, "state_dict") else '
        "dict(enumerate(x)) if isinstance(x, (list, tuple)) else x; "
        "k = lambda x: {str(n): k(d(v)) for n, v in x.items() if torch.is_tensor(v) or "
        "isinstance(d(v), dict)} if isinstance(x, dict) else x; "
        'torch.save(k(d(torch.load(f, "cpu", weights_only=False))), f + ".converted.pth")'
    )
    return f"python3 -c {shlex.quote(code)}"


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder of Hugging Face. Raises UserError if there is none."""
    for path in (folder / name for name in FOLDER_FILES):
        if path.is_file():
            return path
    raise UserError(f"{folder}: a folder without {', '.join(FOLDER_FILES)}")


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index of Hugging Face names. Raises UserError."""
    try:
        files = json.loads(index.read_bytes())["weight_map"]  # tensor -> file
        names = sorted(set(files.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"no index of shards, or damaged ({ascii(error)[:100]})") from error
    tensors = {}
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise UserError(f"{_shown([name])} is no file name of a shard")
        if not (index.parent / name).is_file():
            raise UserError(f"its shard {name} is missing: download it, too")
        try:
            shard, _ = read_tensors(index.parent / name)
        except UserError as error:
            raise UserError(f"its shard {name}: {error}") from error
        listed = {key for key, file in files.items() if file == name}
        if wrong := sorted(listed ^ shard.keys()):
            raise UserError(f"its shard {name} and the index differ in {_shown(wrong)}")
        tensors |= shard
    return tensors
