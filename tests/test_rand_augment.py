"""RandAugment and random erasing against torchvision's v2, and in the training stream."""

from functools import partial
from itertools import product
from math import log

import pytest
import torch
from scipy.stats import kstest
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import v2

from tests.test_augment import noise, photographs
from tests.test_gpu import Watch
from tests.test_stream import CPU, batches, file_images, global_images, memory_images, stream  # noqa: F401
from utils import rand_augment
from utils.augment import (
    DRAWS,
    ERASE_LEFT,
    ERASE_TOP,
    ERASED,
    FLIP,
    OPERATIONS,
    TRIES,
    Augmentation,
)
from utils.rand_augment import AREAS, GREY, NAMES, RATIOS, SIGNED, _move, apply, erase_box, pick
from utils.seeds import named_seed
from utils.stream import Shard, global_batch

SIZES = [(33, 47), (24, 20), (1, 7), (2, 3), (70, 61)]
BOTH = {"rand_augment": (2, 9), "random_erasing": 0.5}
POLICIES = [{"rand_augment": (3, 12)}, {"random_erasing": 0.6}, BOTH]


def uniform(n, count=2, seed=0):
    """Rows of draws of `n` images with `count` operations, as plain numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, OPERATIONS + 2 * count, generator=generator).tolist()


def torchvisions(image, picked, magnitude):
    """An image (C, H, W) after one operation of torchvision's RandAugment."""
    theirs, name = v2.RandAugment(magnitude=magnitude), NAMES[picked // 2]
    values, signed = theirs._AUGMENTATION_SPACE[name]
    assert signed == (name in SIGNED)
    values = values(theirs.num_magnitude_bins, *image.shape[1:])
    value = 0.0 if values is None else float(values[magnitude])
    value = -value if picked % 2 else value
    return theirs._apply_image_or_video_transform(
        image, name, value, v2.InterpolationMode.NEAREST, theirs._fill
    )


def contents(size, channels):
    """A photograph, noise, a dark part of it, and one colour."""
    photo, grain = photographs(*size)[1], noise(*size)[0]
    return [x[:channels].contiguous() for x in (photo, grain, grain // 4 + 7, grain * 0 + 90)]


def every_case(size, channels):
    """Images (B, C, H, W) and the draws of one operation, each with either sign, mixed up."""
    places = product(range(len(NAMES)), (0.2, 0.7))
    places = [[(number + 0.5) / len(NAMES), sign] for number, sign in places]
    cases = list(product(contents(size, channels), places))
    order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(1))
    images, places = zip(*(cases[i] for i in order), strict=True)
    return torch.stack(images), places


@pytest.mark.parametrize("magnitude", [0, 9, 15, 20, 30])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_operations_are_torchvisions(size, channels, magnitude):
    """Bit for bit, in a batch as image by image."""
    (images, places), changed = every_case(size, channels), set()
    draws = [[0.0] * OPERATIONS + place for place in places]
    found = apply(images, draws, Augmentation("none", size, rand_augment=(1, magnitude)))
    for ours, image, place in zip(found, images, places, strict=True):
        wanted, name = torchvisions(image, pick(*place), magnitude), NAMES[pick(*place) // 2]
        assert torch.equal(ours, wanted), (name, place)
        if not torch.equal(wanted, image):
            changed.add(name)
    few = {"AutoContrast", "Equalize", "Solarize"} if magnitude == 0 else {*NAMES[1:]}
    assert min(size) < 3 or changed | {"Solarize"} == few - ({"Color"} if channels == 1 else set())


@pytest.mark.skipif(not torch.version.cuda, reason="PyTorch built without CUDA")
def test_a_gpu_is_never_waited_for(monkeypatch):
    """All operations after one copy. Fake tensors stand for a GPU's, and refuse to be read."""
    gpu, how = torch.device("cuda"), Augmentation("none", (24, 20), **BOTH)
    places = [[(i % 14 + 0.5) / 14, i // 14 / 2] for i in range(28)]
    draws = [[0.1] * OPERATIONS + place + place[::-1] for place in places]
    changes = rand_augment._changes(9, how.size, CPU)  # of real numbers
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # it has no fake form
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        moved = lambda each: partial(_move, each.args[0].to(gpu))  # noqa: E731
        moves = [getattr(each, "func", None) is _move for each in changes]
        changes = [moved(each) if a else each for a, each in zip(moves, changes, strict=True)]
        monkeypatch.setattr(rand_augment, "_changes", lambda *_: changes)
        images = torch.empty(28, 3, 24, 20, dtype=torch.uint8, device=gpu)
        watch.sent, watch.kernels = 0, []
        found = apply(images, draws, how)
    assert found.is_cuda and (found.shape, found.dtype) == (images.shape, torch.uint8)
    assert (sum(moves), watch.read) == (10, 0) and len(watch.kernels) < 200
    # AutoContrast gives two numbers to kernels, which counts as copies and is none.
    assert watch.sent == 1 + 2


def test_torchvision_has_the_same_operations():
    assert tuple(v2.RandAugment._AUGMENTATION_SPACE) == NAMES


def test_operations_follow_each_other():
    how, images = (
        Augmentation("none", (33, 47), rand_augment=(3, 12)),
        noise(33, 47).repeat(9, 1, 1, 1),
    )
    draws = uniform(18, 3)
    for ours, image, row in zip(apply(images, draws, how), images, draws, strict=True):
        for at in (OPERATIONS, OPERATIONS + 2, OPERATIONS + 4):
            image = torchvisions(image, pick(*row[at : at + 2]), 12)
        assert torch.equal(ours, image)


def test_operations_are_drawn_equally_often():
    n = 28000
    rows = torch.rand(n, 2, generator=torch.Generator().manual_seed(0)).tolist()
    picks = [pick(*row) for row in rows]
    counts = torch.tensor(picks).bincount(minlength=28).view(14, 2)
    for name, (positive, negative) in zip(NAMES, counts.tolist(), strict=True):
        assert abs(positive + negative - n / 14) < 180  # four standard deviations
        assert abs(negative - n / 28) < 130 if name in SIGNED else negative == 0
    assert abs(counts[1:10, 1].sum() - 9 * n / 28) < 320
    assert pick(0.0, 0.0) == 0 and pick(1 - 2**-24, 0.0) == 26  # the ends of what is drawn


@pytest.mark.parametrize("size", [(224, 224), (90, 200)])
def test_boxes_are_erased_as_by_torchvision(size):
    n = 3000
    rows = uniform(n)
    found = torch.tensor([erase_box(row, 1.0, *size) for row in rows])
    drawn = found[found[:, 2] > 0].double()
    top, left, height, width = drawn.T
    assert ((top >= 0) & (left >= 0) & (top + height <= size[0]) & (left + width <= size[1])).all()
    area, ratio = height * width / (size[0] * size[1]), height / width
    assert AREAS[0] * 0.95 < area.min() < 0.03 and 0.3 < area.max() < AREAS[1] * 1.02
    assert RATIOS[0] * 0.9 < ratio.min() < 0.35 and 2.5 < ratio.max() < RATIOS[1] * 1.1
    torch.manual_seed(0)
    theirs = [v2.RandomErasing(1.0).make_params([torch.zeros(1, *size)]) for _ in range(n)]
    theirs = torch.tensor([[each[key] for key in "ijhw"] for each in theirs])
    for column in range(4):
        assert kstest(drawn[:, column].numpy(), theirs[:, column].numpy()).pvalue > 1e-3
    share = sum(erase_box(row, 0.3, *size)[2] > 0 for row in rows) / n
    assert abs(share - 0.3) < 0.035 and not any(erase_box(row, 0.0, *size)[2] for row in rows)


def test_the_first_box_that_fits_is_taken():
    row = [0.5] * OPERATIONS
    row[ERASED], row[ERASE_TOP], row[ERASE_LEFT] = 0.0, 0.0, 1 - 2**-24
    row[DRAWS : DRAWS + TRIES] = [1 - 2**-24] * (TRIES - 1) + [0.0]
    row[DRAWS + TRIES : ERASED] = [1 - 2**-24] * (TRIES - 1) + [log(2 / 0.3) / log(11)]
    assert erase_box(row, 0.5, 100, 100) == (0, 90, 20, 10)  # the last; the others are 104 high
    row[DRAWS + TRIES - 1] = row[ERASED - 1] = 1 - 2**-24
    assert erase_box(row, 0.5, 100, 100) == (0, 0, 0, 0)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_what_is_erased_is_torchvisions(channels):
    images, draws = torch.randint(256, (64, channels, 29, 35), dtype=torch.uint8), uniform(64)
    found, erased = apply(images, draws, Augmentation("none", (29, 35), random_erasing=0.5)), 0
    for ours, image, row in zip(found, images, draws, strict=True):
        i, j, h, w = erase_box(row, 0.5, 29, 35)
        value = torch.tensor(GREY, dtype=torch.uint8)
        assert torch.equal(ours, v2.functional.erase(image, i, j, h, w, value) if h else image)
        erased += h > 0
    assert 16 < erased < 48


@pytest.mark.parametrize("size", [(33, 47), (112, 112)], ids=str)
def test_an_image_does_not_depend_on_its_batch(size):
    """Nor on the number of threads."""
    how, images, draws = (
        Augmentation("none", size, **BOTH),
        noise(*size).repeat(30, 1, 1, 1),
        uniform(60),
    )
    images = (images + torch.arange(60)[:, None, None, None]).byte()
    together, threads = apply(images, draws, how), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            alone = [apply(images[i : i + 1], draws[i : i + 1], how) for i in range(60)]
            assert torch.equal(together, torch.cat(alone))
    finally:
        torch.set_num_threads(threads)


def test_more_draws_leave_those_of_crops_as_they_are():
    plain = global_batch(50, 3, 11, 8)
    for how in (Augmentation("crop", (4, 4), **policy) for policy in POLICIES):
        indices, draws = global_batch(50, 3, 11, 8, None, how.policy_draws)
        assert torch.equal(indices, plain[0]) and torch.equal(draws[:, :DRAWS], plain[1])
        assert draws.shape[1] == OPERATIONS + 2 * (how.rand_augment or (0,))[0]
        more = [
            global_batch(50, *other, 8, None, how.policy_draws)[1] for other in ((3, 12), (4, 11))
        ]
        assert not any((draws[:, DRAWS:] == each[:, DRAWS:]).any() for each in more)
        assert not (draws[:, DRAWS : DRAWS + 2] == draws[:, :2]).any()
    assert Augmentation("crop", (4, 4)).policy_draws == 0


@pytest.mark.parametrize("source", ["memory", "files"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_stream_crops_mirrors_and_then_changes(policy, source, file_images):  # noqa: F811
    images = memory_images() if source == "memory" else file_images
    plain, found = stream(images), stream(images, **policy)
    pixels, labels = batches(plain, 3, 4)[0][0]
    changed, same = batches(found, 3, 4)[0][0]
    levels = (pixels * 127.5 + 127.5).round().byte()
    _, draws = global_batch(20, 7, 3, 8, None, found.augmentation.policy_draws)
    assert 0 < (draws[:, FLIP] < 0.5).sum() < 8
    wanted = apply(levels, draws.tolist(), found.augmentation)
    assert torch.equal((changed * 127.5 + 127.5).round().byte(), wanted)
    assert torch.equal(labels, same) and not torch.equal(levels, wanted)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("policy", [*POLICIES, {"mixup": 0.8, "cutmix": 1.0, **BOTH}], ids=str)
def test_files_and_memory_give_the_same_pixels(policy, num_workers, file_images):  # noqa: F811
    memory = batches(stream(memory_images(), **policy), 2, 5)
    files = batches(stream(file_images, num_workers=num_workers, **policy), 2, 5)
    for ((a, labels),), ((b, file_labels),) in zip(memory, files, strict=True):
        assert torch.equal(labels, file_labels) and a.std() > 0.1
        assert (a - b).abs().max() * 127.5 < 1.01
        assert (a != b).float().mean() < 1e-4


@pytest.mark.parametrize("source", ["memory", "files"])
def test_same_batch_for_all_processes_micro_batches_and_starts(source, file_images):  # noqa: F811
    images = memory_images() if source == "memory" else file_images
    policy = {"rand_augment": (6, 9), "random_erasing": 0.5}
    alone, labels = global_images([stream(images, **policy)], 3)
    for world_size, micro in ((1, 4), (2, 1), (2, 2), (8, 1)):
        shards = [Shard(rank, world_size, micro) for rank in range(world_size)]
        together, same = global_images([stream(images, shard, **policy) for shard in shards], 3)
        assert torch.equal(alone, together) and torch.equal(labels, same)
    late = stream(images, **policy)
    ((micro,),) = late.steps(3, 4)
    for again in (late.prepare(micro), late.prepare(micro), batches(late, 0, 4)[3][0]):
        assert torch.equal(alone, again[0]) and torch.equal(labels, again[1])


@pytest.mark.parametrize("source", ["memory", "files"])
def test_off_is_as_in_earlier_versions(source, file_images, monkeypatch):  # noqa: F811
    """These numbers are of the version before RandAugment."""
    images = memory_images() if source == "memory" else file_images
    monkeypatch.setattr(rand_augment, "apply", None)
    seeds = []
    spy = lambda *args: seeds.append(args[1]) or named_seed(*args)  # noqa: E731
    monkeypatch.setattr("utils.stream.named_seed", spy)
    place = torch.linspace(0, 1, 24 * 20, dtype=torch.float64).view(24, 20)
    rows = {"crop+flip": -16769.9977, "crop": -16769.9977, "none": -16721.5578}
    for kind, wanted in rows.items():
        mix = {"mixup": 0.8, "cutmix": 1.0, "flip": True} if kind == "crop" else {}
        found = torch.cat([step[0][0] for step in batches(stream(images, kind=kind, **mix), 0, 4)])
        assert (found * place).sum().item() == pytest.approx(wanted, abs=1e-2)
    assert {*seeds} == {"augment"}
