"""A training step on a GPU, as far as it can be checked without one.

PyTorch's fake tensors know devices, shapes and dtypes. They refuse to be read, and a read would
make the host wait for the GPU.
"""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import train
from models import modeling, modeling_resnet
from models.cpu import FASTER, use_cpu_kernels
from models.modeling import VisionTransformer
from tests.helpers import tiny_config
from utils.augment import DRAWS, Augmentation
from utils.image_set import ImageSet
from utils.metrics import predict_dataset
from utils.precision import Precision
from utils.stream import EvalStream, TrainStream

pytestmark = pytest.mark.skipif(not torch.version.cuda, reason="PyTorch built without CUDA")
GPU = torch.device("cuda")
IMAGES = ImageSet(torch.zeros(16).long(), torch.zeros(16, 3, 16, 16).byte())

# Real tensors, whose numbers the CPU may read: the draws of each micro-batch.
ZEROS = {count: torch.zeros(8, DRAWS).chunk(count) for count in (1, 2)}


class Model(VisionTransformer):
    def init_weights(self):
        pass

    def to(self, dtype):
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)


def gpu_model(**changes) -> Model:
    with GPU:
        return Model(tiny_config(**changes), 32, 10)


class Stream(TrainStream):
    def __init__(self, micro_batches):
        self.images, self.device, self.classes = IMAGES.to(GPU), GPU, 10
        self.augmentation, self.class_weights = Augmentation("crop+flip", (32, 32)), None
        pairs = zip(torch.arange(8).chunk(micro_batches), ZEROS[micro_batches], strict=True)
        self.micro_batches = [(*pair, None) for pair in pairs]


def backward(loss):
    """PyTorch's own needs a real device: give zero gradients to every parameter of the graph."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaf = node.variable
            leaf.grad = torch.zeros_like(leaf) + (0 if leaf.grad is None else leaf.grad)
        nodes += [next_node for next_node, _ in node.next_functions]


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch):
    for module in (modeling, modeling_resnet):  # it reads values
        monkeypatch.setattr(module, "lecun_normal_", lambda weight: None)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def make_step(level, dtype, micro_batches=1, checkpointing=False, kernels=False, **changes):
    model = gpu_model(dropout_rate=0.1, **changes)
    for module in model.transformer.modules() if kernels else ():  # as if moved from a CPU
        module.__class__ = FASTER.get(type(module), type(module))
    model.transformer.encoder.grad_checkpointing = checkpointing
    precision, stream = Precision(model, level, dtype), Stream(micro_batches)
    optimizer = torch.optim.SGD(precision.parameters, 0.1, 0.9)  # the fused one has no fake form
    args = Namespace(seed=0, label_smoothing=0.1, max_grad_norm=1.0)
    run = Namespace(args=args, state=Namespace(step=0), precision=precision, optimizer=optimizer)
    loss, norm, stepped = train.update(run, model, stream, stream.micro_batches)
    assert loss.device.type == norm.device.type == "cuda" and stepped
    assert all(p.device.type == "cuda" for p in (*precision.parameters, *model.parameters()))
    return model


HYBRID = {"resnet_layers": (1,)}
KINDS = [{}, {"classifier": "gap"}, HYBRID, {"micro_batches": 2}, {"checkpointing": True}]


@pytest.mark.parametrize("changes", [*KINDS, {"kernels": True, **HYBRID}], ids=str)
@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
def test_a_step_in_bfloat16_never_waits(level, changes):
    model = make_step(level, torch.bfloat16, **changes)
    dtype = torch.bfloat16 if level in ("O2", "O3") else torch.float32
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("kernels", [False, True])
def test_attention_is_pytorchs_but_never_cudnns(kernels, monkeypatch):
    """Also for the single query of the last block, and after a move from a CPU."""
    plain, queries = F.scaled_dot_product_attention, []

    def spy(q, *rest, **options):
        queries.append(q.shape[-2])
        return plain(q, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    make_step("O2", torch.bfloat16, kernels=kernels)
    assert queries == [17, 1]
    assert not torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cudnn.allow_tf32


def test_a_model_on_a_gpu_gets_no_cpu_kernels():
    model = use_cpu_kernels(gpu_model())
    assert not {type(module) for module in model.modules()} & set(FASTER.values())


def test_float16_reads_once_whether_it_overflowed():
    with pytest.raises(DataDependentOutputException) as caught:
        make_step("O2", torch.float16)
    statements = [str(entry.statement).strip() for entry in caught.traceback]
    assert "finite = not self.scales or bool(torch.isfinite(norm))" in statements
    make_step("O3", torch.float16)  # without loss scaling


def test_an_evaluation_reads_nothing_before_its_end():
    model = gpu_model().eval()
    stream = EvalStream(IMAGES, (32, 32), batch_size=5, device=GPU)
    assert len(predict_dataset(model, stream, Precision(model)).prediction) == 16
