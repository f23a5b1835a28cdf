"""Several variants on this machine: speed beside its peers, attention kernels, memory, evaluation.

    python benchmarks/survey.py --json survey.json                         # all of it
    python benchmarks/survey.py --parts memory --cases ViT-B_16@224,ViT-L_16@224

Where one command may take ten minutes only, give it one part, or one case of `speed`, at a time.
"""

import argparse
import json
import sys
import time
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import throughput
from benchmarks.rows import CLASSES, DTYPES, Quiet, start, tiles
from evaluation import evaluate
from models.configs import CONFIGS
from models.modeling import VisionTransformer
from utils.allocator import keep_freed_memory
from utils.cli import HelpFormatter
from utils.files import written_whole
from utils.precision import Precision
from utils.stream import EvalStream, Slice

PARTS = ("speed", "attention", "memory", "evaluation")
# VARIANT@PIXELS -> micro-batches that 512 images are cut into on a GPU of 80 GB; others: MOST_CUTS
CASES = {"ViT-B_16@224": 1, "ViT-B_16@384": 4, "ViT-B_32@224": 1, "ViT-L_16@224": 4,
         "ViT-H_14@224": 8, "R50+ViT-B_16@224": 4}  # fmt: skip
MOST_CUTS = 8
MEMORY_COLUMNS = ("ours", "ours + checkpointing")
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)  # fmt: skip
CIFAR_TEST = 10_000  # images


def options_of(case: str, args: Namespace, *flags: str) -> Namespace:
    """throughput.py's options for one case."""
    variant, size = case.split("@")
    return throughput.parse(["--model_type", variant, "--img_size", size, "--batch",
                             str(args.batch), "--device", args.device, "--precision",
                             args.precision, *flags])  # fmt: skip


def speed(args: Namespace) -> dict:
    """throughput.py's tables of each case; all of them, with the data path, of the first."""
    found = {}
    for i, case in enumerate(args.cases):
        config = CONFIGS[case.split("@")[0]]
        hybrid = ["ours + channels_last"] if config.resnet_layers is not None else []
        tables = throughput.TABLES if i == 0 else throughput.TABLES[:2]
        cuts = str(CASES.get(case, MOST_CUTS) if args.device == "cuda" else 1)
        options = options_of(case, args, "--accumulate", cuts, "--turn_steps", str(args.turn_steps),
                             "--tables", ",".join(tables), "--rounds", str(args.rounds), "--rows",
                             ",".join(["ours", *hybrid, "timm", "timm best", "port"]))  # fmt: skip
        print(f"\n## {case}\n", flush=True)
        found[case] = throughput.run(options, config)
    return found


def attention(args: Namespace) -> dict:
    """Milliseconds of each kernel of PyTorch's fused attention, forward and backward."""
    dtype, device = DTYPES[args.precision], torch.device(args.device)
    print("\n| attention, forward and backward, ms | "
          + " | ".join(backend.name.lower() for backend in BACKENDS) + " |\n"
          + "|---" * (len(BACKENDS) + 1) + "|", flush=True)  # fmt: skip
    found = {}
    for case in args.cases:
        variant, size = case.split("@")
        config = CONFIGS[variant]
        h, w = config.grid(int(size))
        shape = (args.batch, config.num_heads, h * w + 1, config.hidden_size // config.num_heads)
        b, heads, n, d = shape
        q, k, v, grad = (torch.randn(b, n, heads, d, device=device).to(dtype).transpose(1, 2)
                         for _ in range(4))  # as the model has them  # fmt: skip
        times = {}
        for backend in BACKENDS:
            try:
                with sdpa_kernel(backend):
                    times[backend.name] = min(attention_ms(q, k, v, grad) for _ in range(3))
            except RuntimeError:  # this kernel is not for this device, shape or type
                times[backend.name] = None
        found[case] = {"shape": shape, "ms": times}
        cells = [f"{ms:.2f}" if ms is not None else "-" for ms in times.values()]
        print(f"| {' x '.join(map(str, shape))} | {' | '.join(cells)} |", flush=True)
    return found


def attention_ms(q, k, v, grad, repeats: int = 5) -> float:
    inputs = [x.requires_grad_() for x in (q, k, v)]
    wait = torch.cuda.synchronize if q.is_cuda else lambda: None
    for i in range(repeats + 1):
        if i == 1:  # the first is a warm-up
            wait()
            begin = time.perf_counter()
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.autograd.grad(out, inputs, grad)
    wait()
    return (time.perf_counter() - begin) / repeats * 1000


def memory(args: Namespace) -> dict:
    """Peak GiB of an update by micro-batch, each measured in a process of its own."""
    print("\n| peak GiB | micro-batch | plain | `--grad_checkpointing` |\n|---|---|---|---|",
          flush=True)  # fmt: skip
    found = {}
    for case in args.cases:
        for batch in args.micro_batches:
            options = options_of(case, args)
            options.batch, options.compile = batch, "off"
            cells = []
            for name in MEMORY_COLUMNS:
                (row,) = start([name], options, CONFIGS[options.model_type])
                # The optimizer has its momentum from the second update on.
                result = row.turn("training step", 2) if row.missing is None else None
                if result is None and not row.missing.startswith("out of memory"):
                    raise RuntimeError(f"{case}, {name}: {row.missing}")
                row.close()
                cells.append(result and result[1])
            found[f"{case}, {batch}"] = dict(zip(MEMORY_COLUMNS, cells, strict=True))
            shown = [f"{gib:.1f}" if gib is not None else "too much" for gib in cells]
            print(f"| {case} | {batch} | {' | '.join(shown)} |", flush=True)
    return found


def evaluation(args: Namespace) -> dict:
    """Seconds that an evaluation of as many images as CIFAR has for testing takes, 32x32 each."""
    device, found = torch.device(args.device), {}
    for case in args.cases:
        variant, size = case.split("@")
        keep_freed_memory(device)
        model = VisionTransformer(CONFIGS[variant], int(size), CLASSES).to(device)
        level = "O0" if args.precision == "fp32" else "O2"
        precision = Precision(model, level, DTYPES[args.precision])
        stream = EvalStream(tiles(args.eval_images), model.img_size, batch=args.batch,
                            part=Slice(), device=device)  # fmt: skip
        times = []
        for _ in range(2):  # the first is a warm-up
            begin = time.perf_counter()
            evaluate(model, stream, precision, Quiet)  # ends with a read of its sums: no wait here
            times.append(time.perf_counter() - begin)
        found[case] = times[1]
        print(f"\nevaluation of {args.eval_images} images, {case}: {times[1]:.2f} s", flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    record = {"options": vars(args)}
    for part in args.parts:
        record[part] = {"speed": speed, "attention": attention, "memory": memory,
                        "evaluation": evaluation}[part](args)  # fmt: skip
        if args.json:  # after every part: a time limit may end what follows
            with written_whole(args.json) as temporary:
                temporary.write_text(json.dumps(record, indent=1))


def parse(argv: list[str] | None) -> Namespace:
    base = throughput.parse([])
    cuda = base.device == "cuda"
    parser = argparse.ArgumentParser(
        prog="survey.py",
        description=__doc__.splitlines()[0],
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help="comma-separated")
    add("--cases", default=",".join(CASES), help="comma-separated VARIANT@PIXELS")
    add("--device", choices=("cpu", "cuda"), default=base.device)
    add("--precision", choices=DTYPES, default=base.precision)
    add("--batch", type=int, default=base.batch, help="images of an update")
    add("--micro_batches", default="32,128" if cuda else "4,16", help="of the memory table")
    add("--eval_images", type=int, default=CIFAR_TEST)
    add("--rounds", type=int, default=5)
    add("--turn_steps", type=int, default=3 if cuda else 1, help="updates of a turn")
    add("--json", metavar="FILE", help="write the record there")
    args = parser.parse_args(argv)
    args.parts, args.cases = args.parts.split(","), args.cases.split(",")
    if unknown := sorted(set(args.parts) - set(PARTS)):
        parser.error(f"--parts {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    for case in args.cases:
        variant, _, size = case.partition("@")
        if variant not in CONFIGS or not size.isdecimal():
            parser.error(f"--cases {case}: a variant of train.py's --model_type, @, and pixels")
    args.micro_batches = [int(text) for text in args.micro_batches.split(",")]
    return args


if __name__ == "__main__":
    main()
