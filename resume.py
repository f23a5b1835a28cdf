"""Whether train.py starts a run, continues it, or leaves it: the lock, the save and its flags."""

import argparse
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from math import ceil
from pathlib import Path

from flags import EPOCHS_OF, build_parser
from models.errors import DamagedFile, UserError
from utils import dist_util
from utils.checkpoint import AUTO, RunPaths, SavedRun, read_run
from utils.files import atomic_write, exclusive_lock
from utils.metrics import read_results
from utils.run_log import RunLog

# Flags that may differ when a run is resumed: they say where and how, not what is computed, and
# `patience` when to stop.
FREE_FLAGS = {
    *("name", "resume", "overwrite", "output_dir", "data_dir", "num_workers", "eval_batch_size"),
    *("log_every", "save_every", "save_minutes", "gradient_accumulation_steps", "local_rank"),
    *("timeout", "device", "patience", "wandb"),
    *("deterministic", "offline", "compile", "grad_checkpointing", "cache"),
    *("skip_unreadable", "truncated_images", "max_pixels"),  # of images that stopped the run so far
}

# Flags that say how a process starts, and are no part of the run.
START_FLAGS = {"resume", "overwrite", "local_rank", "num_workers"}


def check_no_results(args: argparse.Namespace) -> None:
    """Raise UserError if the run has results that this command would replace unasked."""
    paths = RunPaths(args.output_dir, args.name)
    own = {path.resolve() for path in (paths.best, paths.adapters)}
    for start in (args.pretrained_dir, args.lora_from or ""):
        if args.overwrite and Path(start).resolve() in own:
            raise UserError(f"{start} would be overwritten: choose another --name")
    auto = args.resume == AUTO and not paths.last.exists()
    if args.overwrite or (paths.resumes_itself(args.resume) and not auto):
        return
    for path in (paths.results,) if auto else (paths.last, paths.best, paths.results):
        if path.exists():
            resume = "--resume continues that run, " if path == paths.last else ""
            raise UserError(
                f"{path} exists already: {resume}--overwrite replaces it, another --name keeps it"
            )


def begin_files(args: argparse.Namespace, paths: RunPaths, step: int, log: RunLog) -> None:
    """Make place for the files of a run that goes on after `step`, and note its flags."""
    log.open(Path("logs") / args.name, step + 1 if step else 0, vars(args), args.wandb)
    if args.overwrite:
        paths.delete()  # so that nothing resumes from the old run's files
    if step == 0:
        paths.keep_damaged()
    write_flags(paths.flags, args)


def write_flags(path: Path, args: argparse.Namespace) -> None:
    """Write the flags of a run, so that `train.py @path` makes the same run again."""
    lines = [f"# The same run again: python3 train.py @{path} --name OTHER"]
    for name, value in vars(args).items():
        if name in START_FLAGS or value is None or value is False:
            continue
        if name in EPOCHS_OF and getattr(args, EPOCHS_OF[name]) is not None:
            continue
        mark = "x" if name == "img_size" else ","
        text = mark.join(map(str, value)) if isinstance(value, tuple) else str(value)
        lines.append(f"--{name}" if value is True else f"--{name} {shlex.quote(text)}")
    with atomic_write(path) as temporary:
        temporary.write_bytes(os.fsencode("\n".join([*lines, ""])))


@contextmanager
def lock_run(args: argparse.Namespace) -> Iterator[None]:
    """Keep other processes from training the same --name in the same folder meanwhile."""
    path = RunPaths(args.output_dir, args.name).lock
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for folder in reversed(made):  # a command that is refused leaves no empty folder behind
            stack.callback(remove_if_empty, folder)
        try:
            # An earlier process of a run that is started again may still be stopping.
            wait = 60 * args.timeout if args.resume == AUTO else 0
            stack.enter_context(exclusive_lock(path, wait))
        except BlockingIOError as error:
            where = f"{args.name!r} in {args.output_dir}"
            advice = "wait for it, or choose another --name"
            raise UserError(f"another process trains {where}: {advice}") from error
        check_no_results(args)  # again: another process may have just finished
        yield


def remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def find_run(args: argparse.Namespace, log: Callable[[str], None]) -> SavedRun | None:
    """The run that --resume continues, the same on all processes; None starts a new one."""
    saved = read_saved(args, log)
    step = saved.state.step if saved else 0
    if dist_util.all_reduce_max(step) != -dist_util.all_reduce_max(-step):
        raise UserError(f"processes find different runs in {args.output_dir}: share the folder")
    return saved


def read_saved(args: argparse.Namespace, log: Callable[[str], None]) -> SavedRun | None:
    paths = RunPaths(args.output_dir, args.name)
    if args.resume is None or (args.resume == AUTO and not paths.last.exists()):
        return None
    try:
        saved = read_run(paths.resumed(args.resume))
    except DamagedFile as error:
        if args.resume != AUTO or paths.results.exists():
            raise
        log(f"note: {error}; it is kept as {paths.last}.damaged, and the run starts again")
        return None
    take_steps(args, saved.content["flags"])
    check_same_run(args, saved.path, saved.content["flags"])
    return saved


def take_steps(args: argparse.Namespace, saved: Mapping) -> None:
    """The steps that the epochs were in the saved run. The number of images is not known yet."""
    if args.epochs is not None and saved.get("epochs"):
        args.num_steps = ceil(round(saved["num_steps"] * args.epochs / saved["epochs"], 6))
    if args.warmup_epochs is not None:
        args.warmup_steps = saved["warmup_steps"]


def count_steps(args: argparse.Namespace, images: int) -> None:
    """Turn --epochs and --warmup_epochs into steps."""
    if args.epochs is not None:
        args.num_steps = max(1, ceil(round(args.epochs * images / args.train_batch_size, 6)))
    if args.warmup_epochs is not None:
        steps = args.warmup_epochs * images / args.train_batch_size
        args.warmup_steps = round(min(steps, args.num_steps))


def finished_line(args: argparse.Namespace, saved: SavedRun | None) -> str | None:
    """The figures of a run that is resumed after its end, and has its results; else None."""
    paths = RunPaths(args.output_dir, args.name)
    if not saved or not paths.resumes_itself(args.resume):
        return None
    state, results = saved.state, read_results(paths.results)
    training, by = results.get("training", {}), state.select_by
    if not state.finished(args.num_steps, args.patience) or training.get("steps") != state.step:
        return None
    end = f"after step {state.step} of {args.num_steps}"
    if state.step < args.num_steps:
        end += f" (--patience {args.patience}; a larger one continues)"
    figures = training[f"best_{by}"], results["accuracy"]  # None if it was not finite
    best, final = ("nan" if figure is None else f"{figure:.4f}" for figure in figures)
    best = f"best {by} {best} at step {training['best_step']}"
    final = f"{results['split']} accuracy {final}"
    return f"already finished {end}: {best}; {final}; results: {paths.results}"


def check_same_run(args: argparse.Namespace, path: Path, saved: Mapping) -> None:
    """Raise UserError if a flag would make another run of the one saved in `path`.

    More steps are allowed: they extend the run.
    """
    # A save may be older than a flag.
    saved = vars(build_parser().parse_args(["--name", args.name])) | saved
    longer = args.num_steps > saved["num_steps"] and bool(args.epochs) == bool(saved["epochs"])
    free = FREE_FLAGS | ({"num_steps", "epochs"} if longer else set())
    changed = [
        f"--{name} {value} (was {saved[name]})"
        for name, value in vars(args).items()
        if name not in free and value != saved[name]
    ]
    if changed:
        raise UserError(
            f"{path} belongs to another run: {', '.join(changed)}; give the same flags to resume, "
            "or another --name"
        )
