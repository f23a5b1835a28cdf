"""How scripts end."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import curves
import export
import fewshot
import predict
from tests.helpers import ROOT
from utils.files import SaveError
from utils.shell import status_of


@pytest.mark.parametrize(
    "ending, status, line",
    [
        (None, 0, ""),
        (3, 3, ""),
        (ValueError("no such colour"), 2, "paint.py: error: no such colour"),
        (SaveError("a.png could not be written"), 1, "paint.py: error: a.png could not be written"),
        (KeyboardInterrupt(), 130, "paint.py: stopped by SIGINT"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
            1,
            "paint.py: error: a process that decodes images was killed: lower --num_workers, or "
            "give the machine more memory (a container, --shm-size)",
        ),
        (ValueError("\udcff.png"), 2, "paint.py: error: \\udcff.png"),  # a name of odd bytes
    ],
)
def test_endings(ending, status, line, capsys):
    def main(argv):
        assert argv == ["red"]
        if isinstance(ending, BaseException):
            raise ending
        return ending

    assert status_of("paint.py", main, ["red"], (ValueError,)) == status
    assert capsys.readouterr().err.strip() == line


def test_a_file_that_cannot_be_opened_is_one_line(capsys):
    assert status_of("paint.py", lambda argv: open("no/red.png").close(), None, ()) == 2
    words = capsys.readouterr().err
    assert words == "paint.py: error: no/red.png: No such file or directory\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_behind_the_output_is_one_line():
    code = "from utils.shell import status_of\n" \
           "raise SystemExit(status_of('count.py', lambda argv: print(1), None, ()))\n"  # fmt: skip
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE,
                              text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    words = "count.py: error: the system refuses: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, words)


def test_what_was_printed_survives_a_file_that_cannot_be_written():
    code = "from utils.files import SaveError; from utils.shell import status_of\n" \
           "def main(argv):\n" \
           "    print('the table')\n" \
           "    error = SaveError('out.json could not be written')\n" \
           "    error.errno = 28\n" \
           "    raise error\n" \
           "raise SystemExit(status_of('count.py', main, None, ()))\n"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "the table\n")
    assert done.stderr == "count.py: error: out.json could not be written\n"


def test_an_output_that_the_shell_has_closed_is_no_failure():
    code = "import sys; from utils.shell import status_of\n" \
           "main = lambda argv: print(1, sys.stdout.isatty())\n" \
           "raise SystemExit(status_of('count.py', main, None, ()))\n"  # fmt: skip
    command, env = (
        f'exec "{sys.executable}" -c "{code}" >&-',
        os.environ | {"PYTHONPATH": str(ROOT)},
    )
    done = subprocess.run(command, shell=True, text=True, stderr=subprocess.PIPE, env=env)
    assert (done.returncode, done.stderr) == (0, "")


def test_training_needs_no_console(tmp_path):
    flags = "--name run --dataset digits --pretrained_dir none --model_type ViT-Ti_4 " \
            "--img_size 8 --num_steps 1 --warmup_steps 0 --train_batch_size 8"  # fmt: skip
    command = f'exec "{sys.executable}" "{ROOT}/train.py" {flags} >&- 2>&-'
    assert subprocess.run(command, shell=True, cwd=tmp_path).returncode == 0
    assert (tmp_path / "output" / "run_results.json").exists()


def test_no_memory_is_one_line(capsys):
    assert status_of("paint.py", lambda argv: np.empty(2**56).sum(), None, ()) == 1
    assert capsys.readouterr().err.startswith("paint.py: error: out of memory (Unable to allocate")


def test_a_bug_shows_its_traceback():
    with pytest.raises(ZeroDivisionError):
        status_of("paint.py", lambda argv: 1 // 0, None, (ValueError,))


@pytest.mark.parametrize("script", [curves, export, fewshot, predict])
def test_every_script_ends_so(script, monkeypatch, capsys):
    def main(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "main", main)
    assert script.run([]) == 130
    assert capsys.readouterr().err == f"{script.__name__}.py: stopped by SIGINT\n"


def test_a_reader_that_has_seen_enough():
    code = "from utils.shell import status_of\n" \
           "def main(argv):\n" \
           "    for i in range(10**6): print(i)\n" \
           "raise SystemExit(status_of('count.py', main, None, ()))\n"  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
