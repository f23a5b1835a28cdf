"""Argument types, checks of paths, and how commands end."""

import os
import subprocess
import sys
from argparse import ArgumentTypeError
from subprocess import PIPE
from unittest.mock import Mock, call

import pytest

import flags
import predict
from models.errors import RunError, UserError
from tests.helpers import ROOT
from utils import cli, dist_util
from utils.cli import Parser, check_output, run_script
from utils.signals import Interrupted

COMMANDS = ["train", "evaluate", "predict", "export", "probe", "attend", "curves"]


@pytest.mark.parametrize(
    "name, good, bad",
    [
        ("non_negative_int", {"0": 0, "12": 12}, ["-1", "1.5", "²", "", "x"]),
        ("positive_int", {"1": 1}, ["0", "-1", "1.0", "9" * 12]),
        ("non_negative_float", {"0": 0.0, "3e-2": 0.03}, ["-0.1", "inf", "nan", "x"]),
        ("fraction", {"0": 0.0, "0.99": 0.99}, ["1", "-0.1", "x"]),
        ("image_size", {"224": 224, "192x256": (192, 256)}, ["0", "192x", "1x2x3", "0x32", "a"]),
    ],
)
def test_argument_types(name, good, bad):
    convert = getattr(cli, name)
    assert {text: convert(text) for text in good} == good
    for text in bad:
        with pytest.raises(ArgumentTypeError, match=f"'{text}' is n"):
            convert(text)


def test_parser():
    parser = Parser(prog="paint.py")
    parser.add_argument("--steps", type=cli.non_negative_int, default=0, help="strokes")
    parser.add_argument("--colour", help="of the paint")
    parser.add_argument("--wet", action="store_true", help="on wet ground")
    for line in ("strokes (default: 0)\n", "of the paint\n", "on wet ground\n"):
        assert line in parser.format_help()
    for argv in (["--col", "red"], ["--steps", "x"], ["--shade"]):
        with pytest.raises(UserError):
            parser.parse_args(argv)


@pytest.mark.parametrize(
    "module, words, meant",
    [
        (flags, "--lr 0.1", "--learning_rate"),
        (flags, "--lr=0.1 --bogus -1", "--learning_rate"),
        (flags, "--learning-rate 0.1", "--learning_rate"),
        (flags, "--num_step 3", "--num_steps"),
        (flags, "--num_train_epochs 3", "--epochs"),
        (flags, "--batch-size 32", "--train_batch_size"),
        (flags, "--batch_size 32 -j 2", "--train_batch_size, --num_workers"),
        (flags, "--pretrained a.npz", "--pretrained_dir"),
        (flags, "--checkpoint a.npz", "--pretrained_dir"),
        (flags, "--model ViT-B_16", "--model_type"),
        (flags, "--data d", "--data_dir"),
        (flags, "--workers 2", "--num_workers"),
        (flags, "--image_size 2", "--img_size"),
        (flags, "--nonsense lr epochs", None),
        (predict, "--model a.bin --bs 2", "--checkpoint, --batch_size"),
        (predict, "--pretrained_dir a.bin", "--checkpoint"),
        (predict, "--epochs 3 --lr 1", None),
    ],
)
def test_an_unknown_flag_gets_the_one_that_is_meant(module, words, meant):
    needed = {flags: "--name run ", predict: "a.png --checkpoint c.bin "}[module]
    with pytest.raises(UserError) as caught:
        module.build_parser().parse_args((needed + words).split())
    hint = f"; did you mean {meant}?" if meant else ""
    assert str(caught.value) == f"unrecognized arguments: {words}{hint}"


@pytest.mark.parametrize(
    "words, message",
    [
        ("a.png --ckpt c.bin", "unrecognized arguments: --ckpt; did you mean --checkpoint?"),
        ("a.png", "the following arguments are required: --checkpoint"),
        ("a.png --top_k 2", "the following arguments are required: --checkpoint"),
    ],
)
def test_a_flag_that_is_required_under_another_name(words, message):
    with pytest.raises(UserError) as caught:
        predict.build_parser().parse_args(words.split())
    assert str(caught.value) == message


def test_paths(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    check_output(None)
    check_output(tmp_path / "new.png", inputs=[None, tmp_path / "file"])
    for check, path, message in [
        (check_output, tmp_path, "is a folder"),
        (check_output, tmp_path / "no" / "a.png", "there is no folder"),
        (lambda path: check_output(path, [tmp_path / "file"]), tmp_path / "link", "is an input"),
        (lambda path: check_output(path, [tmp_path / "link"]), tmp_path / "file", "is an input"),
    ]:
        with pytest.raises(UserError, match=message):
            check(path)


def ending(error):
    """The exit status of a command that raises `error`, or returns it."""

    def main(argv):
        assert argv == ["red"]
        if isinstance(error, BaseException):
            raise error
        return error

    return run_script("paint.py", main, ["red"])


KILLED = "DataLoader worker (pid 7) is killed by signal: Bus error."


@pytest.mark.parametrize(
    "error, status, line",
    [
        (None, 0, ""),
        (3, 3, ""),
        (UserError("no such colour"), 2, "error: no such colour"),
        (UserError("\udcff.png"), 2, "error: \\udcff.png"),  # a file name that is not UTF-8
        (RunError("a.png could not be written"), 1, "error: a.png could not be written"),
        (FileNotFoundError(2, "?", "a.png"), 2, "error: a.png: No such file or directory"),
        (OSError(28, "?"), 1, "error: No space left on device"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
        (Interrupted(143, "saved in a.pt"), 143, "stopped by SIGTERM; saved in a.pt"),
        (MemoryError("of 9 GiB"), 1, "error: out of memory (of 9 GiB): a smaller batch or image"),
        (RuntimeError(KILLED), 1, "error: a worker process that reads images was killed: "),
        (ValueError("a bug"), 1, None),
        (OSError("a bug"), 1, None),
    ],
)
def test_exit_status_and_line(error, status, line, capsys):
    assert ending(error) == status
    err = capsys.readouterr().err
    if line is None:
        assert err.startswith("Traceback") and f"{type(error).__name__}: {error}" in err
    else:
        assert err.startswith(f"paint.py: {line}" if line else "")
        assert err.count("\n") == bool(line)


@pytest.mark.parametrize("rank", ["0", "5"])
def test_a_process_of_several_that_fails_does_not_wait_for_the_others(rank, monkeypatch, capsys):
    """Every process finds a mistake of the user, or stops: rank 0 says so."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(dist_util, "world_size", lambda: 8)
    monkeypatch.setattr(os, "_exit", Mock())
    stop = Interrupted(143, "saved in a.pt")
    for error in (None, stop, UserError("red"), RunError("blue"), ValueError("a bug")):
        ending(error)
    assert os._exit.call_args_list == [call(2), call(1), call(1)]
    err = capsys.readouterr().err
    words = ("stopped by SIGTERM", "error: red", "error: blue", "ValueError: a bug")
    assert [word in err for word in words] == [rank == "0", rank == "0", True, True]


@pytest.mark.parametrize("lines", [1, 10**6])
def test_a_reader_that_closes_the_output_early(lines):
    code = (
        "import sys; from utils.cli import run_script\n"
        f"main = lambda argv: sys.stdin.read() or print(*range({lines}), sep='\\n')\n"
        "raise SystemExit(run_script('count.py', main))\n"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_an_output_that_the_shell_has_closed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert run_script("paint.py", lambda argv: print("red")) == 0
    assert capsys.readouterr().err == ""


def test_every_command_ends_like_this_and_starts_fast():
    code = (
        "import runpy, sys\n"
        f"for name in {COMMANDS}:\n"
        "    sys.argv = [name + '.py', '--nonsense']\n"
        "    try: runpy.run_path(name + '.py', run_name='__main__')\n"
        "    except SystemExit as end: assert end.code == 2, name\n"
        "    else: raise AssertionError(name)\n"
        "slow = {'matplotlib', 'tensorboard', 'sklearn', 'scipy', 'timm', 'onnx', 'gradio'}\n"
        "assert not slow & sys.modules.keys(), slow & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line.partition(": error: ")[0] for line in lines] == [f"{c}.py" for c in COMMANDS]
