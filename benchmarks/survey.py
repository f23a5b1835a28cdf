"""Several variants on this machine: speed, attention kernels, memory, evaluation.

    python3 benchmarks/survey.py --json survey.json                        # all of it
    python3 benchmarks/survey.py --parts memory --cases ViT-B_16@224,ViT-L_16@224

If a command may take ten minutes only, give it one part, or one case of `speed`, at a time.
"""

import json
import sys
import time
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import throughput
from benchmarks.rows import CLASSES, DTYPES, start, tiles
from models.configs import CONFIGS
from models.cpu import use_cpu_kernels
from models.modeling import VisionTransformer
from utils.cli import Parser, run_script
from utils.files import atomic_write
from utils.hardware import keep_freed_memory
from utils.metrics import predict_dataset
from utils.precision import Precision
from utils.stream import EvalStream

# VARIANT@PIXELS -> the micro-batches of a step of 512 images on a GPU of 80 GB
CASES = {"ViT-B_16@224": 1, "ViT-B_16@384": 4, "ViT-B_32@224": 1}
CASES |= {"ViT-L_16@224": 4, "ViT-H_14@224": 8, "R50+ViT-B_16@224": 4}
MAX_MICRO_BATCHES = 8  # of all other cases
MEMORY_COLUMNS = ("ours", "ours + checkpointing")
KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
CIFAR_TEST = 10_000  # images


def options_of(case: str, args: Namespace, **flags) -> Namespace:
    """throughput.py's options for one case."""
    variant, size = case.split("@")
    common = {"model_type": variant, "img_size": size, "batch": args.batch}
    flags |= common | {"device": args.device, "precision": args.precision}
    return throughput.parse([f"--{name}={value}" for name, value in flags.items()])


def speed(args: Namespace) -> dict:
    """throughput.py's tables of each case: of the first all, of the others without data path."""
    found = {}
    for i, case in enumerate(args.cases):
        config = CONFIGS[case.split("@")[0]]
        hybrid = "ours + channels_last," if config.resnet_layers is not None else ""
        micro_batches = CASES.get(case, MAX_MICRO_BATCHES) if args.device == "cuda" else 1
        flags = {"accumulate": micro_batches, "turn_steps": args.turn_steps, "rounds": args.rounds}
        flags["tables"] = ",".join(throughput.TABLES if i == 0 else throughput.TABLES[:2])
        options = options_of(case, args, rows=f"ours,{hybrid}timm,timm best,port", **flags)
        print(f"\n## {case}\n", flush=True)
        found[case] = throughput.run(options, config)
    return found


def attention(args: Namespace) -> dict:
    """Milliseconds of each kernel of PyTorch's fused attention, forward and backward."""
    dtype, device = DTYPES[args.precision], torch.device(args.device)
    print(f"\n| attention, forward and backward, ms | {' | '.join(KERNELS).lower()} |")
    print("|---" * (len(KERNELS) + 1) + "|", flush=True)
    found = {}
    for case in args.cases:
        variant, size = case.split("@")
        config = CONFIGS[variant]
        h, w = config.grid(int(size))
        b, heads, n, width = args.batch, config.num_heads, h * w + 1, config.hidden_size
        shape = (b, n, heads, width // heads)
        tensors = [torch.randn(shape, device=device).to(dtype) for _ in range(4)]
        q, k, v, grad = (x.transpose(1, 2) for x in tensors)  # (B, H, N, d), as in the model
        times = {}
        for kernel in KERNELS:
            try:
                with sdpa_kernel(getattr(SDPBackend, kernel)):
                    times[kernel] = min(attention_ms(q, k, v, grad) for _ in range(3))
            except RuntimeError:  # this kernel does not support the device, shape or dtype
                times[kernel] = None
        found[case] = {"shape": list(q.shape), "ms": times}
        cells = [f"{ms:.2f}" if ms is not None else "-" for ms in times.values()]
        print(f"| {' x '.join(map(str, q.shape))} | {' | '.join(cells)} |", flush=True)
    return found


def attention_ms(q, k, v, grad, repeats: int = 5) -> float:
    inputs = [x.requires_grad_() for x in (q, k, v)]
    wait = torch.cuda.synchronize if q.is_cuda else lambda: None
    for i in range(repeats + 1):
        if i == 1:  # the first is a warm-up
            wait()
            begin = time.perf_counter()
        out = F.scaled_dot_product_attention(q, k, v)
        torch.autograd.grad(out, inputs, grad)
    wait()
    return (time.perf_counter() - begin) / repeats * 1000


def memory(args: Namespace) -> dict:
    """Peak GiB of a step by micro-batch, each measured in a process of its own."""
    print("\n| peak GiB | micro-batch | plain | `--grad_checkpointing` |")
    print("|---|---|---|---|", flush=True)
    found = {}
    for case in args.cases:
        for batch in args.micro_batches:
            options = options_of(case, args)
            options.batch, options.compile = batch, "off"
            peaks = {name: peak_gib(name, options) for name in MEMORY_COLUMNS}
            found[f"{case}, {batch}"] = peaks
            cells = [f"{gib:.1f}" if gib is not None else "too much" for gib in peaks.values()]
            print(f"| {case} | {batch} | {' | '.join(cells)} |", flush=True)
    return found


def peak_gib(name: str, options: Namespace) -> float | None:
    """None if the memory was not enough."""
    (row,) = start([name], options, CONFIGS[options.model_type])
    # Two steps: the first creates the optimizer's momentum.
    result = row.turn("training step", 2) if row.missing is None else None
    if result is None and not row.missing.startswith("out of memory"):
        raise RuntimeError(f"{options.model_type}, {name}: {row.missing}")
    row.close()
    return result and result[1]


def evaluation(args: Namespace) -> dict:
    """Seconds for an evaluation of as many 32x32 images as CIFAR has for testing."""
    device, found = torch.device(args.device), {}
    for case in args.cases:
        variant, size = case.split("@")
        keep_freed_memory(device)
        model = VisionTransformer(CONFIGS[variant], int(size), CLASSES)
        model = use_cpu_kernels(model.to(device))
        level = "O0" if args.precision == "fp32" else "O2"
        precision, images = Precision(model, level, DTYPES[args.precision]), tiles(args.eval_images)
        stream = EvalStream(images, model.img_size, batch_size=args.batch, device=device)
        for _ in range(2):  # the first is a warm-up
            begin = time.perf_counter()
            predict_dataset(model, stream, precision)  # ends with a copy to the host, so waits
            found[case] = time.perf_counter() - begin
        print(f"\nevaluation of {args.eval_images} images, {case}: {found[case]:.2f} s", flush=True)
    return found


PARTS = {"speed": speed, "attention": attention, "memory": memory, "evaluation": evaluation}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    record = {"options": vars(args)}
    for part in args.parts:
        record[part] = PARTS[part](args)
        if args.json:  # after every part, in case a time limit ends the next one
            with atomic_write(args.json) as temporary:
                temporary.write_text(json.dumps(record, indent=1))


def parse(argv: list[str] | None) -> Namespace:
    default = throughput.parse([])
    cuda = default.device == "cuda"
    parser = Parser(prog="survey.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help="comma-separated")
    add("--cases", default=",".join(CASES), help="comma-separated VARIANT@PIXELS")
    add("--device", choices=("cpu", "cuda"), default=default.device)
    add("--precision", choices=DTYPES, default=default.precision)
    add("--batch", type=int, default=default.batch, help="images of a step")
    add("--micro_batches", default="32,128" if cuda else "4,16", help="of the memory table")
    add("--eval_images", type=int, default=CIFAR_TEST)
    add("--rounds", type=int, default=5)
    add("--turn_steps", type=int, default=3 if cuda else 1, help="steps of a turn")
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
    sys.exit(run_script("survey.py", main))
