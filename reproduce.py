"""Run a recipe for several seeds, and compare its accuracy with the published one.

    python3 reproduce.py recipes/google-vit-cifar10.txt --seeds 3 --gradient_accumulation_steps 8

Further flags are train.py's. Every run resumes: the same command goes on where it was interrupted.
"""

import re
import subprocess
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import flags
from models.errors import RunError, UserError
from utils.checkpoint import RunPaths
from utils.cli import Parser, positive_int, run_script
from utils.files import atomic_write
from utils.metrics import read_results

TRAIN = Path(__file__).with_name("train.py")


def main(argv: Sequence[str] | None = None) -> None:
    args, others = build_parser().parse_known_args(argv)
    if not args.recipe.is_file():
        raise UserError(f"{args.recipe}: no such file: give one of recipes/")
    launcher = [sys.executable]
    if args.processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={args.processes}"]
    results = []
    for seed in range(1, args.seeds + 1):
        name = f"{args.recipe.stem}_{seed}"
        run = [f"@{args.recipe}", *others, "--name", name, "--seed", str(seed), "--resume", "auto"]
        paths = RunPaths(flags.parse_flags(run, args.processes).output_dir, name)
        print(f"seed {seed} of {args.seeds}: train.py {' '.join(run)}", flush=True)
        if status := subprocess.run([*launcher, TRAIN, *run]).returncode:
            raise RunError(f"seed {seed} ended with status {status}: the same command goes on")
        results.append(read_results(paths.results))
    text = table(args.recipe, others, results)
    path = paths.results.with_name(f"{args.recipe.stem}_reproduced.md")
    with atomic_write(path) as temporary:
        temporary.write_text(text)
    print(f"{text}table: {path}")


def build_parser() -> Parser:
    style = RawDescriptionHelpFormatter
    parser = Parser(prog="reproduce.py", description=__doc__, formatter_class=style)
    flag = parser.add_argument
    flag("recipe", type=Path, metavar="FILE", help="of recipes/")
    flag("--seeds", type=positive_int, default=3, metavar="COUNT",
         help="runs, with the seeds 1 to COUNT (default: %(default)s)")  # fmt: skip
    flag("--processes", type=positive_int, default=1, metavar="COUNT",
         help="one for each GPU of this machine (default: %(default)s)")  # fmt: skip
    return parser


def published(recipe: Path) -> float | None:
    """The first number of the recipe's line `# Published:`, if there is one."""
    found = re.search(r"^# Published: (0\.\d+)", recipe.read_text(), re.MULTILINE)
    return float(found[1]) if found else None


def table(recipe: Path, others: Sequence[str], results: Sequence[dict]) -> str:
    """A Markdown table of the runs, their mean and the published accuracy."""
    scores = [result["accuracy"] for result in results]
    rows = ["| seed | accuracy | steps | time | hardware |", "|---|---|---|---|---|"]
    for seed, result in enumerate(results, start=1):
        run = result["training"]
        time, device = f"{run['seconds'] / 60:.1f} min", run["device"]
        rows.append(f"| {seed} | {result['accuracy']:.4f} | {run['steps']} | {time} | {device} |")
    mean, reference = fmean(scores), published(recipe)
    line = f"mean {mean:.4f} ({min(scores):.4f} to {max(scores):.4f})"
    if reference is None:
        line += "; nothing is published for this recipe"
    else:
        line += f"; published {reference:.4f}; difference {mean - reference:+.4f}"
    first = results[0]
    about = f"{recipe.stem}: {first['variant']}, {first['split']} accuracy of {first['images']}"
    changed = f"changed: {' '.join(others)}\n\n" if others else ""
    rows = "\n".join(rows)
    return f"{about} images, {first['data']}\n\n{changed}{rows}\n\n{line}\n"


if __name__ == "__main__":
    sys.exit(run_script("reproduce.py", main))
