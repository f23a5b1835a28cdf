"""Command lines: what a flag's value may be, what a file to be written may be called."""

import argparse
import os
from argparse import ArgumentTypeError
from collections.abc import Iterable
from pathlib import Path

LONGEST_NAME = 200  # bytes; file systems allow 255, and our files' names have more than the user's


class FlagError(ValueError):
    """A flag, or a combination of flags, that cannot work; the message says what would."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are FlagErrors, and which takes no abbreviations."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False} | options)

    def error(self, message: str):
        raise FlagError(message)


def count(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def positive(text: str) -> int:
    """A whole number of images, updates or the like."""
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise ArgumentTypeError(f"{text!r} is not a whole number, 1 or more and below 2^31")
    return int(text)


def number(text: str) -> float:
    """A finite number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number, 0 or more")
    return value


def part(text: str) -> float:
    value = number(text)
    if value >= 1:
        raise ArgumentTypeError(f"{text!r} is not a fraction, from 0 to below 1")
    return value


def image_size(text: str) -> int | tuple[int, int]:
    """`224`, or `192x256` for height x width."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise ArgumentTypeError(
            f"{text!r} is neither a side like 224 nor height x width like 192x256"
        )
    return int(text) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def check_output(flag: str, path: str | None, inputs: Iterable[str | None] = ()) -> None:
    """Raise FlagError, before any work, where a file to be written cannot have that name, or is
    one of the `inputs`."""
    if path and Path(path).is_dir():
        raise FlagError(f"{flag} {path} is a folder: give the name of a file")
    if path and not Path(path).absolute().parent.is_dir():
        raise FlagError(f"{flag} {path}: no such folder: {Path(path).parent}")
    if path and os.path.realpath(path) in {os.path.realpath(each) for each in inputs if each}:
        raise FlagError(f"{flag} {path} is an input: it would be overwritten")


def check_input(flag: str, path: str | None) -> None:
    """Raise FlagError, before any work, where a file to be read is not there."""
    if path and not Path(path).is_file():
        raise FlagError(f"{flag} {path}: no such file")


def make_folder(flag: str, path: str | Path) -> None:
    """Make a folder with its parents; FlagError where that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlagError(f"{flag} {path} cannot be made: {os.strerror(error.errno)}") from None
