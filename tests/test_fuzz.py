"""Altered checkpoints: each is refused in one line, or loads; never a traceback.

python3 -m tests.test_fuzz 1000    # the long form
"""

import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from models.checkpoints import load_torch, open_model, read, write
from models.errors import UserError
from models.interop import write_timm
from models.state_dict import load
from tests.helpers import checkpoint_of, random_model, tiny_config

CONFIGS = {"vit": tiny_config(), "hybrid": tiny_config(resnet_layers=(1, 1))}


def damage(data: bytes, chance: random.Random) -> bytes:
    """What happens to files: cuts, flipped bits, zeroed and repeated blocks."""
    data = bytearray(data)
    kind, at = chance.randrange(6), chance.randrange(len(data))
    if kind == 0:
        del data[at:]
    elif kind == 1:
        for _ in range(chance.randrange(1, 20)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 2:
        data[at : at + 512] = bytes(min(512, len(data) - at))
    elif kind == 3:
        data[at:at] = data[:200]
    elif kind == 4:
        del data[at : at + chance.randrange(1, 3000)]
    else:  # a name, a shape or a type inside: the archives are stored, not compressed
        marks = [b"shape", b"<f4", b"F32", b"kernel", b"weight", b"offsets", b"PK\x01\x02"]
        start = max(0, data.find(chance.choice(marks)))
        data[start + chance.randrange(12)] = chance.randrange(256)
    return bytes(data)


def change(tensors: dict[str, torch.Tensor], chance: random.Random) -> dict[str, torch.Tensor]:
    """The tensors of a valid file with one of them wrong: shape, name, type, value."""
    key = chance.choice(sorted(tensors))
    others = dict(tensors)
    t = others.pop(key)
    shapes = [t.reshape(-1), t[..., None], t[:0], t[:1].clone(), t[:-1].clone(), torch.tensor(3.0)]
    shapes += [t.repeat(2, *[1] * (t.ndim - 1)), t.transpose(0, -1).contiguous()]
    values = [t.int(), t.half(), t.to(torch.complex64), torch.full_like(t, torch.inf)]
    replaced = [{key: wrong} for wrong in shapes + values]
    return others | chance.choice([*replaced, {key + "x": t}, {}])


def change_file(path: Path, source: Path, chance: random.Random) -> None:
    """Write `source` to `path` with one wrong tensor, and otherwise valid."""
    if path.suffix == ".safetensors":
        save_file(change(load_file(source), chance), path)
    elif path.suffix == ".npz":
        with np.load(source) as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file.files}
        np.savez(path, **{key: tensor.numpy() for key, tensor in change(arrays, chance).items()})
    else:
        record = load_torch(source)
        torch.save(record | {"model": change(record["model"], chance)}, path)


def fuzz(folder: Path, rounds: int, seed: int) -> dict[str, int]:
    """Alter `rounds` files. Returns how many were refused and how many loaded all the same."""
    chance, counts = random.Random(seed), {"refused": 0, "loaded": 0}
    sources = []
    for name, config in CONFIGS.items():
        for suffix in (".bin", ".npz", ".safetensors"):
            path = folder / f"{name}{suffix}"
            write(path, checkpoint_of(random_model(config), tuple("abcde")))
            sources.append((path, random_model(config, std=0.2)))
        path, model = folder / f"{name}.pth", random_model(config)
        torch.save({"model": write_timm(model.state_dict(), config), "epoch": 3}, path)
        sources.append((path, random_model(replace(config, gelu="erf", num_heads=1), std=0.2)))
    for i in range(rounds):
        source, target = sources[i % len(sources)]
        path = folder / f"wrong{source.suffix}"
        if chance.random() < 0.5:
            change_file(path, source, chance)
        else:
            path.write_bytes(damage(source.read_bytes(), chance))
        before = {key: value.clone() for key, value in target.state_dict().items()}
        try:
            load(target, read(path))
            counts["loaded"] += 1
            assert all(value.isfinite().all() for value in target.state_dict().values())
        except UserError as error:
            counts["refused"] += 1
            assert "\n" not in str(error), str(error)
            assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
        try:  # the config that the file tells makes a model that runs, or none
            model, _ = open_model(path, head=chance.random() < 0.5)
            with torch.no_grad():
                model(torch.zeros(1, model.in_channels, *model.img_size))
        except UserError as error:
            assert "\n" not in str(error), str(error)
    return counts


def test_altered_files_are_refused_in_one_line_or_load(tmp_path):
    counts = fuzz(tmp_path, rounds=160, seed=0)
    assert counts["refused"] > 95 and counts["loaded"] > 5


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(fuzz(Path(name), int(sys.argv[1]), seed=1))
