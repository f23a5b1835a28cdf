"""Altered checkpoints: each ends in one clear line or loads; never a traceback, never a part.

python3 -m tests.test_fuzz 1000    # the long form
"""

import random
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from models.modeling import VisionTransformer
from models.structure import WeightsError
from models.weights import read_npz, to_official
from tests.helpers import tiny_config
from utils.checkpoint import CheckpointError, load_model, model_record, save_atomic, write_npz
from utils.classifier import open_model


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One of the things that happen to files: cuts, flipped bits, zeroed and repeated blocks."""
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
        start = max(0, data.find(chance.choice([b"shape", b"<f4", b"kernel", b"PK\x01\x02"])))
        data[start + chance.randrange(12)] = chance.randrange(256)
    return bytes(data)


def repacked(path: Path, chance: random.Random) -> bytes:
    """An npz whose CRCs are right but whose arrays are not: wrong shapes, names, types, values."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    key = chance.choice(sorted(arrays))
    array = arrays.pop(key)
    kinds = [
        array.reshape(-1), array[..., None], array[:0], array.astype(np.int32), array.astype("U3"),
        np.full_like(array, np.inf), np.float32(3.0), array.astype(np.complex64),
    ]  # fmt: skip
    choice = chance.randrange(len(kinds) + 2)
    if choice < len(kinds):
        arrays[key] = kinds[choice]
    elif choice == len(kinds):
        arrays[key + "x"] = array
    with tempfile.TemporaryFile() as file:
        np.savez(file, **arrays)
        file.seek(0)
        return file.read()


def opened(path: Path) -> VisionTransformer | None:
    """The model that other programs than train.py would use, None where they refuse the file."""
    try:
        return open_model(path)[0]
    except (WeightsError, CheckpointError) as error:
        assert "\n" not in str(error), str(error)


def fuzz(folder: Path, rounds: int, seed: int) -> dict[str, int]:
    """Alter `rounds` files; returns how many were refused and how many loaded all the same."""
    torch.manual_seed(0)
    model = VisionTransformer(tiny_config(), 32, 5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    npz, binary = folder / "good.npz", folder / "good.bin"
    write_npz(npz, to_official(model.state_dict(), model.config))
    save_atomic(model_record(model.state_dict(), model, variant="ViT-B_16", classes=tuple("abcde"),
                             step=1, metrics={"accuracy": 0.5}), binary)  # fmt: skip
    chance, counts = random.Random(seed), {"refused": 0, "loaded": 0}
    target = VisionTransformer(tiny_config(), 32, 5)
    for i in range(rounds):
        before = {key: value.clone() for key, value in target.state_dict().items()}
        source = (npz, binary)[i % 2]
        wrong = folder / f"wrong{source.suffix}"
        repack = source is npz and i % 4 == 0
        wrong.write_bytes(repacked(npz, chance) if repack else mutate(source.read_bytes(), chance))
        try:
            if source is npz:
                target.load_from(read_npz(wrong))
                opened(wrong)
            else:
                loaded, _ = load_model(wrong)
                assert all(torch.isfinite(p).all() for p in loaded.parameters())
            counts["loaded"] += 1
        except (WeightsError, CheckpointError) as error:
            counts["refused"] += 1
            assert "\n" not in str(error), str(error)
            state = target.state_dict()
            assert all(torch.equal(state[key], value) for key, value in before.items())
            if source is npz:
                opened(wrong)
    return counts


def test_altered_files_are_refused_in_one_line_or_load(tmp_path):
    counts = fuzz(tmp_path, rounds=120, seed=0)
    assert counts["refused"] > 60 and sum(counts.values()) == 120


def test_an_archive_of_nonsense_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../../escape.npy", b"\x93NUMPY\x01\x00")
    try:
        read_npz(path)
    except WeightsError as error:
        assert "damaged" in str(error)
    else:
        raise AssertionError("loaded nonsense")
    assert not (tmp_path.parent.parent / "escape.npy").exists()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(fuzz(Path(name), int(sys.argv[1]), seed=1))
