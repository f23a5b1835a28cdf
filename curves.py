"""Draw runs beside each other: accuracy on the held-out images over the updates, from their logs.

    python3 curves.py --output seen.png tuned=logs/a_1 tuned=logs/a_2 "from scratch=logs/b_1"

Runs of one label, such as those of several seeds, are one curve: their mean, and a band from the
lowest to the highest. The same figures are printed as a table.
"""

import logging
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.cli import FlagError, Parser, check_output, make_folder
from utils.figures import accuracy_curves
from utils.files import written_whole
from utils.shell import status_of

# Folders that --overwrite or --resume wrote into twice are read rightly; it remarks on each.
logging.getLogger("tensorboard").setLevel(logging.ERROR)

Curve = dict[int, float]  # update -> accuracy


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if Path(args.output).suffix.lower() not in (".png", ".jpg"):
        raise FlagError(f"--output {args.output}: must end in .png or .jpg")
    groups: dict[str, list[Curve]] = {}
    for text in args.runs:
        label, folder = labelled(text)
        groups.setdefault(label, []).append(read_curve(folder))
    for label, curves in groups.items():
        if any(curve.keys() != curves[0].keys() for curve in curves):
            raise FlagError(f"the runs of {label!r} were not evaluated at the same updates")
    make_folder("the folder of --output,", Path(args.output).parent)
    check_output("--output", args.output)
    picture = accuracy_curves(groups, args.title)
    with written_whole(args.output) as temporary:
        picture.save(temporary)
    print(table(groups))
    print(f"curves: {args.output}")


def build_parser() -> Parser:
    parser = Parser(
        prog="curves.py",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="LABEL=FOLDER", help="a run's folder of curves, logs/<name>"
    )
    parser.add_argument("--output", default="curves.png", metavar="FILE",
                        help="where the picture goes (default: %(default)s)")  # fmt: skip
    parser.add_argument("--title", default="", help="the words above it")
    return parser


def labelled(text: str) -> tuple[str, Path]:
    """(label, folder) of LABEL=FOLDER, either of which may have an = of its own, or of FOLDER."""
    parts = text.split("=")
    for i in range(len(parts)):
        if (folder := Path("=".join(parts[i:]))).is_dir():
            return "=".join(parts[:i]) or folder.name, folder
    return parts[0], Path(parts[-1])


def read_curve(folder: Path) -> Curve:
    """The held-out accuracy of each evaluation; FlagError where the folder has none.

    A run that selects on validation images has its test accuracy but once, at the end.
    """
    log = EventAccumulator(str(folder)).Reload() if folder.is_dir() else None
    found = log.Tags()["scalars"] if log else []
    for tag in ("val/accuracy", "test/accuracy"):
        if tag in found and (points := log.Scalars(tag)):
            return {point.step: point.value for point in points}
    raise FlagError(f"{folder} holds no accuracies of a run of train.py")


def table(groups: dict[str, list[Curve]]) -> str:
    """Markdown: of each label the last and the best accuracy, as mean (lowest to highest)."""
    lines = ["| | runs | updates | accuracy at the end | best |", "|---|---|---|---|---|"]
    for label, curves in groups.items():
        cells = [
            summary([pick(curve) for curve in curves])
            for pick in (lambda curve: curve[max(curve)], lambda curve: max(curve.values()))
        ]
        lines.append(f"| {label} | {len(curves)} | {max(curves[0])} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def summary(values: list[float]) -> str:
    mean = f"{sum(values) / len(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def run(argv: list[str] | None = None) -> int:
    """`main` for the shell."""
    return status_of("curves.py", main, argv, (FlagError,))


if __name__ == "__main__":
    sys.exit(run())
