"""The four levels, master parameters, loss scaling, and steps that overflow."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.errors import RunError, UserError
from models.modeling import VisionTransformer
from tests.helpers import tiny_config
from utils import dist_util
from utils import precision as precision_module
from utils.background import host_copy
from utils.precision import LEVELS, Precision, build_precision


class Trainer:
    """A tiny model, a batch for it, and the parts of a step as in train.py."""

    def __init__(self, level="O0", dtype=torch.bfloat16, loss_scale=0.0, lr=0.1, momentum=0.0):
        torch.manual_seed(0)
        self.model = VisionTransformer(tiny_config(), 32, 5)
        nn.init.normal_(self.model.head.weight, std=0.1)
        self.images, self.labels = torch.randn(8, 3, 32, 32), torch.randint(5, (8,))
        self.precision = Precision(self.model, level, dtype, loss_scale)
        self.optimizer = torch.optim.SGD(self.precision.parameters, lr, momentum)

    def forward(self):
        with self.precision.autocast():
            return self.model(self.images.to(self.precision.model_dtype))

    def step(self, max_norm=1.0):
        """It is not retried after an overflow."""
        self.precision.backward(F.cross_entropy(self.forward().float(), self.labels))
        return self.precision.step(self.optimizer, max_norm)

    def weights(self):
        """All parameters in one vector."""
        return flat(self.precision.model_state_dict().values())


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def difference(a, b):
    return (a - b).abs().max().item()


def scalar_layer(level):
    """A linear layer with the single weight 1, and its precision."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    return layer, Precision(layer, level, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("level", LEVELS)
def test_levels_follow_float32(level, dtype):
    """Every level makes the float32 step, up to its own rounding, with the right dtypes."""
    reference, half = Trainer(momentum=0.9), Trainer(level, dtype, momentum=0.9)
    reference.step()
    parameter = next(half.model.parameters())
    assert parameter.dtype == (dtype if level in ("O2", "O3") else torch.float32)
    expected = dtype if level == "O3" else torch.float32
    assert {p.dtype for p in half.precision.parameters} == {expected}
    assert half.forward().dtype == (torch.float32 if level == "O0" else dtype)
    before = half.weights()
    # A scale of 2**16 is too much for the gradients of a batch this small.
    retries = next(i for i in range(20) if half.step()[1])
    assert retries == 0 or dtype == torch.float16
    after = half.weights()
    assert {p.dtype for p in half.precision.model_state_dict().values()} == {expected}
    assert difference(after, before) > 0.01 > difference(after, reference.weights())
    dynamic, scale = dtype == torch.float16 and level in ("O1", "O2"), half.precision.scale
    assert 2**13 <= scale <= 2**16 if dynamic else scale == 1.0


@pytest.mark.parametrize("level, end", [("O2", 0.0), ("O3", 1.0)])
def test_masters_keep_what_bfloat16_would_lose(level, end):
    """1 - 1e-3 a thousand times is 1 in bfloat16, and 0 with float32 masters."""
    layer, precision = scalar_layer(level)
    optimizer = torch.optim.SGD(precision.parameters, lr=1e-3)
    for _ in range(1000):
        precision.backward(layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
        precision.step(optimizer, 0.0)
    assert precision.model_state_dict()["weight"].item() == pytest.approx(end, abs=2e-3)
    assert layer.weight.item() == pytest.approx(end, abs=4e-3)


def test_masters_sum_micro_batches_in_float32():
    """256 + 1 + 1 is 256 in bfloat16."""
    layer, precision = scalar_layer("O2")
    for gradient in (256.0, 1.0, 1.0):
        precision.backward(layer(torch.full((1, 1), gradient, dtype=torch.bfloat16)).sum())
    assert precision.parameters[0].grad.item() == 258.0


@pytest.mark.parametrize("level", LEVELS)
def test_static_loss_scale(level):
    """It multiplies what backward sees, and is divided out before clipping."""
    seen, norms = [], []
    for scale in (0.0, 128.0):
        trainer = Trainer(level, loss_scale=scale)
        logits = trainer.forward().float()
        logits.register_hook(lambda grad: seen.append(grad.abs().sum().item()))
        trainer.precision.backward(F.cross_entropy(logits, trainer.labels))
        norms.append(trainer.precision.step(trainer.optimizer, 1.0)[0].item())
    assert seen[1] == pytest.approx(128 * seen[0], rel=1e-4)
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_overflow_skips_the_step_and_halves_the_scale(level):
    trainer = Trainer(level, torch.float16, momentum=0.9)
    before, precision = trainer.weights(), trainer.precision
    precision.clean_steps = 7
    precision.backward(trainer.forward().sum() * float("inf"))
    assert not precision.step(trainer.optimizer, 1.0)[1] and not trainer.optimizer.state
    assert precision.scale == 2**15 and precision.clean_steps == 0
    assert difference(trainer.weights(), before) == 0
    precision.scale = 2.0**8  # safe for this model
    for clean in (0, Precision.GROWTH_INTERVAL - 2, Precision.GROWTH_INTERVAL - 1):
        assert precision.scale == 2**8
        precision.clean_steps = clean
        assert trainer.step()[1]
    assert precision.scale == 2**9 and precision.clean_steps == 0


@pytest.mark.parametrize(
    "scale, message", [(0, "dynamic loss scale"), (64, "static loss scale 64")]
)
def test_overflow_at_every_scale_is_an_error(scale, message):
    layer = nn.Linear(1, 1)
    precision = Precision(layer, "O1", torch.float16, loss_scale=scale)
    optimizer = torch.optim.SGD(precision.parameters)
    with pytest.raises(RunError, match=f"gradients are not finite at {message}"):
        for _ in range(100):
            precision.backward(layer(torch.ones(1)).sum() * float("inf"))
            precision.step(optimizer, 1.0)


def test_state_dict_continues_in_another_model():
    first, second = (Trainer("O2", torch.float16).precision for _ in range(2))
    first.scale, first.clean_steps = 2.0**9, 1234
    first.parameters[0].fill_(0.25)
    second.load_state_dict(first.state_dict())
    assert (second.scale, second.clean_steps) == (2.0**9, 1234)
    assert second.parameters[0].eq(0.25).all() and second.model_parameters[0].eq(0.25).all()
    state = first.state_dict()
    state["parameters"][first.names[0]].view(-1)[0] = float("nan")
    state["parameters"][first.names[1]].fill_(7)
    with pytest.raises(UserError, match="not finite"):
        second.load_state_dict(state)
    assert not second.parameters[1].eq(7).any()
    del state["parameters"][first.names[0]]
    with pytest.raises(UserError, match="not those of this model"):
        second.load_state_dict(state)


def test_frozen_parameters_are_not_rounded():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False).fill_(1 / 3)
    precision = Precision(layer, "O2", torch.bfloat16)
    assert precision.names == ["weight"] and layer.bias.dtype == torch.bfloat16
    assert precision.model_state_dict()["bias"].tolist() == torch.full((2,), 1 / 3).tolist()


def test_the_norm_is_that_of_all_parameters():
    precision = Precision(nn.Linear(3, 2))
    precision.parameters[0].data.fill_(2.0)
    precision.parameters[1].data[:] = torch.tensor([4.0, 3.0])
    assert precision.norm().item() == pytest.approx(7)  # the root of 6 * 4 + 16 + 9
    precision.parameters[1].data[1] = float("nan")
    assert not precision.norm().isfinite()


def test_gradients_of_masters_are_sums_in_float32(monkeypatch):
    """Bit for bit, step by step; `average_gradients` takes the mean over all processes."""
    trainer, sums = Trainer("O2"), 0
    parameters, masters = trainer.precision.model_parameters, trainer.precision.parameters
    monkeypatch.setattr(dist_util, "world_size", lambda: 8)
    monkeypatch.setattr(dist_util, "all_reduce_sum", lambda total: total.mul_(2))
    for _ in range(2):
        for count in range(1, 4):
            trainer.images = torch.randn(8, 3, 32, 32)
            loss = F.cross_entropy(trainer.forward().float(), trainer.labels) / 3
            halves = torch.autograd.grad(loss, parameters, retain_graph=True)
            assert {half.dtype for half in halves} == {torch.bfloat16}
            sums = flat(halves).float() if count == 1 else sums + flat(halves).float()
            trainer.precision.backward(loss)
            assert torch.equal(flat([master.grad for master in masters]), sums)
            assert all(parameter.grad is None for parameter in parameters)
        assert not torch.equal(sums.bfloat16().float(), sums)
        trainer.precision.average_gradients()
        assert torch.equal(flat([master.grad for master in masters]), sums / 4)
        trainer.precision.step(trainer.optimizer, 1.0)


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_a_host_copy_of_a_state_stays_and_the_state_does_not(level):
    trainer = Trainer(level, momentum=0.9)
    state = trainer.precision.state_dict(), trainer.precision.model_state_dict()
    kept, before = host_copy(state), trainer.weights()
    trainer.step()
    after = trainer.weights()
    assert difference(before, after) > 0.01 and kept[0]["scale"] == 1.0
    for found, (first, second) in ((before, kept), (after, state)):
        for tensors in (first["parameters"], second):
            assert torch.equal(flat(tensors.values()), found)
            assert not any(tensor.requires_grad for tensor in tensors.values())


def test_build_precision_on_a_cpu(monkeypatch):
    monkeypatch.setattr(precision_module, "cpu_has_bfloat16", lambda: False)
    cases = {(False, "O2"): "", (True, "O2"): "", (True, "O1"): "O1 is many times slower"}
    for (bf16, level), note in cases.items():
        layer, cpu, notes = nn.Linear(1, 1), torch.device("cpu"), []
        precision = build_precision(layer, cpu, False, bf16, level, log=notes.append)
        assert precision.has_masters == (bf16 and level == "O2")
        assert precision.autocast_dtype == (torch.bfloat16 if level == "O1" else None)
        assert note in "".join(notes) and len(notes) == bool(note)


def test_clipping_is_global_and_can_be_off():
    trainer = Trainer(lr=1.0)
    for limit in (1e-3, 0.0):
        before = trainer.weights()
        norm, _ = trainer.step(max_norm=limit)
        moved = (trainer.weights() - before).norm().item()
        assert moved == pytest.approx(limit or norm.item(), rel=1e-3) and norm > 0.01
