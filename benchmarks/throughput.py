"""Images a second: ours beside timm, transformers, torchvision and the earlier port's design.

    python3 benchmarks/throughput.py                                   # the tables for a CPU
    python3 benchmarks/throughput.py --ablation                        # each optimisation off
    python3 benchmarks/throughput.py --tables photographs              # JPEG files to pixels
    python3 benchmarks/throughput.py --precision fp16 --batch 512 --img_size 384 --json gpu.json

Every row is a process of its own. In each round every row makes one turn (on a CPU one step), so
that other load on the machine hits all of them; ratios are medians over rounds. Before the timing
each peer gets our weights, and must have our number of parameters and our logits.
In `end to end` peers read images through Pillow and worker processes. These fill their queues
between turns, which favours the peers.
"""

import json
import math
import os
import platform
import statistics
import sys
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import photographs
from benchmarks.rows import CLASSES, DTYPES, EXTRAS, LEVERS, ROWS, Remote, start
from models import cpu
from models.configs import CONFIGS, DEFAULT_MODEL, ViTConfig
from models.modeling import VisionTransformer
from utils.cli import Parser, run_script
from utils.files import atomic_write

PHOTOGRAPHS = "photographs"  # a table without models, only if it is asked for
TABLES = ("training step", "evaluation", "data path", "end to end")
MIN_ROUNDS = 3  # whatever --minutes says


def matmul_peak(options: Namespace) -> float:
    """FLOP/s of a large square product, on the same threads and by the same clock."""
    device, dtype = options.device, DTYPES[options.precision]
    # On a GPU about half a second, so that it runs at the clock that its power limit allows.
    side, steps = (8192, 300) if device == "cuda" else (2048, 5)
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    a = torch.randn(side, side, device=device).to(dtype)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    products = [torch.matmul]  # not the fastest where we use another kernel
    if device == "cpu" and dtype in cpu.ONEDNN_DTYPES | cpu.UPCAST_DTYPES:
        products.append(cpu.product)
    seconds = []
    for multiply in products:
        for _ in range(steps if device == "cuda" else 1):  # an idle GPU's clock is low
            multiply(a, a)
        wait()
        start = clock()
        for _ in range(steps):
            multiply(a, a)
        wait()
        seconds.append(clock() - start)
    return steps * 2 * side**3 / min(seconds)


def forward_flops(config: ViTConfig, img_size: int) -> float:
    """FLOPs of one image, with all tokens in all blocks: what a peer computes."""
    with torch.device("meta"):
        model = VisionTransformer(config, img_size, CLASSES).eval()
        images = torch.empty(1, 3, img_size, img_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.head(model.transformer(images)[:, 0])
    return counter.get_total_flops()


def measure(remotes: list[Remote], table: str, options: Namespace) -> dict[str, dict]:
    """Two warm-up turns of every row, then the rounds. Returns name -> its record.

    After this table's share of `--minutes` no round starts, except the first MIN_ROUNDS.
    """
    records: dict[str, dict] = {}
    minutes = math.inf if options.minutes is None else options.minutes
    share = minutes * 60 / (len(options.tables) + 1)
    start_time = time.monotonic()
    # Peers' workers fill their queues between turns: in long turns this matters less.
    steps = options.turn_steps * (20 if table == "data path" else 1)
    for i in range(2 + options.rounds):
        if i >= 2 + MIN_ROUNDS and time.monotonic() - start_time > share:
            break
        for remote in remotes:
            if remote.missing is not None:
                continue
            result = remote.turn(table, steps if i else 1)
            if result is None:
                records.pop(remote.name, None)
                continue
            seconds, memory = result
            record = records.setdefault(remote.name, {"first_s": seconds, "seconds": []})
            record["memory_gib"] = memory
            if i >= 2:
                record["seconds"].append(seconds)
    return records


def summarize(records: dict[str, dict], batch: int, flops: float, peak: float) -> None:
    """Add images a second and ratios to `records`, in place.

    A ratio is our speed over the row's, round by round. `flops` is of one image in this table with
    the whole model, 0 if a share has no meaning; `peak` / `flops` is the bound. Ours needs fewer
    operations, so it could be above 100 %.
    """
    for record in records.values():
        speeds = [batch / seconds for seconds in record["seconds"]]
        record["images_per_second"] = speed = statistics.median(speeds)
        record["low"], record["high"] = min(speeds), max(speeds)
        record["share"] = speed * flops / peak if flops else None
        if "ours" in records:
            pairs = zip(record["seconds"], records["ours"]["seconds"], strict=True)
            record["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)


def best_peer(records: dict[str, dict]) -> str | None:
    peers = {
        name: record["images_per_second"]
        for name, record in records.items()
        if not name.startswith("ours") and "+" not in name
    }
    return max(peers, key=peers.get) if peers else None


def render(title: str, records: dict[str, dict]) -> str:
    """A markdown table; the last column says how many times as fast ours is."""
    columns = "images/s | spread | share of bound | peak GiB | first step s | ours is"
    lines = [f"| {title} | {columns} |", "|---|---|---|---|---|---|---|"]
    for name, r in records.items():
        mark = " (best peer)" if name == best_peer(records) else ""
        speed = f"{r['images_per_second']:.2f} | {r['low']:.2f}-{r['high']:.2f}"
        share = "" if r["share"] is None else f"{r['share']:.0%}"
        ratio = f"{r['ratio']:.2f} x" if "ratio" in r else ""
        rest = f"{r['memory_gib']:.1f} | {r['first_s']:.1f} | {ratio}"
        lines.append(f"| {name}{mark} | {speed} | {share} | {rest} |")
    return "\n".join(lines)


def describe_machine(options: Namespace) -> dict:
    names = ("torch", "timm", "transformers", "torchvision")
    versions = {n: metadata.version(n) if find_spec(n) else "not installed" for n in names}
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if "model name" in line]
        processor = names[0] if names else processor
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else processor,
        "cores": os.cpu_count(),
        "threads": options.threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
        **versions,
    }


def parse(argv: list[str] | None) -> Namespace:
    device = Parser(add_help=False)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device.add_argument("--device", choices=("cpu", "cuda"), default=default)
    cuda = device.parse_known_args(argv)[0].device == "cuda"  # other defaults depend on it
    precision = "bf16" if cuda or cpu.cpu_has_bfloat16() else "fp32"
    text = "Images a second of ours and of its peers, measured in turns."
    parser = Parser(prog="throughput.py", description=text, parents=[device])
    add = parser.add_argument
    add("--model_type", choices=list(CONFIGS), default=DEFAULT_MODEL, metavar="NAME")
    add("--layers", type=int, help="blocks, if fewer than the variant's, for a quick look")
    add("--img_size", type=int, default=224, help="pixels")
    add("--batch", type=int, default=512 if cuda else 16, help="images of a step")
    add("--accumulate", type=int, default=1, help="micro-batches of a step")
    add("--precision", choices=DTYPES, default=precision)
    add("--level", choices=("O1", "O2", "O3"), default="O2", help="of all but `port`, not for fp32")
    add("--dropout", type=float, help="the variant's own if not given")
    add("--rows", default=",".join(ROWS), help="comma-separated")
    text = f"comma-separated; also {PHOTOGRAPHS}"
    add("--tables", default=",".join(TABLES), help=text)
    text = "ours with each of these off, and no peers: " + ", ".join(LEVERS)
    add("--ablation", nargs="?", const=",".join(LEVERS), metavar="LEVERS", help=text)
    add("--rounds", type=int, default=5)
    text = f"about how long it may take; makes fewer rounds, but at least {MIN_ROUNDS}"
    add("--minutes", type=float, help=text)
    add("--turn_steps", type=int, default=10 if cuda else 1, help="steps of a turn")
    add("--threads", type=int, default=torch.get_num_threads())
    text = "count CPU seconds of the process, not the clock's: for one thread on a busy machine"
    add("--cpu_time", action="store_true", help=text)
    workers = min(4, os.cpu_count())
    add("--workers", type=int, default=workers, help="processes that decode images for the peers")
    text = "torch.compile for ours and `timm best`"
    add("--compile", choices=("on", "off"), default="on" if cuda else "off", help=text)
    add("--json", metavar="FILE", help="write the record there")
    options = parser.parse_args(argv)
    batch, accumulate = options.batch, options.accumulate
    if batch % accumulate:
        parser.error(f"--batch {batch} is not a multiple of --accumulate {accumulate}")
    if options.cpu_time:  # it does not count worker processes
        options.workers = 0
    options.tables, options.rows = options.tables.split(","), options.rows.split(",")
    if options.ablation:
        options.rows, options.ablation = [], options.ablation.split(",")
    known_rows = [*ROWS, *(f"{row} + {extra}" for row in ROWS for extra in EXTRAS)]
    known = {"tables": [*TABLES, PHOTOGRAPHS], "rows": known_rows, "ablation": LEVERS}
    for name, names in known.items():
        if unknown := sorted(set(getattr(options, name) or ()) - set(names)):
            parser.error(f"--{name} {', '.join(unknown)}: choose from {', '.join(names)}")
    return options


def run(options: Namespace, config: ViTConfig) -> dict:
    """Measure and print all tables; returns the record."""
    log = partial(print, flush=True)
    machine, missing, tables = describe_machine(options), {}, {}
    log(json.dumps(machine))
    if PHOTOGRAPHS in options.tables:
        tables = photographs.measure(options, log)
        options.tables.remove(PHOTOGRAPHS)
    if not options.tables:
        return {"options": vars(options), "machine": machine, "tables": tables}
    peak = max(matmul_peak(options) for _ in range(3))
    flops = forward_flops(config, options.img_size)
    training = f"{flops * 3 / 1e9:.1f} GFLOP an image of training"
    what = f"{options.model_type} at {options.img_size} px, batch {options.batch}"
    what += f", {options.precision}, dropout {config.dropout_rate}"
    log(f"{what}: {training}; the bound is the matmul peak over that")
    rows = start(options.rows, options, config)

    def close(finished: list[Remote]) -> None:
        for row in finished:
            row.close()
            if row.missing is not None:
                missing[row.name] = row.missing
                log(f"\nnot measured: {row.name}: {row.missing}")

    def report(table: str, chosen: list[Remote], title: str = "") -> dict[str, dict]:
        nonlocal peak
        title = title or table
        records = measure(chosen, table, options)
        peak = max(peak, matmul_peak(options))
        factor = {"training step": 3, "end to end": 3, "evaluation": 1}.get(table, 0)
        summarize(records, options.batch, factor * flops, peak)
        tables.setdefault(title, {}).update(records)
        log("\n" + render(title, records))
        return records

    best = None
    for table in options.tables:
        if options.ablation:
            for lever in options.ablation:
                # Both are new processes: a heap shaped by many steps would be an advantage.
                pair = start(["ours", f"ours - {lever}"], options, config)
                report(table, pair, f"{table}, {lever}")
                close(pair)
        elif table in ("training step", "evaluation"):
            found = best_peer(report(table, rows))
            best = best or found  # of the first table; `end to end` compares with it
            if best and table == "training step" and options.device == "cpu":
                theirs = start([f"{best} + allocator"], options, config)
                ours = [row for row in rows if row.name == "ours"]
                report(table, ours + theirs, f"{table}, best peer with our allocator setting")
                close(theirs)
        else:
            report(table, [row for row in rows if row.name in ("ours", "timm", best)])
    close(rows)
    machine["load_after"] = os.getloadavg()
    loads = f"{machine['load'][0]:.1f} -> {machine['load_after'][0]:.1f}"
    log(f"\nmatmul peak {peak / 1e12:.3f} TFLOP/s ({options.precision}); load average {loads}")
    record = {"options": vars(options), "machine": machine, "matmul_peak": peak}
    return record | {"missing": missing, "tables": tables}


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    config = CONFIGS[options.model_type]
    if options.dropout is not None:
        config = replace(config, dropout_rate=options.dropout)
    if options.layers is not None:
        config = replace(config, num_layers=options.layers)
    record = run(options, config)
    if options.json:
        with atomic_write(options.json) as temporary:
            temporary.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    sys.exit(run_script("throughput.py", main))
