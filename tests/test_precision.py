"""The four levels, master weights, loss scaling, and updates that are skipped."""

import pytest
import torch
import torch.nn.functional as F

from models.modeling import VisionTransformer
from tests.helpers import tiny_config
from utils.precision import LEVELS, NonFiniteError, Precision


def model_and_batch():
    torch.manual_seed(0)
    model = VisionTransformer(tiny_config(), 32, 5)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model, torch.randn(8, 3, 32, 32), torch.randint(5, (8,))


def one_update(model, images, labels, precision, optimizer, max_norm=1.0, micro_batches=1):
    """An update as train.py makes it, but without its second try after an overflow."""
    for x, y in zip(images.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
        with precision.autocast():
            logits = model(x.to(precision.model_dtype))
        precision.backward(F.cross_entropy(logits.float(), y) / micro_batches)
    return precision.step(optimizer, max_norm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("level", LEVELS)
def test_levels_follow_float32(level, dtype):
    """Every level makes the float32 update, up to its own rounding; types are as they should be."""
    reference, images, labels = model_and_batch()
    model, _, _ = model_and_batch()
    plain = Precision(reference, "O0")
    one_update(
        reference, images, labels, plain, torch.optim.SGD(plain.parameters, lr=0.1, momentum=0.9)
    )
    precision = Precision(model, level, dtype)
    assert next(model.parameters()).dtype == (dtype if level in ("O2", "O3") else torch.float32)
    wanted = dtype if level == "O3" else torch.float32
    assert {p.dtype for p in precision.parameters} == {wanted}
    with precision.autocast():
        logits = model(images.to(precision.model_dtype))
    assert logits.dtype == (torch.float32 if level == "O0" else dtype)
    before = precision.state_dict()
    optimizer = torch.optim.SGD(precision.parameters, lr=0.1, momentum=0.9)
    while not one_update(model, images, labels, precision, optimizer)[1]:
        assert dtype == torch.float16  # 2**16 is too much for gradients of a batch this small
    moved = 0.0
    for name, parameter in precision.state_dict().items():
        assert parameter.dtype == torch.float32
        moved = max(moved, (parameter - before[name]).abs().max().item())
        assert (parameter - reference.state_dict()[name]).abs().max() < 0.01
    assert moved > 0.01
    dynamic = dtype == torch.float16 and level in ("O1", "O2")
    assert 2**13 <= precision.scale <= 2**16 if dynamic else precision.scale == 1.0


def test_masters_keep_what_bfloat16_would_lose():
    """1 - 1e-3 a thousand times is 1 in bfloat16, and 0 with float32 masters."""
    for level, end in (("O2", 0.0), ("O3", 1.0)):
        layer = torch.nn.Linear(1, 1, bias=False)
        layer.weight.data.fill_(1.0)
        precision = Precision(layer, level, torch.bfloat16)
        optimizer = torch.optim.SGD(precision.parameters, lr=1e-3)
        for _ in range(1000):
            precision.backward(layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
            precision.step(optimizer, 0.0)
        assert precision.state_dict()["weight"].item() == pytest.approx(end, abs=2e-3)
        assert layer.weight.item() == pytest.approx(end, abs=4e-3)


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_micro_batches_sum_to_the_whole_batch(level):
    whole, images, labels = model_and_batch()
    parts, _, _ = model_and_batch()
    states = []
    for model, count in ((whole, 1), (parts, 4)):
        precision = Precision(model, level, torch.bfloat16)
        optimizer = torch.optim.SGD(precision.parameters, lr=0.1)
        one_update(model, images, labels, precision, optimizer, micro_batches=count)
        states.append(precision.state_dict())
    limit = 1e-6 if level == "O0" else 2e-3
    assert max((states[0][k] - states[1][k]).abs().max() for k in states[0]) < limit


def test_masters_collect_micro_batches_in_float32():
    """256 + 1 + 1 is 256 in bfloat16."""
    layer = torch.nn.Linear(1, 1, bias=False)
    precision = Precision(layer, "O2", torch.bfloat16)
    for gradient in (256.0, 1.0, 1.0):
        precision.backward(layer(torch.full((1, 1), gradient, dtype=torch.bfloat16)).sum())
    assert precision.parameters[0].grad.item() == 258.0


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_loss_scale_is_honoured(level):
    """It multiplies what backward sees, and is taken out before clipping."""
    model, images, labels = model_and_batch()
    reference, _, _ = model_and_batch()
    seen = []
    norms = []
    for net, scale in ((reference, 0.0), (model, 128.0)):
        precision = Precision(net, level, torch.bfloat16, scale)
        logits = net(images.to(precision.model_dtype)).float()
        logits.register_hook(lambda grad: seen.append(grad.abs().sum().item()))
        precision.backward(F.cross_entropy(logits, labels))
        optimizer = torch.optim.SGD(precision.parameters, lr=0.1)
        norms.append(precision.step(optimizer, 1.0)[0].item())
    assert seen[1] == pytest.approx(128 * seen[0], rel=1e-4)
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_overflow_skips_the_update_and_halves_the_scale(level):
    model, images, labels = model_and_batch()
    precision = Precision(model, level, torch.float16)
    optimizer = torch.optim.SGD(precision.parameters, lr=0.1, momentum=0.9)
    before = precision.state_dict()
    precision.clean_updates = 7
    precision.backward(model(images.to(precision.model_dtype)).sum() * float("inf"))
    _, updated = precision.step(optimizer, 1.0)
    assert not updated and precision.scale == 2**15 and not optimizer.state
    assert precision.clean_updates == 0
    assert all(torch.equal(v, before[k]) for k, v in precision.state_dict().items())
    precision.scale = 2.0**8  # safe for this model
    for clean in (0, Precision.GROWTH_INTERVAL - 2, Precision.GROWTH_INTERVAL - 1):
        assert precision.scale == 2**8
        precision.clean_updates = clean
        assert one_update(model, images, labels, precision, optimizer)[1]
    assert precision.scale == 2**9 and precision.clean_updates == 0


def test_overflow_that_no_scale_can_cure_is_an_error():
    model, images, _ = model_and_batch()
    precision = Precision(model, "O1", torch.float16)
    optimizer = torch.optim.SGD(precision.parameters, lr=0.1)
    with pytest.raises(NonFiniteError, match="not finite at dynamic loss scale"):
        for _ in range(100):
            precision.backward(model(images).sum() * float("inf"))
            precision.step(optimizer, 1.0)
    static = Precision(model_and_batch()[0], "O1", torch.float16, loss_scale=64)
    static.backward(sum(p.sum() for p in static.parameters) * float("inf"))
    with pytest.raises(NonFiniteError, match="static loss scale 64"):
        static.step(torch.optim.SGD(static.parameters, lr=0.1), 1.0)


def test_what_is_captured_goes_on_elsewhere():
    first, second = (Precision(model_and_batch()[0], "O2", torch.float16) for _ in range(2))
    first.scale, first.clean_updates = 2.0**9, 1234
    first.parameters[0].fill_(0.25)
    second.restore(first.capture())
    assert (second.scale, second.clean_updates) == (2.0**9, 1234)
    assert second.parameters[0].eq(0.25).all() and second.model_parameters[0].eq(0.25).all()
    captured = first.capture()
    next(iter(captured["parameters"].values())).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        second.restore(captured)
    assert second.parameters[0].eq(0.25).all()


def test_clipping_is_global_and_can_be_off():
    model, images, labels = model_and_batch()
    precision = Precision(model)
    optimizer = torch.optim.SGD(precision.parameters, lr=1.0)
    for limit in (1e-3, 0.0):
        before = precision.state_dict()
        norm, _ = one_update(model, images, labels, precision, optimizer, max_norm=limit)
        after = precision.state_dict()
        moved = sum((after[k] - before[k]).square().sum() for k in after).sqrt().item()
        assert moved == pytest.approx(limit or norm.item(), rel=1e-3)
        assert norm > 0.01


def test_unknown_level():
    with pytest.raises(ValueError, match="'O4' is none of O0, O1, O2, O3"):
        Precision(torch.nn.Linear(1, 1), "O4")
