"""Draw the accuracy of several runs over their steps, from their TensorBoard logs.

    python3 curves.py --output curves.png tuned=logs/a_1 tuned=logs/a_2 "from scratch=logs/b_1"

Runs with the same label, such as those of several seeds, are one curve: their mean, with a band
from the lowest to the highest. The same values are printed as a table.
"""

import logging
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
from PIL import Image

from models.errors import UserError
from utils.cli import Parser, check_output, run_script
from utils.figures import escape_label, new_figure, render
from utils.files import atomic_write

Group = tuple[list[int], list[list[float]]]  # steps, and the accuracies of each run at them


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if Path(args.output).suffix.lower() not in (".png", ".jpg"):
        raise UserError(f"--output {args.output} must end in .png or .jpg")
    groups: dict[str, Group] = {}
    for label, folder in map(split_label, args.runs):
        steps, accuracies = read_run(folder)
        group = groups.setdefault(label, (steps, []))
        if group[0] != steps:
            raise UserError(f"{folder} was not evaluated at the steps of other runs of {label!r}")
        group[1].append(accuracies)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    check_output(args.output)
    picture, table = draw(groups, args.title)
    with atomic_write(args.output) as temporary:
        picture.save(temporary)
    print(f"{table}\ncurves: {args.output}")


def build_parser() -> Parser:
    style = RawDescriptionHelpFormatter
    parser = Parser(prog="curves.py", description=__doc__, formatter_class=style)
    flag = parser.add_argument
    flag("runs", nargs="+", metavar="LABEL=FOLDER", help="a run's label and its folder logs/NAME")
    flag("--output", default="curves.png", metavar="FILE", help="picture (default: %(default)s)")
    flag("--title", default="", help="title of the picture")
    return parser


def split_label(text: str) -> tuple[str, Path]:
    """(label, folder) of LABEL=FOLDER, or of FOLDER alone. Both may contain a = themselves."""
    parts = text.split("=")
    for i in range(len(parts)):
        folder = Path("=".join(parts[i:]))
        if folder.is_dir():
            return "=".join(parts[:i]) or folder.name, folder
    return parts[0], Path(parts[-1])


def read_run(folder: Path) -> tuple[list[int], list[float]]:
    """(steps, validation accuracies), else test accuracies. Raises UserError if there are none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # TensorBoard warns of folders that a resumed run wrote to twice, but reads them correctly.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    log = EventAccumulator(str(folder)).Reload() if folder.is_dir() else None
    for tag in ("val/accuracy", "test/accuracy"):
        if log and tag in log.Tags()["scalars"]:
            points = {point.step: point.value for point in log.Scalars(tag)}
            return sorted(points), [points[step] for step in sorted(points)]
    raise UserError(f"{folder} has no accuracies of a run of train.py")


def draw(groups: dict[str, Group], title: str = "") -> tuple[Image.Image, str]:
    """A curve for each label, and a Markdown table of the last and the best accuracies."""
    rows = ["| | runs | steps | last accuracy | best accuracy |", "|---|---|---|---|---|"]
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    for i, (label, (steps, accuracies)) in enumerate(groups.items()):
        values = np.array(accuracies)  # (runs, steps)
        last, best = summary(values[:, -1]), summary(values.max(axis=1))
        rows.append(f"| {label} | {len(values)} | {steps[-1]} | {last} | {best} |")
        mean = values.mean(axis=0)
        (line,) = axes.plot(steps, mean, marker="o", markersize=3, label=escape_label(label, 80))
        style = {"color": line.get_color()}
        axes.fill_between(steps, values.min(0), values.max(0), alpha=0.2, linewidth=0, **style)
        style |= {"xytext": (5, 0), "textcoords": "offset points"}
        style["va"] = ("bottom", "top")[i % 2]  # so that two that end in one point can be read
        axes.annotate(f"{mean[-1]:.3f}", (steps[-1], mean[-1]), **style)
    axes.set(xlabel="steps", ylabel="accuracy", ylim=(0, 1), title=escape_label(title, 80))
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    beside = {"loc": "center left", "bbox_to_anchor": (1.08, 0.5), "fontsize": 8}
    few = len(groups) <= 6  # more labels would cover the curves
    axes.legend(frameon=False, **({"loc": "lower right"} if few else beside))
    return render(figure), "\n".join(rows)


def summary(values: np.ndarray) -> str:
    mean = f"{values.mean():.4f}"
    return mean if len(values) == 1 else f"{mean} ({values.min():.4f} to {values.max():.4f})"


if __name__ == "__main__":
    sys.exit(run_script("curves.py", main))
