"""What flags may say, and how help shows them."""

from argparse import ArgumentTypeError

import pytest

from utils.cli import (
    FlagError,
    Parser,
    check_output,
    count,
    image_size,
    make_folder,
    number,
    part,
    positive,
)


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (count, {"0": 0, "12": 12}, ["-1", "1.5", "²", "", "x"]),
        (positive, {"1": 1}, ["0", "-1", "1.0", "9" * 12]),
        (number, {"0": 0.0, "3e-2": 0.03}, ["-0.1", "inf", "nan", "x"]),
        (part, {"0": 0.0, "0.99": 0.99}, ["1", "-0.1", "x"]),
        (image_size, {"224": 224, "192x256": (192, 256)}, ["0", "192x", "1x2x3", "0x32", "a"]),
    ],
)
def test_values(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(ArgumentTypeError):
            kind(text)


def test_help_shows_the_defaults_that_there_are():
    parser = Parser(prog="paint.py")
    parser.add_argument("--steps", type=count, default=0, help="strokes")
    parser.add_argument("--colour", help="of the paint")
    parser.add_argument("--wet", action="store_true", help="on wet ground")
    words = parser.format_help()
    assert "strokes (default: 0)" in words
    assert "of the paint\n" in words and "on wet ground\n" in words
    for argv in (["--col", "red"], ["--steps", "x"], ["--shade"]):
        with pytest.raises(FlagError):
            parser.parse_args(argv)


def test_outputs(tmp_path):
    check_output("--output", None)
    check_output("--output", str(tmp_path / "new.png"))
    for path, words in [(tmp_path, "is a folder"), (tmp_path / "no" / "a.png", "no such folder")]:
        with pytest.raises(FlagError, match=words):
            check_output("--output", str(path))
    make_folder("--attention", tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(FlagError, match=r"--attention .* cannot be made: Not a directory"):
        make_folder("--attention", tmp_path / "file" / "b")
