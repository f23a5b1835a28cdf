"""The stream is a pure function of (seed, step), in memory and from files."""

from itertools import chain

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from utils.augment import DRAWS, mix_pairs, normalize, resize
from utils.stream import (
    Augmentation,
    DataError,
    EvalStream,
    ImageSet,
    Slice,
    TrainStream,
    global_batch,
    read_image,
)

CPU = torch.device("cpu")


def memory_images(n=20, side=16):
    """Real pixels: tiles of a photograph; the label is the tile's number."""
    photo = torch.from_numpy(load_sample_image("flower.jpg").copy())
    tiles = photo.unfold(0, side, side).unfold(1, side, side).flatten(0, 1)  # (n, C, h, w)
    return ImageSet(torch.arange(n), tiles[100 : 100 + n].contiguous())


@pytest.fixture
def file_images(tmp_path):
    """The same tiles as lossless files."""
    images = memory_images()
    paths = []
    for i, pixels in enumerate(images.pixels):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(paths[-1])
    return ImageSet(images.labels, paths=tuple(paths))


def stream(images, part=None, workers=0, kind="crop+flip", seed=7, **mix):
    augmentation = Augmentation(kind, (24, 20), **mix)
    return TrainStream(images, augmentation, seed=seed, batch=8, part=part or Slice(), device=CPU,
                       workers=workers)  # fmt: skip


def batches(source, start, stop):
    return [[source.prepare(micro) for micro in update] for update in source.updates(start, stop)]


def global_images(sources, step):
    """The global batch of one update, put together from all processes' micro-batches."""
    parts = [batches(source, step, step + 1)[0] for source in sources]
    images = torch.cat([images for update in parts for images, _ in update])
    labels = torch.cat([labels for update in parts for _, labels in update])
    return images, labels


def test_every_pass_sees_every_image_once_in_a_new_order():
    seen = torch.cat([global_batch(20, 3, step, 8)[0] for step in range(5)])  # 40 = two passes
    first, second = seen[:20], seen[20:]
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(20))
    assert first.tolist() != second.tolist()


def test_depends_on_seed_and_step_only():
    indices, draws = global_batch(50, 3, 11, 8)
    global_batch(50, 3, 2, 8)  # whatever was asked before
    torch.manual_seed(0)
    again = global_batch(50, 3, 11, 8)
    assert torch.equal(indices, again[0]) and torch.equal(draws, again[1])
    for other in (global_batch(50, 4, 11, 8), global_batch(50, 3, 12, 8)):
        assert not torch.equal(draws, other[1])
    assert draws.shape == (8, DRAWS) and draws.min() >= 0 and draws.max() < 1


@pytest.mark.parametrize("where", ["memory", "files"])
def test_same_global_batch_whatever_the_processes_and_micro_batches(where, file_images):
    images = memory_images() if where == "memory" else file_images
    whole, labels = global_images([stream(images)], 3)
    assert whole.shape == (8, 3, 24, 20) and whole.abs().max() <= 1 and whole.std() > 0.1
    for world, micro in ((1, 4), (2, 1), (2, 2), (4, 2), (8, 1)):
        parts = [stream(images, Slice(rank, world, micro)) for rank in range(world)]
        assert len(next(iter(parts[0].updates(3, 4)))) == micro
        split, split_labels = global_images(parts, 3)
        assert torch.equal(labels, split_labels)
        assert (whole - split).abs().max() < 1e-6


@pytest.mark.parametrize("where", ["memory", "files"])
def test_mixed_pairs_stay_together(where, file_images):
    images = memory_images() if where == "memory" else file_images
    plain, _ = global_images([stream(images)], 3)
    whole, targets = global_images([stream(images, mixup=0.8, cutmix=1.0)], 3)
    assert targets.shape == (8, 20) and (whole - plain).abs().max() > 0.1
    parts = [stream(images, Slice(rank, 2, 2), mixup=0.8, cutmix=1.0) for rank in range(2)]
    split, split_targets = global_images(parts, 3)
    assert torch.equal(targets, split_targets) and (whole - split).abs().max() < 1e-6


@pytest.mark.parametrize("alphas", [{"mixup": 0.2}, {"cutmix": 0.5}], ids=str)
def test_each_mix_has_its_own_alpha(alphas):
    images = memory_images()
    plain, labels = global_images([stream(images)], 3)
    _, draws = global_batch(20, 7, 3, 8)
    wanted = mix_pairs(plain, labels, draws, classes=20, **({"mixup": 0, "cutmix": 0} | alphas))
    found = global_images([stream(images, **alphas)], 3)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_starting_later_is_the_same():
    source = stream(memory_images())
    late = batches(source, 4, 6)
    assert len(late) == 2
    for a, b in zip(batches(source, 0, 6)[4:], late, strict=True):
        assert torch.equal(a[0][0], b[0][0]) and torch.equal(a[0][1], b[0][1])


@pytest.mark.parametrize("kind", ["crop", "crop+flip", "none"])
def test_files_and_memory_give_the_same_pixels(kind, file_images):
    a = batches(stream(memory_images(), kind=kind), 2, 5)
    b = batches(stream(file_images, kind=kind, workers=2), 2, 5)
    for (x, labels), (y, file_labels) in zip(chain(*a), chain(*b), strict=True):
        assert torch.equal(labels, file_labels)
        assert (x - y).abs().max() * 127.5 < 1.01
        assert (x != y).float().mean() < 0.03


def test_an_update_can_be_prepared_again(file_images):
    for images in (memory_images(), file_images):
        source = stream(images)
        update = next(iter(source.updates(0, 2)))
        assert torch.equal(source.prepare(update[0])[0], source.prepare(update[0])[0])


def test_flip_belongs_to_its_recipe():
    plain, flipped = (batches(stream(memory_images(), kind=kind), 0, 1)[0][0][0]
                      for kind in ("crop", "crop+flip"))  # fmt: skip
    same = [(a - b).abs().max() < 1e-6 for a, b in zip(plain, flipped, strict=True)]
    mirror = [(a - b.flip(2)).abs().max() < 0.02 for a, b in zip(plain, flipped, strict=True)]
    assert all(s or m for s, m in zip(same, mirror, strict=True)) and 0 < sum(same) < 8


@pytest.mark.parametrize("where", ["memory", "files"])
@pytest.mark.parametrize("world", [1, 3, 20, 23])  # 23: three processes have nothing to do
def test_evaluation_sees_every_image_once(where, world, file_images):
    images = memory_images() if where == "memory" else file_images
    labels, shapes = [], set()
    whole = normalize(resize(memory_images().pixels, (24, 20)))
    for rank in range(world):
        source = EvalStream(images, (24, 20), batch=3, part=Slice(rank, world), device=CPU)
        seen = list(source)
        assert len(seen) == len(source)
        labels += [y for _, batch in seen for y in batch.tolist()]
        shapes |= {x.shape[1:] for x, _ in seen}
        for x, batch in seen:
            assert (x - whole[batch]).abs().max() * 127.5 < 1.01  # the label is the image's number
    assert sorted(labels) == list(range(20)) and shapes == {(3, 24, 20)}


def test_a_broken_file_is_named(file_images, tmp_path):
    whole = file_images.paths[0].read_bytes()
    file_images.paths[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"0\.png is not a readable image"):
        read_image(file_images.paths[0])
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"0\.png is not a readable image") as caught:
            batches(stream(file_images, workers=workers), 0, 3)
        assert "\n" not in str(caught.value)
