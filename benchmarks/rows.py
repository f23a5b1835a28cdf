"""One implementation in a process of its own, which makes steps on request.

All train by train.py's own `update` with SGD, momentum, clipping and master weights; the model
differs. Only ours and `timm best` have the fused optimizer, and `port` always uses level O1 of
mixed precision.
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
from utils.augment import Augmentation
from utils.hardware import keep_freed_memory, out_of_memory_reason
from utils.image_set import ImageSet
from utils.metrics import predict_dataset
from utils.optimizer import build_optimizer
from utils.precision import Precision
from utils.stream import Shard, TrainStream

CLASSES = 10
ROWS = ("ours", "timm", "timm best", "transformers", "torchvision", "port")
EXTRAS = ("allocator", "checkpointing", "channels_last")  # as in `ours + checkpointing`
RESET_PEAK = Path("/proc/self/clear_refs")  # Linux only
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def full_last_block(self, images, num_queries=None, paths=None):
    return self.encoder(self.embeddings(images))[:, :num_queries]


# Lever -> (object, attribute, the value that turns the lever off); None: see Row.
LEVERS = {
    "last block": (modeling.Transformer, "forward", full_last_block),
    "attention": (cpu.CpuAttention, "attend", modeling.Attention.attend),
    "linear": (cpu, "ONEDNN_DTYPES", set()),
    "upcast": (cpu, "UPCAST_DTYPES", set()),
    "gelu": (cpu.CpuMlp, "forward", modeling.Mlp.forward),
    "dropout": (cpu, "dropout", F.dropout),
    "allocator": None,
    "fused optimizer": None,
    "compile": None,
}


class FixedEvalStream(list):
    """An EvalStream of the same batch, `times` times."""

    def __init__(self, images, labels, times: int):
        super().__init__([(images, labels)] * times)
        self.device, self.images = images.device, range(times * len(labels))
        self.indices = torch.arange(times * len(labels)).split(len(labels))


def tiles(count: int = 2048) -> ImageSet:
    """Real 32x32 pixels: tiles of the two photographs in scikit-learn."""
    from sklearn.datasets import load_sample_images

    photos = [torch.from_numpy(photo.copy()) for photo in load_sample_images().images]
    pixels = torch.cat([p.unfold(0, 32, 16).unfold(1, 32, 16).flatten(0, 1) for p in photos])
    pixels = pixels.repeat(-(-count // len(pixels)), 1, 1, 1)[:count].contiguous()
    return ImageSet(torch.arange(count) % CLASSES, pixels)  # (n, C, h, w)


def same_work(name: str, peer, load, ours: VisionTransformer, size: int) -> float:
    """Copy our weights into `peer`; the largest difference of logits, relative to the largest.

    Raises PeerError if the number of parameters or the logits are not ours.
    """
    count, expected = (sum(p.numel() for p in m.parameters()) for m in (peer, ours))
    if count != expected:
        raise PeerError(f"{name} has {count} parameters where ours has {expected}")
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
    """One implementation, ready to make steps.

    `name` is one of ROWS, `ours - LEVER` or `ROW + EXTRA`.
    """

    def __init__(self, name: str, options: Namespace, config: ViTConfig):
        self.options, self.device = options, torch.device(options.device)
        torch.set_num_threads(options.threads)
        who, _, off = name.partition(" - ")
        who, _, extra = who.partition(" + ")
        self.is_ours = who == "ours"
        if off and LEVERS[off]:
            setattr(*LEVERS[off])
        best = who in ("ours", "timm best")
        if who == "timm best":
            from timm.layers import set_fast_norm

            set_fast_norm(True)

        torch.manual_seed(0)
        model = VisionTransformer(config, options.img_size, CLASSES).float()
        for parameter in (model.head.weight, model.transformer.embeddings.cls_token):
            torch.nn.init.normal_(parameter, std=0.1)
        if self.device.type == "cpu":
            cpu.use_cpu_kernels(model)
        if not self.is_ours:
            build, load = BUILDERS[who.removesuffix(" best")]
            peer = build(config, options.img_size, CLASSES, config.dropout_rate)
            same_work(who, peer, load, model, options.img_size)
            model = peer
        if extra == "checkpointing":
            model.transformer.encoder.grad_checkpointing = True
        elif extra == "channels_last":
            model = model.to(memory_format=torch.channels_last)
        model = self.model = model.to(self.device).train()
        level = "O0" if options.precision == "fp32" else "O1" if who == "port" else options.level
        self.precision = Precision(model, level, DTYPES[options.precision])
        if off == "fused optimizer" or not best:
            optimizer = torch.optim.SGD(self.precision.parameters, lr=1e-3, momentum=0.9)
        else:
            optimizer = build_optimizer(self.precision, "sgd", lr=1e-3, weight_decay=0.0)
        args = Namespace(seed=0, label_smoothing=0.0, max_grad_norm=1.0, loss="ce")
        run = {"args": args, "precision": self.precision, "optimizer": optimizer}
        self.run = Namespace(state=Namespace(step=0), drop_path=None, **run)
        compiled = options.compile == "on" and best and off != "compile"
        self.shared = torch.compile(model, dynamic=False) if compiled else model
        self.table, self.images = None, tiles()
        micro = options.batch // options.accumulate
        images = torch.randn(micro, 3, options.img_size, options.img_size)
        if extra == "channels_last":
            images = images.contiguous(memory_format=torch.channels_last)
        self.fixed = images.to(self.device), torch.randint(CLASSES, (micro,)).to(self.device)
        if extra == "allocator" or (self.is_ours and off != "allocator"):
            keep_freed_memory(self.device)  # at the end: memory of the construction is not kept

    def streams(self, table: str):
        """What `update` reads in this table, and an iterator over its micro-batches."""
        o = self.options
        no_batches = iter(lambda: [None] * o.accumulate, 0)
        if table == "training step":  # the same batch again and again, at no cost
            stream = Namespace(prepare=lambda micro_batch: self.fixed, class_weights=None)
            return stream, no_batches
        if self.is_ours:
            crop, shard = Augmentation("crop", self.model.img_size), Shard(0, 1, o.accumulate)
            options = {"seed": 0, "batch_size": o.batch, "shard": shard, "device": self.device}
            stream = TrainStream(self.images, crop, **options)
            return stream, stream.steps(0, 10**6)
        pixels, labels, micro = self.images.pixels, self.images.labels, o.batch // o.accumulate
        pin = self.device.type == "cuda"
        batches = pil_batches(pixels, labels, o.img_size, micro, o.workers, pin)

        def prepare(micro_batch):
            return [x.to(self.device, non_blocking=True) for x in next(batches)]

        return Namespace(prepare=prepare, class_weights=None), no_batches

    def wait(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.options.cpu_time else time.perf_counter()

    def turn(self, table: str, steps: int) -> float:
        """Seconds per step."""
        if self.table != table:
            self.table = table
            self.reset_peak()
            self.stream, self.micro_batches = self.streams(table)
        if self.device.type == "cuda":  # allocates again what the last turn gave back
            self.make_step(table)
        start = self.wait()
        for _ in range(steps):
            self.make_step(table)
        seconds = (self.wait() - start) / steps
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the next row needs the memory
        return seconds

    def make_step(self, table: str) -> None:
        if table == "evaluation":
            stream = FixedEvalStream(*self.fixed, self.options.accumulate)
            predict_dataset(self.model, stream, self.precision)
            return
        micro_batches = next(self.micro_batches)
        if table == "data path":
            for micro_batch in micro_batches:
                self.stream.prepare(micro_batch)
            return
        train.update(self.run, self.shared, self.stream, micro_batches)
        self.run.state.step += 1

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif RESET_PEAK.exists():
            RESET_PEAK.write_text("5")  # see proc(5)

    def peak_gib(self) -> float:
        """Peak memory of this table; on a CPU with all that the process still holds."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        if not RESET_PEAK.exists():
            return math.nan
        kib = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]
        return int(kib) / 2**20


def serve(pipe, name: str, options: Namespace, config: ViTConfig) -> None:
    """The process of a row: build it, then answer (table, steps) with seconds per step."""
    try:
        row = Row(name, options, config)
        pipe.send(("ready",))
        while (order := pipe.recv()) is not None:
            pipe.send(("done", row.turn(*order), row.peak_gib()))
    except PeerError as error:
        pipe.send(("missing", str(error)))
    except EOFError:
        pass  # the parent has ended
    except Exception as error:
        reason = out_of_memory_reason(error)
        trace = traceback.format_exc(limit=-2).strip().replace("\n", " | ")
        pipe.send(("missing", f"out of memory: {reason}" if reason else trace))


class Remote:
    """The parent's end of a row. `missing` is the reason why it cannot take part, else None."""

    def __init__(self, name: str, options: Namespace, config: ViTConfig):
        context = multiprocessing.get_context("spawn")
        self.name, (self.pipe, end) = name, context.Pipe()
        self.process = context.Process(target=serve, args=(end, name, options, config))
        self.process.start()
        end.close()

    def wait_until_ready(self) -> None:
        kind, *reason = self.receive()
        self.missing = reason[0] if kind == "missing" else None

    def receive(self):
        try:
            return self.pipe.recv()
        except EOFError:
            return "missing", f"its process ended with status {self.process.exitcode}"

    def turn(self, table: str, steps: int) -> tuple[float, float] | None:
        """(seconds per step, peak GiB), or None if the row failed."""
        self.pipe.send((table, steps))
        kind, *answer = self.receive()
        if kind == "done":
            return tuple(answer)
        self.missing = answer[0]
        return None

    def close(self) -> None:
        if self.process.is_alive() and self.missing is None:
            self.pipe.send(None)
        self.process.join()


def start(names: list[str], options: Namespace, config: ViTConfig) -> list[Remote]:
    rows = [Remote(name, options, config) for name in names]
    for row in rows:
        row.wait_until_ready()
    return rows
