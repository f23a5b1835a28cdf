"""What all commands share: argument types, checks of paths, and how a command ends."""

import os
import shlex
import signal
import sys
import traceback
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from math import inf, nextafter
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from models.errors import RunError, UserError
from models.pixels import RESIZES
from utils import dist_util
from utils.hardware import auto_workers, out_of_memory_reason
from utils.signals import Interrupted

# What other programs call a flag of ours. A word counts for the first flag that the command has.
OTHER_NAMES = {
    "learning_rate": "lr base_lr",
    "num_steps": "max_steps steps",
    "epochs": "epoch max_epochs num_epochs num_train_epochs",
    "batch_size": "batch bs",
    "train_batch_size": "batch bs batch_size",
    "checkpoint": "ckpt model model_path pretrained pretrained_dir weights",
    "pretrained_dir": "ckpt checkpoint pretrained weights",
    "model_type": "arch model variant",
    "data_dir": "data data_path root",
    "num_workers": "j workers",
}


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Shows the default of every argument that has one."""

    def _get_help_string(self, action: Action) -> str | None:
        no_value = action.default is None or action.default is False  # 0 is a value
        return action.help if no_value else super()._get_help_string(action)


class Parser(ArgumentParser):
    """An ArgumentParser that raises UserError, shows defaults and accepts no abbreviations.

    With fromfile_prefix_chars="@", an argument @FILE stands for the arguments in a text file: a
    flag and its value a line, and comments after #.
    """

    def __init__(self, formatter_class=HelpFormatter, **options):
        super().__init__(formatter_class=formatter_class, allow_abbrev=False, **options)

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"a line of the file of flags is wrong: {line} ({error})") from error

    def error(self, message: str):
        raise UserError(message)

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        try:
            values, unknown = self.parse_known_args(words, namespace)
        except UserError as error:  # a flag that is required may be there under another name
            unknown = [word for word in words if self._flag_meant_by(word)]
            if "required" not in str(error) or not unknown:
                raise
        if unknown:
            meant = ", ".join(filter(None, map(self._flag_meant_by, unknown)))
            hint = f"; did you mean {meant}?" if meant else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return values

    def _flag_meant_by(self, word: str) -> str | None:
        flag = word.partition("=")[0]
        name = flag.lstrip("-").replace("-", "_").lower()
        own = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        found = [f for f, others in OTHER_NAMES.items() if f in own and name in others.split()]
        found = found or get_close_matches(name, own, 1, 0.7)
        if not found or not flag.startswith("-") or flag in self._option_string_actions:
            return None
        return f"--{found[0]}"


def number(convert: Callable, first: float, limit: float, meaning: str) -> Callable:
    """An argument type: numbers from `first` to below `limit`, which `meaning` says in words."""

    def parse(text: str):
        try:
            value = convert(text)
        except ValueError:
            value = first - 1
        if not first <= value < limit:
            raise ArgumentTypeError(f"{text!r} is not {meaning}")
        return value

    return parse


non_negative_int = number(int, 0, inf, "a whole number, 0 or more")
positive_int = number(int, 1, 2**31, "a whole number, 1 or more and below 2^31")
non_negative_float = number(float, 0, inf, "a number, 0 or more")
positive_float = number(float, nextafter(0, 1), 2**31, "a number above 0 and below 2^31")
fraction = number(float, 0, 1, "a fraction, from 0 to below 1")
positive_fraction = number(float, nextafter(0, 1), nextafter(1, 2), "above 0, at most 1")


def rand_augment(text: str) -> tuple[int, int]:
    """`2,9`: operations on an image, and their magnitude of 0 to 30."""
    count, _, magnitude = text.partition(",")
    known = count.isdecimal() and magnitude.isdecimal() and 0 < int(count) < 15
    if not known or int(magnitude) > 30:
        raise ArgumentTypeError(f"{text!r} is not N,M: operations, and a magnitude up to 30: 2,9")
    return int(count), int(magnitude)


def image_size(text: str) -> int | tuple[int, int]:
    """`224`, or `192x256` for height x width."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ArgumentTypeError(f"{text!r} is neither a side (224) nor height x width (192x256)")
    return int(text) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def resize_mode(text: str) -> str | int:
    """One of RESIZES, or the smaller side in pixels."""
    if text not in RESIZES and not (text.isdecimal() and 0 < int(text) < 2**31):
        raise ArgumentTypeError(f"{text!r} is none of {', '.join(RESIZES)} and a number of pixels")
    return text if text in RESIZES else int(text)


def worker_count(text: str) -> int:
    return auto_workers() if text == "auto" else non_negative_int(text)


def cache_size(text: str) -> str | float:
    return text if text == "auto" else 0.0 if text == "off" else non_negative_float(text)


def check_output(path: str | Path | None, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raise UserError if no file `path` can be written, or if it is one of the `inputs`."""
    if not path:
        return
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: give the name of a file")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {Path(path).parent}")
    if os.path.realpath(path) in {os.path.realpath(each) for each in inputs if each}:
        raise UserError(f"{path} is an input and would be overwritten: choose another name")


def printable(name: str) -> str:
    """A file name as text, even if its bytes are not UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def run_script(
    program: str,
    main: Callable,
    argv: Sequence[str] | None = None,
    less_memory: str = "a smaller batch or image size needs less",
) -> int:
    """Run `main(argv)` and return the exit status of the command.

    A known error becomes one line on stderr; any other exception shows its traceback.
    `less_memory` is the advice where memory is exhausted.
    """
    error = None
    try:
        status = main(argv) or 0
        print(end="", flush=True)  # so that a full disk fails here, not at Python's exit
    except (Exception, KeyboardInterrupt) as caught:
        error = caught
        status, line = exit_status(error, less_memory)
        if not isinstance(error, UserError | Interrupted):
            get_error_handler().record_exception(error)  # for the summary of torchrun
        # Every process finds a mistake of the user, and the first one of each machine prints it.
        rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))
        elsewhere = isinstance(error, UserError | Interrupted) and rank.isdecimal() and int(rank)
        with suppress(OSError):  # the terminal may be gone
            if line is None:
                traceback.print_exception(error)
            elif line and not elsewhere:
                print(printable(f"{program}: {line}"), file=sys.stderr)
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the shell
        try:
            stream.flush()
        except OSError:  # Python flushes again at its exit, and would change the exit status
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if error and dist_util.world_size() > 1 and not isinstance(error, Interrupted):
        # A normal exit waits for the other processes, and they wait for this one. The launcher
        # ends them as soon as this process is gone.
        os._exit(status)
    dist_util.shutdown()
    return status


def exit_status(error: BaseException, less_memory: str = "") -> tuple[int, str | None]:
    """The exit status for `error`, and its line: "" for none, None for a bug's traceback."""
    if isinstance(error, UserError | RunError):
        return 2 if isinstance(error, UserError) else 1, f"error: {error}"
    if isinstance(error, Interrupted):
        return error.status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "stopped by SIGINT"
    if isinstance(error, BrokenPipeError):
        return 141, ""  # 128 + SIGPIPE, which Windows lacks: the reader has enough, like `head`
    if reason := out_of_memory_reason(error):
        return 1, f"error: out of memory ({reason}): {less_memory}"
    if isinstance(error, OSError) and error.errno:
        file = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return 2 if file else 1, f"error: {file}{os.strerror(error.errno)}"
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        advice = "use fewer workers, or give the machine (a container: /dev/shm) more memory"
        return 1, f"error: a worker process that reads images was killed: {advice}"
    return 1, None
