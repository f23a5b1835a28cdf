"""One implementation in a process of its own, which makes steps when it is asked to.

Training is train.py's own `update`, for everybody: SGD, momentum, clipping and master weights are
the same; the model differs, the fused optimizer is ours' and `timm best`'s only, and `port` has a
level of mixed precision of its own (O1).
"""

import math
import multiprocessing
import re
import sys
import time
import traceback
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

import train
from benchmarks.peers import BUILDERS, PeerError, pil_batches
from models import cpu, modeling
from models.configs import ViTConfig
from models.modeling import VisionTransformer
from utils.allocator import keep_freed_memory, out_of_memory
from utils.precision import Precision
from utils.stream import Augmentation, ImageSet, Slice, TrainStream

CLASSES = 10
ROWS = ("ours", "timm", "timm best", "transformers", "torchvision", "port")
EXTRAS = ("allocator", "checkpointing", "channels_last")  # `ours + checkpointing`, say
RESET_PEAK = Path("/proc/self/clear_refs")  # Linux
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ------------------------------------------------------------------ levers, one off at a time


def full_last_block(self, images, keep=None):
    return self.encoder(self.embeddings(images))[:, :keep]


def fused_attention(q, k, v, p):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p)


def plain_gelu(x, dense, approximate):
    return F.gelu(dense(x), approximate=approximate)


# lever -> (object, attribute, what stands there when the lever is off)
LEVERS = {
    "last block": (modeling.Transformer, "forward", full_last_block),
    "attention": (modeling, "attend", fused_attention),
    "dense": (cpu, "ONEDNN_DTYPES", set()),
    "widened": (cpu, "WIDENED", set()),
    "gelu": (modeling, "dense_gelu", plain_gelu),
    "dropout": (modeling, "dropout", F.dropout),
    "allocator": None,
    "fused optimizer": None,
    "compile": None,
}


class FixedStream:
    """A stream that has nothing to do."""

    def __init__(self, images, labels):
        self.batch = images, labels

    def prepare(self, micro):
        return self.batch


class PeerStream:
    """The peers' path: Pillow in workers, then a copy to the device."""

    def __init__(self, batches, device):
        self.batches, self.device = batches, device

    def prepare(self, micro):
        return [x.to(self.device, non_blocking=True) for x in next(self.batches)]


class Quiet:
    @staticmethod
    def bar(batches, **_):
        return batches


def tiles(count: int = 2048) -> ImageSet:
    """Real 32x32 pixels: tiles of the two photographs that come with scikit-learn."""
    from sklearn.datasets import load_sample_images

    photos = [torch.from_numpy(photo.copy()) for photo in load_sample_images().images]
    pixels = torch.cat([p.unfold(0, 32, 16).unfold(1, 32, 16).flatten(0, 1) for p in photos])
    pixels = pixels.repeat(-(-count // len(pixels)), 1, 1, 1)[:count].contiguous()
    return ImageSet(torch.arange(count) % CLASSES, pixels)  # (n, C, h, w)


def same_work(name: str, peer, load, ours: VisionTransformer, size: int) -> float:
    """Give `peer` our weights; its largest difference in logits, relative to the largest logit.

    Raises PeerError where it has another count of parameters or other logits.
    """
    count, wanted = (sum(p.numel() for p in m.parameters()) for m in (peer, ours))
    if count != wanted:
        raise PeerError(f"{name} has {count} parameters where ours has {wanted}")
    load(peer, ours)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = ours.eval()(images), peer.eval()(images)
    difference = ((a - b).abs().max() / a.abs().max()).item()
    # timm standardises a hybrid's weights by sqrt(var + eps).
    if not difference < (1e-4 if ours.config.resnet_layers is None else 1e-2):
        raise PeerError(f"{name} differs from our logits by {difference:.1e} of the largest")
    return difference


class Row:
    """One implementation, ready to make steps. `name` is of ROWS, `ours - <lever>`, or
    `<row> + <extra>`, of EXTRAS."""

    def __init__(self, name: str, options: Namespace, config: ViTConfig):
        self.options, self.device = options, torch.device(options.device)
        torch.set_num_threads(options.threads)
        who, _, off = name.partition(" - ")
        who, _, extra = who.partition(" + ")
        self.is_ours = who == "ours"
        if off and LEVERS[off]:
            setattr(*LEVERS[off])
        best = who == "timm best" or self.is_ours
        if who == "timm best":
            from timm.layers import set_fast_norm

            set_fast_norm(True)

        torch.manual_seed(0)
        model = VisionTransformer(config, options.img_size, CLASSES).float()
        for parameter in (model.head.weight, model.transformer.embeddings.cls_token):
            torch.nn.init.normal_(parameter, std=0.1)
        self.difference = 0.0
        if not self.is_ours:
            build, load = BUILDERS[who.removesuffix(" best")]
            peer = build(config, options.img_size, CLASSES, config.dropout_rate)
            self.difference = same_work(who, peer, load, model, options.img_size)
            model = peer
        if extra == "checkpointing":
            model.transformer.encoder.grad_checkpointing = True
        elif extra == "channels_last":
            model = model.to(memory_format=torch.channels_last)
        model = self.model = model.to(self.device).train()
        level = "O0" if options.precision == "fp32" else "O1" if who == "port" else options.level
        self.precision = Precision(model, level, DTYPES[options.precision])
        if off == "fused optimizer" or not best:
            self.optimizer = torch.optim.SGD(self.precision.parameters, lr=1e-3, momentum=0.9)
        else:
            flags = Namespace(learning_rate=1e-3, weight_decay=0.0, optimizer="sgd", apex=False)
            self.optimizer = train.build_optimizer(flags, self.precision, self.device)
        compiled = options.compile == "on" and best and off != "compile"
        self.shared = torch.compile(model, dynamic=False) if compiled else model
        self.step = 0
        self.images = tiles()
        micro = options.batch // options.accumulate
        images = torch.randn(micro, 3, options.img_size, options.img_size)
        if extra == "channels_last":
            images = images.contiguous(memory_format=torch.channels_last)
        self.fixed = images.to(self.device), torch.randint(CLASSES, (micro,)).to(self.device)
        if extra == "allocator" or (self.is_ours and off != "allocator"):
            keep_freed_memory(self.device)  # not before: what was built with is not its memory

    def streams(self, table: str):
        """What `update` reads in this table, and the micro-batches that it is given."""
        o = self.options
        count = o.accumulate
        if table == "training step":
            return FixedStream(*self.fixed), iter(lambda: [None] * count, 0)
        if self.is_ours:
            stream = TrainStream(self.images, Augmentation("crop", (o.img_size, o.img_size)),
                                 seed=0, batch=o.batch, part=Slice(0, 1, count),
                                 device=self.device)  # fmt: skip
            return stream, stream.updates(0, 10**6)
        batches = pil_batches(self.images.pixels, self.images.labels, o.img_size,
                              o.batch // count, o.workers, self.device.type == "cuda")  # fmt: skip
        return PeerStream(batches, self.device), iter(lambda: [None] * count, 0)

    def wait(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.options.cpu_time else time.perf_counter()

    def turn(self, table: str, steps: int) -> float:
        """Seconds a step."""
        if getattr(self, "table", None) != table:
            self.table = table
            self.forget_peak()
            self.stream, self.micro_batches = self.streams(table)
        if self.device.type == "cuda":  # gives the room back that the last turn left to others
            self.make(table)
        start = self.wait()
        for _ in range(steps):
            self.make(table)
        seconds = (self.wait() - start) / steps
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the next row needs the room
        return seconds

    def make(self, table: str) -> None:
        """One step."""
        if table == "evaluation":
            batches = FixedEval(*self.fixed, self.options.accumulate)
            train.evaluate(self.model, batches, self.precision, Quiet)
            return
        micro_batches = next(self.micro_batches)
        if table == "data path":
            for micro in micro_batches:
                self.stream.prepare(micro)
            return
        flags = Namespace(seed=0, label_smoothing=0.0, max_grad_norm=1.0)
        train.update(flags, self.step, self.shared, self.stream, micro_batches, self.precision,
                     self.optimizer)  # fmt: skip
        self.step += 1

    def forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif RESET_PEAK.exists():
            RESET_PEAK.write_text("5")  # proc(5)

    def peak_gib(self) -> float:
        """Of the table; on a CPU of the whole process, with what earlier tables left behind."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        if not RESET_PEAK.exists():
            return math.nan
        kib = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]
        return int(kib) / 2**20


class FixedEval(list):
    """An EvalStream of one batch, `times` times."""

    def __init__(self, images, labels, times: int):
        super().__init__([(images, labels)] * times)
        self.device, self.images = images.device, range(times * len(labels))
        self.indices = torch.arange(times * len(labels)).split(len(labels))


def serve(pipe, name: str, options: Namespace, config: ViTConfig) -> None:
    """The life of a row's process: build, then answer (table, steps) with seconds a step."""
    try:
        row = Row(name, options, config)
        pipe.send(("ready", row.difference))
        while (order := pipe.recv()) is not None:
            pipe.send(("done", row.turn(*order), row.peak_gib()))
    except PeerError as error:
        pipe.send(("missing", str(error)))
    except EOFError:
        pass  # the parent is gone
    except Exception as error:
        if reason := out_of_memory(error):
            pipe.send(("missing", f"out of memory: {reason}"))
            return
        pipe.send(("missing", traceback.format_exc(limit=-2).strip().replace("\n", " | ")))


class Remote:
    """The parent's end of a row. `missing` says why it cannot take part, else None."""

    def __init__(self, name: str, options: Namespace, config: ViTConfig):
        context = multiprocessing.get_context("spawn")
        self.name, (self.pipe, end) = name, context.Pipe()
        self.process = context.Process(target=serve, args=(end, name, options, config))
        self.process.start()
        end.close()

    def join_in(self) -> None:
        """Wait until the row's process is ready."""
        kind, what = self.receive()
        self.missing = what if kind == "missing" else None
        self.difference = 0.0 if kind == "missing" else what

    def receive(self):
        try:
            kind, *rest = self.pipe.recv()
        except EOFError:
            return "missing", f"its process ended with status {self.process.exitcode}"
        return (kind, *rest)

    def turn(self, table: str, steps: int) -> tuple[float, float] | None:
        """(seconds a step, peak GiB), or None where the row failed."""
        self.pipe.send((table, steps))
        kind, *rest = self.receive()
        if kind == "missing":
            self.missing = rest[0]
            return None
        return rest[0], rest[1]

    def close(self) -> None:
        if self.process.is_alive() and self.missing is None:
            self.pipe.send(None)
        self.process.join()


def start(names: list[str], options: Namespace, config: ViTConfig) -> list[Remote]:
    rows = [Remote(name, options, config) for name in names]
    for row in rows:
        row.join_in()
    return rows
