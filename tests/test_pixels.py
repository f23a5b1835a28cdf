"""The recipe of a checkpoint against the pipelines of timm, Hugging Face and Google."""

import csv
import json
import shutil
import tarfile
from argparse import Namespace
from collections import Counter
from itertools import islice
from math import prod
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf

import evaluate
import export
import predict
import train
from data_flags import train_pixels
from models.checkpoints import load_torch, read, write
from models.errors import UserError
from models.interop import read_foreign
from models.modeling import VisionTransformer
from models.pixels import ALIASED, GOOGLE, INTERPOLATIONS, PLAIN, Pixels, library_recipe
from models.state_dict import POSITIONS, load
from tests.helpers import (
    ROOT,
    checkpoint_of,
    random_model,
    run_command,
    save_npz,
    words,
    write_images,
)
from utils import checkpoint
from utils.augment import DRAWS, FLIP, LEFT, TOP, Augmentation
from utils.image_set import ImageSet
from utils.images import Decoding, decode, to_input
from utils.loading import decode_images
from utils.resize import resize
from utils.stream import EvalStream, Shard, TrainStream, global_batch

CPU = torch.device("cpu")
NINE_TENTHS = Pixels("bicubic", "smaller_side", 0.9)
TIMM = {"interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
SIDES, CROP = {"height": 64, "width": 64}, {"crop_size": 64, "do_center_crop": True}
HUGGING_FACE = {"ViT": {"size": SIDES, "resample": 2}, "bicubic": {"size": SIDES, "resample": 3}}
HUGGING_FACE["CLIP"] = {"size": {"shortest_edge": 73}, "resample": 3} | CROP
HUGGING_FACE["squash, then crop"] = {"size": {"height": 75, "width": 75}, "resample": 2} | CROP
MEANS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 2}
TINY_FACE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEG files: scikit-learn's two photographs, and both again in odd sizes.

    None is much taller than wide: of these, Pillow 13 may resize columns first, and rounds
    otherwise.
    """
    whole = [Image.fromarray(array) for array in load_sample_images().images]
    made = [*whole, whole[0].crop((7, 0, 408, 427)), whole[1].resize((61, 43))]
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{i}.jpg" for i in range(4)]
    for path, image in zip(paths, made, strict=True):
        image.save(path, quality=95)
    return paths


def check(path, size, how, theirs, apart=1):
    """What a model of `size` sees of a file is `theirs` (C, H, W), but for a few roundings."""
    image = decode(path, Decoding())
    ours = resize(image, how.window(*image.sides, size), size, how).numpy()
    difference = np.abs(ours - 255.0 * np.asarray(theirs))
    assert difference.max() < apart + 0.01 and (difference > 0.5).mean() < 0.01


def check_timm(paths, size, values, apart=1):
    options = {"mean": (0, 0, 0), "std": (1, 1, 1)} | values
    transform = timm.data.create_transform((3, *size), **options)
    for path in paths:
        theirs = transform(Image.open(path))
        check(path, size, library_recipe(values), theirs, apart)


SIZES = [(0.9, (224, 224)), (1.0, (224, 224)), (0.875, (64, 64)), (0.9, (96, 64)), (1.0, (64, 96))]


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("fraction, size", SIZES)
def test_pixels_are_timms(fraction, size, interpolation, mode, photos):
    values = {"interpolation": interpolation, "crop_pct": fraction, "crop_mode": mode}
    check_timm(photos, size, values)


def test_pixels_of_cifar_are_timms(tmp_path):
    if not (archive := ROOT.parent / "shared/data/cifar10_jpeg.tar.xz").exists():
        pytest.skip("CIFAR-10 is not here")
    with tarfile.open(archive) as file:
        members = (member for member in file if member.name.endswith(".jpg"))
        for i, member in enumerate(islice(members, 8)):
            (tmp_path / f"{i}.jpg").write_bytes(file.extractfile(member).read())
    check_timm([tmp_path / f"{i}.jpg" for i in range(8)], (96, 96), TIMM, apart=2)


def hugging_face(case, means):
    """Its processor that uses Pillow; the other one, torchvision's, differs from it by 1."""
    transformers = pytest.importorskip("transformers")
    kind = "Bit" if "crop_size" in HUGGING_FACE[case] else "ViT"
    means = {f"image_{name}": values for name, values in means.items()}
    return getattr(transformers, f"{kind}ImageProcessorPil")(**HUGGING_FACE[case], **means)


@pytest.mark.parametrize("case", HUGGING_FACE)
def test_pixels_are_hugging_faces(case, photos, tmp_path):
    processor = hugging_face(case, {"mean": [0] * 3, "std": [1] * 3})
    processor.save_pretrained(tmp_path)
    how = library_recipe(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    for path in photos:
        check(path, (64, 64), how, processor(Image.open(path)).pixel_values[0])


NORMAL = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
FACES = {  # files of several versions of transformers, with what they leave out
    "OpenAI's, old": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 64, "crop_size": 64}
    | {"do_center_crop": True, "resample": 3},
    "DeiT, old": {"feature_extractor_type": "DeiTFeatureExtractor", "size": 72, "crop_size": 64}
    | {"resample": 3},
    "BiT without its crop": {"image_processor_type": "BitImageProcessor", "crop_size": 64}
    | {"size": {"shortest_edge": 72}},
    "ViT without its filter": {"image_processor_type": "ViTImageProcessor", "size": 64},
    "SigLIP without its filter": {"image_processor_type": "SiglipImageProcessor"}
    | {"size": {"height": 64, "width": 64}},
}


@pytest.mark.parametrize("case", FACES)
def test_what_files_of_hugging_face_leave_out(case, photos, tmp_path):
    transformers = pytest.importorskip("transformers")
    given = NORMAL | FACES[case]
    kind = given.get("image_processor_type", given.get("feature_extractor_type"))
    name = kind.replace("FeatureExtractor", "ImageProcessor") + "Pil"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given))
    processor = getattr(transformers, name).from_pretrained(
        tmp_path, image_mean=[0] * 3, image_std=[1] * 3
    )
    for path in photos:
        check(path, (64, 64), library_recipe(given), processor(Image.open(path)).pixel_values[0])


@torch.no_grad()
@pytest.mark.parametrize(
    "given",
    [{"do_normalize": False}, {"rescale_factor": 1 / 127.5}, {"do_rescale": False}],
    ids=str,
)
def test_scales_of_hugging_face_are_folded(given):
    theirs = randomized(timm.models.VisionTransformer(32, 8, **TINY))
    values = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.4, 0.5], "num_heads": 2}
    checkpoint = read_foreign(theirs.state_dict(), values | given)
    ours = VisionTransformer(checkpoint.config, 32, len(theirs.head.bias)).eval()
    load(ours, checkpoint)
    pixels = torch.randint(0, 256, (2, 3, 32, 32)).float()  # transformers: rescale, then normalise
    x = pixels * (given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1)
    if given.get("do_normalize", True):
        mean, std = (torch.tensor(values[f"image_{n}"])[:, None, None] for n in ("mean", "std"))
        x = (x - mean) / std
    a, b = ours(pixels / 127.5 - 1), theirs(x)
    assert (a - b).abs().max() < 2e-5 * b.abs().max()


def lerp(array, whole, axis):
    """tf.image.resize along one axis: half-pixel centres, two neighbours, no antialiasing."""
    source = array.shape[axis]
    place = ((np.arange(whole) + 0.5) * source / whole - 0.5).clip(0, source - 1)
    low, shape = np.floor(place).astype(int), [-1 if i == axis else 1 for i in range(3)]
    first, second = array.take(low, axis), array.take((low + 1).clip(max=source - 1), axis)
    return first + (second - first) * (place - low).reshape(shape)


def resized(path, whole, interpolation):
    """By Pillow or by Google's formula, (H, W, C)."""
    image = Image.open(path)
    if interpolation == ALIASED:
        return lerp(lerp(np.asarray(image).astype(float), whole[0], 0), whole[1], 1)
    image = image.resize(whole[::-1], Image.Resampling[interpolation.upper()])
    return np.asarray(image).astype(float)


def image_sets(paths, how, labels=None):
    """Lossless files, and the same images in memory."""
    labels = torch.arange(len(paths)) if labels is None else labels
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths]))
    both = {"paths": tuple(paths)}, {"pixels": pixels.permute(0, 3, 1, 2).contiguous()}
    return [ImageSet(labels, **images, decoding=Decoding(pixels=how)) for images in both]


def from_files_and_memory(paths, size, how):
    """The pixels (B, H, W, C) of an evaluation, twice."""
    for images in image_sets(paths, how):
        batches = [batch for batch, _ in EvalStream(images, size, batch_size=2, device=CPU)]
        yield torch.cat(batches).permute(0, 2, 3, 1).numpy() * 127.5 + 127.5


@pytest.mark.parametrize("size", [(64, 96), (224, 224), (500, 700)])
def test_pixels_are_googles(size, photos):
    """At most 1 apart, since both directions are rounded."""
    for paths in (photos[:2], photos[3:]):
        for ours in from_files_and_memory(paths, size, GOOGLE):
            for path, pixels in zip(paths, ours, strict=True):
                assert np.abs(pixels - resized(path, size, ALIASED)).max() < 1.001


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("how", [("smaller_side", 0.8), ("squash", 0.8), ("squash", 1.0)])
def test_images_in_memory_are_as_files(how, interpolation, photos, tmp_path):
    how, size = Pixels(interpolation, *how), (40, 32)
    for side in (64, 300):  # files up to 64 pixels are resized as in memory
        paths = [tmp_path / f"{i}.png" for i in range(2)]
        for path, photo in zip(paths, photos, strict=False):
            Image.open(photo).resize((side, side - 9)).save(path)
        files, memory = from_files_and_memory(paths, size, how)
        assert np.abs(files - memory).max() < (0.01 if side == 64 else 2.01)
        _, whole, (top, left) = how.window(side - 9, side, size)
        for path, pixels in zip(paths, memory, strict=True):
            theirs = resized(path, whole, interpolation)[top : top + 40, left : left + 32]
            difference = np.abs(pixels - theirs)
            assert difference.max() < 2.01 and (difference > 1.01).mean() < 1e-3


def test_a_small_jpeg_is_decoded_whole(photos, tmp_path):
    """Files up to 64 pixels are resized as in memory, which knows no scale."""
    Image.open(photos[0]).resize((64, 64)).save(path := tmp_path / "a.jpg", quality=95)
    ((pixels,),) = decode_images([path], (8, 8))
    assert np.abs(pixels.transpose(1, 2, 0) - resized(path, (8, 8), "bilinear")).max() < 2.01


# ------------------------------------------------------------------------- a library's models


def predicted(capsys, *command):
    """File name -> its two probabilities, by predict.py."""
    assert run_command(predict, *command, "--format", "jsonl", "d") == 0
    rows = map(json.loads, capsys.readouterr().out.splitlines())
    tops = {row["file"]: {x["class"]: x["probability"] for x in row["top"]} for row in rows}
    return {Path(name).name: [top["0"], top["1"]] for name, top in tops.items()}


def check_end_to_end(weights, theirs, photos, capsys):
    """predict.py and evaluate.py give the probabilities of `theirs`, the library's own pipeline.

    Those few pixels that are rounded otherwise change them by about 1e-5.
    """
    for path in photos:
        (folder := Path("d/test", str(int(path.stem) % 2))).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    Path("names").write_text("0\n1\n")
    command = ["--checkpoint", weights, *words("--exact_decode --num_workers 0 --labels names")]
    found = predicted(capsys, *command)
    assert run_command(evaluate, *command, *words("--name e --dataset folder --data_dir d")) == 0
    with open("output/e_report/predictions.csv", newline="") as file:
        rows = {Path(row["image"]).name: row for row in csv.DictReader(file)}
    for path in photos:
        with torch.no_grad():
            wanted = theirs(Image.open(path))[0].softmax(0).numpy()
        row = [float(rows[path.name][name]) for name in "01"]
        assert np.abs([found[path.name], row] - wanted).max() < 1e-4


def randomized(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_a_timm_model_end_to_end(workdir, photos, capsys):
    options = TINY | {"img_size": 64, "patch_size": 8}
    config = {"pretrained_cfg_overlay": TIMM | MEANS | {"input_size": (3, 64, 64)}}
    model = randomized(timm.create_model("vit_tiny_patch16_224", **config, **options))
    save_for_hf(model, "timm", model_args=options, safe_serialization=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    theirs = lambda image: model(transform(image)[None])  # noqa: E731
    check_end_to_end("timm/model.safetensors", theirs, photos, capsys)


@pytest.mark.parametrize("case", ["bicubic", "CLIP"])
def test_a_hugging_face_model_end_to_end(case, workdir, photos, capsys):
    transformers = pytest.importorskip("transformers")
    size = {"intermediate_size": 64, "image_size": 64, "patch_size": 8}
    config = transformers.ViTConfig(**TINY_FACE, **size)
    model = randomized(transformers.ViTForImageClassification(config))
    processor = hugging_face(case, MEANS)
    for part in (model, processor):
        part.save_pretrained("hf")
    theirs = lambda image: model(**processor(image, return_tensors="pt")).logits  # noqa: E731
    check_end_to_end("hf/model.safetensors", theirs, photos, capsys)


@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 96), (32, 48)])
def test_positions_are_resized_as_by_the_library(size):
    """With antialiasing by timm, without by Hugging Face."""
    transformers = pytest.importorskip("transformers")
    grid = size[0] // 8, size[1] // 8
    config = transformers.ViTConfig(**TINY_FACE, image_size=64, patch_size=8)
    face = randomized(transformers.ViTForImageClassification(config))
    other = randomized(timm.models.VisionTransformer(64, 8, **TINY))
    embed = face.vit.embeddings.interpolate_pos_encoding
    wanted = [(face, embed(torch.zeros(1, prod(grid) + 1, 32), *size))]
    wanted += [(other, resample_abs_pos_embed(other.pos_embed, grid))]
    for library, positions in wanted:
        checkpoint = read_foreign(library.state_dict(), num_heads=2)
        load(model := VisionTransformer(checkpoint.config, size, 2), checkpoint)
        assert (model.state_dict()[POSITIONS] - positions).abs().max() < 1e-5


UNKNOWN = [TIMM | {"interpolation": x} for x in ("lanczos", 3, [], {})]
UNKNOWN += [TIMM | {"crop_mode": x} for x in ("border", 7, [1])]
UNKNOWN += [TIMM | {"crop_pct": x} for x in (0, -1, 1.5, float("nan"), 10**400, "a", [])]
for name, absurd in {
    "resample": (1, "2", []),
    "size": (0, 10**400, "a", {}, [64], {"longest_edge": 64}),
    "crop_size": ({}, "a", 0, 10**400, 200),
}.items():
    UNKNOWN += [HUGGING_FACE["CLIP"] | {name: x} for x in absurd]


def test_an_unknown_recipe_of_a_library_is_a_note():
    state = timm.models.VisionTransformer(32, 8, **TINY).state_dict()
    for values in UNKNOWN:
        found = read_foreign(state, {"num_heads": 2} | values).metadata
        (note,) = (note for note in found.notes if "squashed" in note)
        assert found.pixels == PLAIN and "\n" not in note and len(note) < 300, values
    found = read_foreign(state, {"num_heads": 2} | TIMM).metadata
    assert found.pixels == NINE_TENTHS and "squashed" not in str(found.notes)


# --------------------------------------------------------------------------- files and flags


def test_files_keep_the_recipe(workdir, capsys):
    onnx, _ = map(pytest.importorskip, ("onnx", "onnxscript"))
    model = random_model(classes=2)
    for how in (PLAIN, Pixels(ALIASED, "squash", 0.7, True), NINE_TENTHS):
        for name in ("m.bin", "m.safetensors"):
            write(name, checkpoint_of(model, ("a", "b"), pixels=how))
            assert read(name).metadata.pixels == how and read(name).metadata.positions == "linear"
            write(name, checkpoint_of(model, ("a", "b"), positions="bicubic"))
            assert read(name).metadata.positions == "bicubic"
            write(name, checkpoint_of(model, ("a", "b"), pixels=how))
    assert run_command(export, "--checkpoint", "m.bin", "m.onnx") == 0
    stored = {entry.key: entry.value for entry in onnx.load("m.onnx").metadata_props}
    assert Pixels.stored(json.loads(stored["pixels"])) == NINE_TENTHS
    googles = random_model(classes=21843)  # as ViT-B_16.npz in models/zoo.csv
    for name, saved in (("m.npz", googles), ("ViT-B_16.npz", model), ("ViT-B_16.npz", googles)):
        save_npz(name, saved)
        is_googles = saved is googles and name != "m.npz"
        assert read(name).metadata.pixels == (GOOGLE if is_googles else PLAIN)
    save_npz("m.npz", model)
    assert run_command(export, "--checkpoint", "m.bin", "m.npz", "--resize", "squash") == 0
    note = "does not say how images are resized: bicubic, squash to 35x35, central crop 32x32"
    assert note in capsys.readouterr().out
    record = load_torch("m.bin")
    torch.save({key: value for key, value in record.items() if key != "pixels"}, "old.bin")
    assert read("old.bin").metadata.pixels == PLAIN
    for damaged in (None, 7, {"other": 1}, {"crop_fraction": "1"}, {"interpolation": ["lanczos"]}):
        torch.save(record | {"pixels": damaged}, "m.bin")
        assert run_command(predict, "--checkpoint", "m.bin", "m.bin") == 2
        err = capsys.readouterr().err
        assert "m.bin: images are resized in an unknown way" in err and err.count("\n") == 1


def test_a_resumed_run_keeps_its_recipe(workdir, monkeypatch, capsys):
    """Bit for bit, without the file it began with; the recipe is in its last save."""
    for split in ("train", "val"):
        write_images(Path("d", split), count=4, size=(90, 70))
    start = Pixels(ALIASED, "smaller_side", 0.6)
    write("m.bin", checkpoint_of(random_model(classes=2), ("a", "b"), pixels=start))
    flags = "--pretrained_dir m.bin --dataset folder --data_dir d --img_size 32 --num_workers 0 "
    flags += "--train_batch_size 4 --num_steps 4 --save_every 2 --eval_every 4 --warmup_steps 0 "
    flags = words(flags + "--augmentation resize_crop --flip --interpolation bicubic --name")
    write_run = checkpoint.write_run

    def keep(path, content):
        write_run(path, content)
        shutil.copy(path, f"{content['state']['step']}.pt")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_run", keep)
        assert run_command(train, *flags, "a") == 0
    Path("m.bin").unlink()
    torch.save(load_torch("2.pt") | {"pixels": {}}, "other.pt")
    assert run_command(train, *flags, "b", "--resume", "2.pt") == 0
    assert run_command(train, *flags, "c", "--resume", "other.pt") == 0
    assert capsys.readouterr().out.count("pixels: bicubic, smaller side to 53, central crop") == 2
    whole, again, other = (load_torch(f"output/{name}_checkpoint.bin") for name in "abc")
    assert Pixels(**whole["pixels"]) == Pixels("bicubic", "smaller_side", 0.6)
    assert whole["pixels"] == again["pixels"] != other["pixels"]
    assert all(torch.equal(x, again["model"][name]) for name, x in whole["model"].items())
    assert not torch.equal(whole["model"]["head.weight"], other["model"]["head.weight"])
    assert run_command(train, *flags, "d", "--resize", "40", "--resume", "2.pt") == 2
    assert "--resize 40 (was None)" in capsys.readouterr().err


WRONG = {"--resize 100 --img_size 384": "give it 384 to 3840 pixels"}
WRONG |= {"--resize 40 --crop_fraction 0.9": "give one of the two", "--resize big": "'big'"}


def test_flags(workdir, capsys):
    write_images(Path("d/test"), ("0", "1"), count=1, size=(90, 70))
    model = random_model(classes=2, std=0.3)
    write("m.bin", checkpoint_of(model, ("0", "1"), named=True))
    command = ["--checkpoint", "m.bin", "--num_workers", "0"]
    found = predicted(capsys, *command, *words("--interpolation bicubic --resize 40"))
    how = Decoding(pixels=Pixels("bicubic", "smaller_side", 0.8))
    for path in Path("d").rglob("*.png"):
        with torch.no_grad():
            wanted = model(to_input(path, model, how))[0].softmax(0).numpy()
        assert np.abs(found[path.name] - wanted).max() < 1e-5
    larger = words("--img_size 384 --resize 448 --dataset folder --data_dir d --name e")
    assert run_command(evaluate, *command, *larger) == 0
    line = "pixels: bilinear, smaller side to 448, central crop 384x384\n"
    assert line in capsys.readouterr().out
    size = (384, 384)
    assert PLAIN.changed(size, resize=448).window(70, 90, size)[1:] == ((448, 576), (32, 96))
    for text, message in WRONG.items():
        assert run_command(predict, *command, *words(text), "d") == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    flags = words("--name t --dataset digits --pretrained_dir m.bin --augmentation resize_crop")
    assert run_command(train, *flags) == 2
    assert "resize_crop crops nothing: give --resize" in capsys.readouterr().err


def test_a_side_in_pixels():
    """The resized image has exactly this side, whatever the rounding of the fraction."""
    for side in (224, 354, 375, 400, 404, 408, 2240):
        how = PLAIN.changed((224, 224), resize=side)
        assert how.window(500, 500, (224, 224)).whole == (side, side)
    for side in (223, 2241):
        with pytest.raises(UserError, match="224 to 2240 pixels"):
            PLAIN.changed((224, 224), resize=side)
    oblong = PLAIN.changed((32, 48), resize=40)
    assert oblong.crop_fraction == 0.8
    assert oblong.describe((32, 48)) == "bilinear, cover 40x60, central crop 32x48"
    assert library_recipe({"interpolation": "bilinear"}).crop_fraction == 0.875  # timm's default
    assert library_recipe({"resample": 3, "do_resize": False, "size": 300}) == PLAIN


def test_training_from_googles_files_antialiases():
    args = Namespace(img_size=32, augmentation="crop", interpolation=None, resize=None)
    args.crop_fraction, weights = None, checkpoint_of(random_model(), pixels=GOOGLE)
    assert train_pixels(args, None, weights) == train_pixels(args, None, None) == PLAIN
    args.interpolation = ALIASED
    assert train_pixels(args, None, weights) == GOOGLE


# -------------------------------------------------------------------------------- resize_crop


def test_crops_are_uniform_over_all_positions():
    """8 x 5 of them: 4,000 draws, 100 to each, with a deviation of 10."""
    draws = torch.rand(4000, DRAWS, generator=torch.Generator().manual_seed(0)).tolist()
    augment, how = Augmentation("resize_crop", (28, 28)), Pixels("bicubic", "smaller_side", 7 / 8)
    windows = [augment.window(row, how, 35, 32) for row in draws]
    assert {window[:2] for window in windows} == {((0, 0, 35, 32), (35, 32))}
    counts = Counter(window.corner for window in windows)
    assert {*counts} == {(top, left) for top in range(8) for left in range(5)}
    assert min(counts.values()) > 60 and max(counts.values()) < 140


@pytest.mark.parametrize("size", [(40, 56), (90, 70)], ids=["memory's way", "PyTorch's"])
def test_resize_crop_is_pillows_image_at_a_random_place(size, tmp_path):
    """From files and from memory; --flip mirrors some of the crops."""
    paths = write_images(tmp_path, count=4, size=size)
    indices, draws = global_batch(8, 7, 0, 8)
    h, w = NINE_TENTHS.window(size[1], size[0], (24, 20)).whole
    assert 0 < (draws[:, FLIP] < 0.5).sum() < 8
    for images in image_sets(paths, NINE_TENTHS):
        augment = Augmentation("resize_crop", (24, 20), flip=True)
        stream = TrainStream(images, augment, seed=7, batch_size=8, shard=Shard(), device=CPU)
        ours, _ = stream.prepare(next(stream.steps(0, 1))[0])
        for image, index, draw in zip(ours.permute(0, 2, 3, 1), indices, draws, strict=True):
            top, left = int(draw[TOP] * (h - 23)), int(draw[LEFT] * (w - 19))
            theirs = resized(paths[index], (h, w), "bicubic")[top : top + 24, left : left + 20]
            theirs = theirs[:, ::-1] if draw[FLIP] < 0.5 else theirs
            assert np.abs(image.numpy() * 127.5 + 127.5 - theirs).max() < 2.01


@pytest.mark.parametrize("turn", [False, True])
def test_only_the_middle_of_a_long_strip_is_resized(turn, tmp_path):
    """1 x 5000 pixels would become 248 x 1,240,000."""
    strip = (np.arange(5000) % 256).astype(np.uint8)[None, :, None].repeat(3, axis=2)
    middle = Image.fromarray(strip[:, 2492:2508]).resize((3968, 248), Image.Resampling.BICUBIC)
    wanted = np.asarray(middle)[12:236, 1872:2096].astype(float)
    if turn:
        strip, wanted = strip.swapaxes(0, 1), wanted.swapaxes(0, 1)
    assert sorted(NINE_TENTHS.window(*strip.shape[:2], (224, 224)).whole) == [248, 3968]
    Image.fromarray(strip).save(path := tmp_path / "a.png")
    for pixels in from_files_and_memory([path], (224, 224), NINE_TENTHS):
        assert np.abs(pixels[0] - wanted).max() < 1.01
