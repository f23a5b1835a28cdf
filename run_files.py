"""What a `--name` owns on the disk, and who may write there: no command costs another its work."""

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from utils.cli import FlagError
from utils.files import locked, same_file

# Flags that may differ when a run goes on: they say where and how, not what is computed.
FREE_FLAGS = {
    "name", "resume", "overwrite", "output_dir", "data_dir", "num_workers", "eval_batch_size",
    "log_every", "save_every", "gradient_accumulation_steps", "local_rank", "timeout",
    "deterministic", "offline", "compile", "grad_checkpointing", "eval_only",
}  # fmt: skip


def results_path(args) -> Path:
    return Path(args.output_dir) / f"{args.name}_results.json"


def report_path(args) -> Path:
    return Path(args.output_dir) / f"{args.name}_report"


def check_no_results(args: Namespace) -> None:
    """Raise FlagError where --name has results, unless --resume goes on with them: hours are not to
    be lost to an arrow key and Enter."""
    own = [
        Path(args.output_dir) / f"{args.name}_{end}"
        for end in ("last.pt", "checkpoint.bin", "results.json")
    ]
    if args.resume is not None and Path(args.resume or own[0]).resolve() == own[0].resolve():
        return
    for path in filter(Path.exists, own):
        goes_on = "--resume goes on with that run, " if path == own[0] else ""
        raise FlagError(f"{path} is there already: {goes_on}--overwrite replaces it, another "
                        "--name keeps it")  # fmt: skip


def check_other_results(args: Namespace) -> None:
    """Raise FlagError where results.json states the training of another file than is evaluated."""
    path = results_path(args)
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        other = earlier["training"] and not same_file(earlier["checkpoint"], args.eval_only)
    except (OSError, ValueError, KeyError, TypeError):
        return  # nothing that training wrote
    if other and not args.overwrite:
        raise FlagError(f"{path} states the training of {earlier['checkpoint']}: another --name "
                        "keeps it, --overwrite replaces it")  # fmt: skip


def check_same_run(args: Namespace, path: Path, saved: Mapping) -> None:
    """Raise FlagError where a flag would make of the run saved in `path` another one."""
    changed = [
        f"--{name} {value} (was {saved[name]})"
        for name, value in vars(args).items()
        if name in saved and name not in FREE_FLAGS and value != saved[name]
    ]
    if changed:
        raise FlagError(f"{path} belongs to another run: {', '.join(changed)}; give the same flags "
                        "to resume, or another --name")  # fmt: skip


@contextmanager
def name_held(args: Namespace, main: bool) -> Iterator[None]:
    """On the main process: nobody else trains this --name within the block, for which the folder of
    results is made. Raises FlagError where somebody does, or has done since the flags were parsed.
    """
    if not main:
        yield
        return
    folder = Path(args.output_dir)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for path in reversed(made):  # so that a run that is refused leaves nothing
            stack.callback(_remove_if_empty, path)
        try:
            stack.enter_context(locked(folder / f".{args.name}.lock"))
        except BlockingIOError:
            raise FlagError(f"another process is training {args.name!r} in {folder}: wait for it, "
                            "or choose another --name") from None  # fmt: skip
        if not args.overwrite:
            check_no_results(args)
        yield


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
