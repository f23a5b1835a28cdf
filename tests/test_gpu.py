"""A training step on a GPU, as far as it can be checked without one.

PyTorch's fake tensors know devices, shapes and dtypes. They refuse to be read, and a read would
make the host wait for the GPU. They stand for an Apple GPU too, which has no float64: its own need
another PyTorch.
"""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from models import modeling, modeling_resnet
from models.cpu import FASTER, use_cpu_kernels
from models.modeling import VisionTransformer
from models.pixels import PLAIN
from tests.helpers import tiny_config
from utils import attention, augment
from utils.augment import DRAWS, Augmentation
from utils.crop_table import CropTable
from utils.drop_path import DropPath
from utils.image_set import ImageSet
from utils.metrics import predict_dataset
from utils.precision import Precision
from utils.stream import EvalStream, TrainStream

pytestmark = pytest.mark.skipif(not torch.version.cuda, reason="PyTorch built without CUDA")
GPU = torch.device("cuda")
IMAGES = ImageSet(torch.zeros(16).long(), torch.zeros(16, 3, 16, 16).byte())

NO_WORK = {"view", "_unsafe_view", "transpose", "expand", "slice", "split_with_sizes", "detach"}
NO_WORK |= {"empty"}  # memory that is not filled; the others are views

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


class Watch(TorchDispatchMode):
    """Counts copies to and from the GPU, notes what else it does, and forbids float64 on it."""

    def __init__(self):
        super().__init__()
        self.sent, self.read, self.kernels = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        leaves = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        assert not any(x.is_cuda and x.dtype == torch.float64 for x in leaves), name
        made = {x.device.type for x in leaves}
        leaves = tree_leaves((args, kwargs))
        taken = {x.device.type for x in leaves if isinstance(x, torch.Tensor)}
        self.sent += "cuda" in made and "cpu" in taken
        self.read += "cuda" in taken and "cpu" in made
        if made == {"cuda"} and "cpu" not in taken and name not in NO_WORK:
            self.kernels.append(name)
        return out


class Stream(TrainStream):
    def __init__(self, micro_batches):
        self.images, self.device, self.classes = IMAGES.to(GPU), GPU, 10
        self.augmentation, self.class_weights = Augmentation("crop+flip", (32, 32)), None
        self.crops = CropTable(self.augmentation, PLAIN, (16, 16), GPU)
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
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # it has no fake form
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        yield watch
    augment._window_weights.cache_clear()


def make_step(
    level, dtype, micro_batches=1, checkpointing=False, kernels=False, scale=0, ema=0.0, **changes
):
    """With `ema` also with stochastic depth."""
    model = gpu_model(dropout_rate=0.1, **changes)
    for module in model.transformer.modules() if kernels else ():  # as if moved from a CPU
        module.__class__ = FASTER.get(type(module), type(module))
    model.transformer.encoder.grad_checkpointing = checkpointing
    precision, stream = Precision(model, level, dtype, scale, ema), Stream(micro_batches)
    stream.dtype = precision.model_dtype
    optimizer = torch.optim.SGD(precision.parameters, 0.1, 0.9)  # the fused one has no fake form
    args = Namespace(seed=0, label_smoothing=0.1, max_grad_norm=1.0, loss="ce")
    sizes = (model.config.num_layers, 0, 0, 8)
    paths = DropPath(0.5, *sizes, torch.device("cuda"), precision.model_dtype) if ema else None
    made = {"precision": precision, "optimizer": optimizer, "drop_path": paths}
    run = Namespace(args=args, state=Namespace(step=0), **made)
    loss, norm, stepped = train.update(run, model, stream, stream.micro_batches)
    assert loss.device.type == norm.device.type == "cuda" and stepped
    assert all(p.device.type == "cuda" for p in (*precision.parameters, *model.parameters()))
    return model


HYBRID = {"resnet_layers": (1,)}
KINDS = [{}, {"classifier": "gap"}, HYBRID, {"micro_batches": 2}, {"checkpointing": True}]
KINDS += [{"ema": 0.9}, {"ema": 0.9, "micro_batches": 2}]


@pytest.mark.parametrize("changes", [*KINDS, {"kernels": True, **HYBRID}], ids=str)
@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
def test_a_step_in_bfloat16_never_waits(level, changes, fake_gpu):
    """The stream sends its pixels and two tables, then one piece for each micro-batch, and one
    more with the factors of stochastic depth."""
    model = make_step(level, torch.bfloat16, **changes)
    pieces = (1 + ("ema" in changes)) * changes.get("micro_batches", 1)
    assert (fake_gpu.sent, fake_gpu.read) == (3 + pieces, 0)
    dtype = torch.bfloat16 if level in ("O2", "O3") else torch.float32
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_micro_batch_is_one_copy_and_few_kernels(dtype, fake_gpu):
    """Look up pixels and weights, convert, two products that are rounded, and normalise."""
    stream = Stream(1)
    stream.dtype, fake_gpu.kernels, fake_gpu.sent = dtype, [], 0
    images, labels = stream.prepare(stream.micro_batches[0])
    assert (images.shape, images.dtype) == ((8, 3, 32, 32), dtype) and labels.is_cuda
    assert len(fake_gpu.kernels) <= 12, fake_gpu.kernels
    assert {"index", "embedding", "bmm"} < {*fake_gpu.kernels}
    assert (fake_gpu.sent, fake_gpu.read) == (1, 0)


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
    make_step("O2", torch.float16, scale=1)


@pytest.mark.parametrize("batch_size", [5, 16])
def test_an_evaluation_reads_once_at_its_end(batch_size, fake_gpu):
    """And sends twice to begin with, then where the predictions belong."""
    model = gpu_model().eval()
    stream = EvalStream(IMAGES, (32, 32), batch_size=batch_size, device=GPU)
    precision, fake_gpu.sent = Precision(model, "O2", torch.float16), 0
    assert len(predict_dataset(model, stream, precision, keep=10).prediction) == 16
    assert (fake_gpu.sent, fake_gpu.read) == (3, 1)


def test_attention_maps_stay_on_the_gpu(monkeypatch, fake_gpu):
    monkeypatch.setattr(torch.autograd, "grad", lambda score, outs: [*map(torch.zeros_like, outs)])
    model, images = gpu_model(), torch.zeros(2, 3, 32, 32)
    found = [attention.rollout(model, images, discard=0.5, patch=3)]
    found += [attention.gradient_rollout(model, images, [1, 2])]
    assert all(maps.is_cuda for maps in found) and fake_gpu.read == 0
