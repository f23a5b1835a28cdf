"""An update on a GPU, as far as it can be seen without one: PyTorch's fake tensors know devices,
shapes and types, and refuse to be asked for a value, which would make the host wait.
"""

from argparse import Namespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import train
from models import modeling, modeling_resnet
from models.modeling import VisionTransformer
from tests.helpers import tiny_config
from utils.augment import DRAWS
from utils.precision import Precision
from utils.report import measure
from utils.stream import Augmentation, EvalStream, ImageSet, Slice, TrainStream

pytestmark = pytest.mark.skipif(not torch.version.cuda, reason="PyTorch built without CUDA")
GPU = torch.device("cuda")
IMAGES = ImageSet(torch.zeros(16).long(), torch.zeros(16, 3, 16, 16).byte())


class Model(VisionTransformer):
    def init_weights(self):
        pass

    def to(self, dtype):
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)


class Stream(TrainStream):
    def __init__(self, micro_batches):
        self.images, self.device, self.classes = IMAGES.to(GPU), GPU, 10
        self.augmentation = Augmentation("crop+flip", (32, 32))
        parts = (part.chunk(micro_batches) for part in (torch.arange(8), torch.zeros(8, DRAWS)))
        self.micro_batches = list(zip(*parts, strict=True))


def backward(loss):
    """PyTorch's own asks for a real device: gradients of zeros, of everything that took part."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaf = node.variable
            leaf.grad = torch.zeros_like(leaf) + (0 if leaf.grad is None else leaf.grad)
        nodes += [after for after, _ in node.next_functions]


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    for module in (modeling, modeling_resnet):  # which asks for values
        monkeypatch.setattr(module, "lecun_normal_", lambda weight: None)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def update(level, dtype, micro_batches=1, checkpointing=False, **changes):
    args = Namespace(seed=0, label_smoothing=0.1, max_grad_norm=1.0)
    with GPU:
        model = Model(tiny_config(dropout_rate=0.1, **changes), 32, 10)
    model.transformer.encoder.grad_checkpointing = checkpointing
    precision = Precision(model, level, dtype)
    stream = Stream(micro_batches)
    optimizer = torch.optim.SGD(precision.parameters, 0.1, 0.9)  # the fused one has no fake form
    loss, norm, updated = train.update(args, 0, model, stream, stream.micro_batches, precision,
                                       optimizer)  # fmt: skip
    assert loss.device.type == norm.device.type == "cuda" and updated
    assert all(p.device.type == "cuda" for p in (*precision.parameters, *model.parameters()))
    return model


@pytest.mark.parametrize("changes", [{}, {"classifier": "gap"}, {"resnet_layers": (1,)},
                                     {"micro_batches": 2}, {"checkpointing": True}])  # fmt: skip
@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
def test_an_update_never_waits_in_bfloat16(level, changes):
    model = update(level, torch.bfloat16, **changes)
    half = torch.bfloat16 if level in ("O2", "O3") else torch.float32
    assert {p.dtype for p in model.parameters()} == {half}


def test_the_class_token_s_query_is_not_left_to_a_fused_kernel(monkeypatch):
    plain, queries = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *rest, **how:
                        queries.append(q.shape[-2]) or plain(q, *rest, **how))  # fmt: skip
    update("O2", torch.bfloat16)
    assert queries == [17] and not torch.backends.cudnn.allow_tf32


def test_float16_asks_once_whether_it_overflowed():
    with pytest.raises(DataDependentOutputException) as caught:
        update("O2", torch.float16)
    assert "finite = not self.scales or bool(torch.isfinite(norm))" in [
        str(entry.statement).strip() for entry in caught.traceback]  # fmt: skip
    update("O3", torch.float16)  # not scaled


def test_an_evaluation_asks_for_nothing_before_its_end():
    with GPU:
        model = Model(tiny_config(), 32, 10).eval()
    stream = EvalStream(IMAGES, (32, 32), batch=5, part=Slice(), device=GPU)
    assert len(measure(model, stream).guess) == 16
