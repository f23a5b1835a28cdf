"""Images a second: ours beside timm, transformers, torchvision and the earlier port's design.

    python benchmarks/throughput.py                                    # the CPU's table
    python benchmarks/throughput.py --ablation                         # each of our levers off
    python benchmarks/throughput.py --precision fp16 --batch 512 --img_size 384 --json gpu.json

Every row is a process of its own. In each round every row makes one turn (on a CPU one step), so
that whatever else the machine does hits all of them; ratios are medians over rounds. Before
anything is timed each peer is given our weights, and must have our parameter count and our logits.
In `end to end` peers read images through Pillow and worker processes, which fill their queues
between turns: that favours the peers.
"""

import argparse
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rows import CLASSES, DTYPES, EXTRAS, LEVERS, ROWS, Remote, start
from models.configs import CONFIGS, ViTConfig
from models.cpu import ONEDNN_DTYPES, WIDENED, cpu_has_bfloat16, product
from models.modeling import VisionTransformer
from utils.cli import HelpFormatter
from utils.files import written_whole

TABLES = ("training step", "evaluation", "data path", "end to end")
FEWEST_ROUNDS = 3  # whatever --minutes says


def matmul_peak(options: Namespace) -> float:
    """FLOP/s of a large square product, on the same threads and by the same clock."""
    device, dtype = options.device, DTYPES[options.precision]
    # On a GPU about half a second, so that it runs at the clock that its power allows for long.
    side, steps = (8192, 300) if device == "cuda" else (2048, 5)
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    a = torch.randn(side, side, device=device).to(dtype)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    ways = [torch.matmul]  # which is not a CPU's best where ours goes another way
    if device == "cpu" and dtype in ONEDNN_DTYPES | WIDENED:
        ways.append(product)
    seconds = []
    for multiply in ways:
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
    """Of one image, all tokens in all blocks: what a peer computes."""
    with torch.device("meta"):
        model = VisionTransformer(config, img_size, CLASSES).eval()
        images = torch.empty(1, 3, img_size, img_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.head(model.transformer(images)[:, 0])
    return counter.get_total_flops()


def measure(remotes: list[Remote], table: str, options: Namespace) -> dict[str, dict]:
    """Two warm-up turns of every row, then the rounds. Returns name -> its record.

    No round but the first few starts when this table's part of `--minutes` is over.
    """
    records: dict[str, dict] = {}
    minutes = math.inf if options.minutes is None else options.minutes
    share = minutes * 60 / (len(options.tables) + 1)
    start_time = time.monotonic()
    # Peers' workers fill their queues between turns: with many batches a turn it matters less.
    steps = options.turn_steps * (20 if table == "data path" else 1)
    for i in range(2 + options.rounds):
        if i >= 2 + FEWEST_ROUNDS and time.monotonic() - start_time > share:
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
    """Add rates and ratios to `records`, in place. Ratios are ours to the row's, round by round.

    `flops` is of one image in this table, by the whole model: `peak` / `flops` is the bound that a
    share is of. Ours makes fewer operations, and could pass it. 0 where a share has no meaning.
    """
    for record in records.values():
        rates = [batch / seconds for seconds in record["seconds"]]
        record["rate"] = statistics.median(rates)
        record["low"], record["high"] = min(rates), max(rates)
        record["share"] = record["rate"] * flops / peak if flops else None
        if "ours" in records:
            pairs = zip(record["seconds"], records["ours"]["seconds"], strict=True)
            record["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)


def best_peer(records: dict[str, dict]) -> str | None:
    peers = {k: v["rate"] for k, v in records.items() if not k.startswith("ours") and "+" not in k}
    return max(peers, key=peers.get) if peers else None


def render(title: str, records: dict[str, dict]) -> str:
    """A markdown table; the last column says how many times as fast ours is."""
    lines = [f"| {title} | images/s | spread | share of bound | peak GiB | first step s | "
             "ours is |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, r in records.items():
        share = "" if r["share"] is None else f"{r['share']:.0%}"
        ratio = f"{r['ratio']:.2f} x" if "ratio" in r else ""
        mark = " (best peer)" if name == best_peer(records) else ""
        lines.append(f"| {name}{mark} | {r['rate']:.2f} | {r['low']:.2f}-{r['high']:.2f} | {share} "
                     f"| {r['memory_gib']:.1f} | {r['first_s']:.1f} | {ratio} |")  # fmt: skip
    return "\n".join(lines)


def facts(options: Namespace) -> dict:
    names = ("torch", "timm", "transformers", "torchvision")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        cpu = models[0].split(":")[1].strip() if models else cpu
    device = torch.cuda.get_device_name() if options.device == "cuda" else cpu
    return {"device": device, "cores": os.cpu_count(), "threads": options.threads,
            "capability": torch.backends.cpu.get_cpu_capability(), "python": sys.version.split()[0],
            "load": os.getloadavg(), **versions}  # fmt: skip


def parse(argv: list[str] | None) -> Namespace:
    device = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    device.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
    cuda = device.parse_known_args(argv)[0].device == "cuda"  # other defaults depend on it
    parser = argparse.ArgumentParser(
        prog="throughput.py",
        description="Images a second of ours and of its peers, interleaved.",
        formatter_class=HelpFormatter,
        parents=[device],
    )
    add = parser.add_argument
    add("--model_type", choices=list(CONFIGS), default="ViT-B_16", metavar="NAME")
    add("--layers", type=int, help="blocks, where fewer will do for a quick look")
    add("--img_size", type=int, default=224)
    add("--batch", type=int, default=512 if cuda else 16, help="images of an update")
    add("--accumulate", type=int, default=1, help="micro-batches of an update")
    half = cuda or cpu_has_bfloat16()
    add("--precision", choices=DTYPES, default="bf16" if half else "fp32")
    add("--level", choices=("O1", "O2", "O3"), default="O2", help="of ours, and of all peers but "
        "`port`, with a half precision")  # fmt: skip
    add("--dropout", type=float, help="the variant's own if not given")
    add("--rows", default=",".join(ROWS), help="comma-separated")
    add("--tables", default=",".join(TABLES), help="comma-separated")
    add("--ablation", nargs="?", const=",".join(LEVERS), metavar="LEVERS",
        help="no peers, but ours with each lever off: " + ", ".join(LEVERS))  # fmt: skip
    add("--rounds", type=int, default=5)
    add("--minutes", type=float, help="about how long it may take, on slow "
        f"machines with fewer rounds, but at least {FEWEST_ROUNDS}")  # fmt: skip
    add("--turn_steps", type=int, default=10 if cuda else 1, help="steps of a turn")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--cpu_time", action="store_true", help="count the process's CPU seconds instead of the "
        "clock's: for one thread on a CPU that others load, too")  # fmt: skip
    add(
        "--workers",
        type=int,
        default=min(4, os.cpu_count()),
        help="processes that decode images for the peers",
    )
    add("--compile", choices=("on", "off"), default="on" if cuda else "off",
        help="torch.compile ours and `timm best`")  # fmt: skip
    add("--json", metavar="FILE", help="write the record there")
    options = parser.parse_args(argv)
    if options.batch % options.accumulate:
        parser.error(f"--batch {options.batch} is not a multiple of --accumulate "
                     f"{options.accumulate}")  # fmt: skip
    options.rows = options.rows.split(",")
    if options.cpu_time:  # which does not count worker processes
        options.workers = 0
    if options.ablation:
        options.rows, options.ablation = [], options.ablation.split(",")
    options.tables = options.tables.split(",")
    known_rows = [*ROWS, *(f"{row} + {extra}" for row in ROWS for extra in EXTRAS)]
    for kind, given, known in (("--tables", options.tables, TABLES),
                               ("--rows", options.rows, known_rows),
                               ("--ablation", options.ablation or [], LEVERS)):  # fmt: skip
        unknown = set(given) - set(known)
        if unknown:
            parser.error(f"{kind} {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    return options


def run(options: Namespace, config: ViTConfig) -> dict:
    """Measure and print all tables; returns the record."""
    say = partial(print, flush=True)
    record = {"options": vars(options), "facts": facts(options), "missing": {}, "tables": {}}
    say(json.dumps(record["facts"]))
    peak = max(matmul_peak(options) for _ in range(3))

    flops = forward_flops(config, options.img_size)
    say(f"{options.model_type} at {options.img_size} px, batch {options.batch}, "
        f"{options.precision}, dropout {config.dropout_rate}: {flops * 3 / 1e9:.1f} GFLOP an image "
        "of training; the bound is the matmul peak over that")  # fmt: skip
    rows = start(options.rows, options, config)

    def close(finished: list[Remote]) -> None:
        for row in finished:
            row.close()
            if row.missing is not None:
                record["missing"][row.name] = row.missing
                say(f"\nnot measured: {row.name}: {row.missing}")

    def report(table: str, chosen: list[Remote], title: str = "") -> dict[str, dict]:
        nonlocal peak
        records = measure(chosen, table, options)
        peak = max(peak, matmul_peak(options))
        factor = {"training step": 3, "end to end": 3, "evaluation": 1}.get(table, 0)
        summarize(records, options.batch, factor * flops, peak)
        record["tables"].setdefault(title or table, {}).update(records)
        say("\n" + render(title or table, records))
        return records

    best = None
    for table in options.tables:
        if options.ablation:
            for lever in options.ablation:
                # Both start anew: a heap that many steps have shaped would be an advantage.
                pair = start(["ours", f"ours - {lever}"], options, config)
                report(table, pair, f"{table}, {lever}")
                close(pair)
        elif table in ("training step", "evaluation"):
            found = best_peer(report(table, rows))
            best = best or found  # of the training step, which end to end is held against
            if best and table == "training step" and options.device == "cpu":
                theirs = start([f"{best} + allocator"], options, config)
                ours = [row for row in rows if row.name == "ours"]
                report(table, ours + theirs, f"{table}, best peer with our allocator setting")
                close(theirs)
        else:
            report(table, [row for row in rows if row.name in ("ours", "timm", best)])
    close(rows)
    record["matmul_peak"], record["facts"]["load_after"] = peak, os.getloadavg()
    loads = " -> ".join(f"{record['facts'][key][0]:.1f}" for key in ("load", "load_after"))
    say(f"\nmatmul peak {peak / 1e12:.3f} TFLOP/s ({options.precision}); load average {loads}")
    return record


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    config = CONFIGS[options.model_type]
    if options.dropout is not None:
        config = replace(config, dropout_rate=options.dropout)
    if options.layers is not None:
        config = replace(config, num_layers=options.layers)
    record = run(options, config)
    if options.json:
        with written_whole(options.json) as temporary:
            temporary.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
