"""Class weights and balanced draws: exact counts, and the same loss however a batch is split."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from utils.augment import Augmentation
from utils.balance import balanced_draws, binary_cross_entropy, class_weights, cross_entropy
from utils.image_set import ImageSet
from utils.stream import Shard, TrainStream, global_batch

SIZES = (9, 2, 5, 1)  # of the classes: 17 images, so that an epoch cannot be divided by 4
LABELS = torch.arange(4).repeat_interleave(torch.tensor(SIZES))[
    torch.randperm(17, generator=torch.Generator().manual_seed(0))
]


def stream(balance, shard=None):
    """Images of 17 grey levels, which tell one from another."""
    pixels = torch.arange(17, dtype=torch.uint8)[:, None, None, None].expand(17, 3, 4, 4)
    options = {"shard": shard or Shard(), "device": torch.device("cpu"), "balance": balance}
    images = ImageSet(LABELS, pixels.contiguous())
    return TrainStream(images, Augmentation("none", (4, 4)), seed=3, batch_size=8, **options)


MEMBERS = stream("sampling").members


def test_weights_are_scikit_learn_s():
    weights, labels = class_weights(LABELS), LABELS.numpy()
    theirs = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    assert weights.tolist() == pytest.approx(theirs.tolist(), rel=1e-6)
    assert weights[LABELS].mean().item() == pytest.approx(1, rel=1e-6)


def batch(mixed, seed=1):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, 4, generator=generator, requires_grad=True)
    soft = torch.rand(12, 4, generator=generator).softmax(1)
    return logits, soft if mixed else LABELS[:12]


@pytest.mark.parametrize("mixed", [False, True], ids=["labels", "mixed"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_binary_cross_entropy_is_its_formula(mixed, smoothing):
    """-t log sigmoid(z) - (1 - t) log(1 - sigmoid(z)), the mean over images and classes."""
    weights, (logits, labels) = class_weights(LABELS), batch(mixed)
    if mixed:  # as CutMix makes them: two classes, or one
        labels = F.one_hot(LABELS[:12], 4) * 0.75 + F.one_hot(LABELS[:12].roll(1), 4) * 0.25
    targets = (labels > 0).double() if mixed else F.one_hot(labels, 4).double()
    targets = targets * (1 - smoothing) + smoothing / 4
    p = logits.double().sigmoid()
    losses = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean(dim=1)
    found = binary_cross_entropy(logits, labels, None, smoothing)
    assert found.item() == pytest.approx(losses.mean().item(), rel=1e-6)
    shares = labels.float() if mixed else F.one_hot(labels, 4).float()
    weighted = (losses * (shares @ weights)).mean().item()
    found = binary_cross_entropy(logits, labels, weights, smoothing)
    assert found.item() == pytest.approx(weighted, rel=1e-6)


@pytest.mark.parametrize("mixed", [False, True], ids=["labels", "mixed"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_micro_batches_have_the_loss_of_the_batch(mixed, smoothing):
    """And its gradient. Each class's part of the cross entropy has the weight of the class."""
    weights, (logits, labels) = class_weights(LABELS), batch(mixed)
    loss = cross_entropy(logits, labels, weights, smoothing)
    targets = labels if mixed else F.one_hot(labels, 4).float()
    targets = (1 - smoothing) * targets + smoothing / 4
    by_hand = -(weights * targets * logits.log_softmax(1)).sum() / 12
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert abs(loss.item() - cross_entropy(logits, labels, None, smoothing).item()) > 0.01
    parts = [(logits[i : i + 3], labels[i : i + 3]) for i in range(0, 12, 3)]
    mean = sum(cross_entropy(*part, weights, smoothing) for part in parts) / 4
    assert mean.item() == pytest.approx(loss.item(), rel=1e-6)
    wanted, found = (torch.autograd.grad(each, logits)[0] for each in (loss, mean))
    assert (wanted - found).abs().max() < 1e-7


@pytest.mark.parametrize("mixed", [False, True], ids=["labels", "mixed"])
def test_without_weights_the_loss_is_torch_s_to_the_bit(mixed):
    logits, labels = batch(mixed)
    wanted = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert cross_entropy(logits, labels, None, 0.1).item() == wanted.item()


def test_every_class_has_its_exact_share_of_every_epoch():
    counts = torch.stack([LABELS[balanced_draws(MEMBERS, 3, e)].bincount() for e in range(8)])
    assert counts.sum(1).tolist() == [17] * 8
    assert counts.min() == 4 and counts.max() == 5
    for epochs, total in enumerate(counts.cumsum(0), start=1):
        exact = epochs * 17 / 4
        assert {*total.tolist()} <= {int(exact), -int(-exact // 1)}
    assert counts.argmax(1)[:5].tolist() == [0, 1, 2, 3, 0]  # the 17th draw goes around


def test_every_image_of_a_class_is_drawn_equally_often():
    """Within an epoch, over its border, and after many epochs."""
    total = torch.zeros(17, dtype=torch.int64)
    for epoch in range(9):
        total += balanced_draws(MEMBERS, 3, epoch).bincount(minlength=17)
        for images in MEMBERS:
            assert total[images].max() - total[images].min() <= 1
    assert [total[images].sum().item() for images in MEMBERS] == [39, 38, 38, 38]


def test_a_class_is_drawn_in_new_orders():
    large = [balanced_draws(MEMBERS, 3, epoch)[:4] for epoch in range(18)]
    assert len({tuple(order.tolist()) for order in large}) > 9
    assert not torch.equal(balanced_draws(MEMBERS, 3, 0), balanced_draws(MEMBERS, 4, 0))


def test_batches_are_parts_of_shuffled_balanced_epochs():
    """Whichever is asked for first. The draws of augmentations are those of plain batches."""
    late, _ = global_batch(17, 3, 4, 8, MEMBERS)
    batches = [global_batch(17, 3, step, 8, MEMBERS) for step in range(5)]
    assert torch.equal(batches[4][0], late)
    seen = torch.cat([indices for indices, _ in batches])
    for epoch in (0, 1):
        draws, own = balanced_draws(MEMBERS, 3, epoch), seen[17 * epoch : 17 * (epoch + 1)]
        assert own.sort().values.tolist() == draws.sort().values.tolist()
        assert own.tolist() != draws.tolist()
    plain, draws = global_batch(17, 3, 4, 8)
    assert torch.equal(draws, batches[4][1]) and not torch.equal(plain, late)


def test_the_balanced_draws_of_earlier_versions():
    """An old run can only be repeated if these very numbers stay."""
    assert global_batch(17, 3, 11, 8, MEMBERS)[0].tolist() == [12, 2, 1, 14, 3, 15, 1, 0]


@pytest.mark.parametrize("balance", ["none", "sampling"])
def test_the_same_global_batch_for_all_processes_and_micro_batches(balance):
    members = MEMBERS if balance == "sampling" else None
    wanted = torch.cat([global_batch(17, 3, step, 8, members)[0] for step in (2, 3)])
    for world_size, micro in ((1, 1), (1, 4), (2, 1), (2, 2)):
        found = [[], []]
        for rank in range(world_size):
            source = stream(balance, Shard(rank, world_size, micro))
            for step, parts in zip(found, source.steps(2, 4), strict=True):
                step += [source.prepare(part) for part in parts]
        images, labels = map(torch.cat, zip(*found[0], *found[1], strict=True))
        levels = (images[:, 0, 0, 0] * 127.5 + 127.5).round().long()
        assert torch.equal(levels, wanted) and torch.equal(labels, LABELS[wanted])


def test_only_the_balance_of_the_loss_has_weights():
    assert stream("none").class_weights is None and stream("sampling").class_weights is None
    assert torch.equal(stream("loss").class_weights, class_weights(LABELS))
    assert stream("loss").members is None and stream("none").members is None
