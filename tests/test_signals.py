"""Signals as requests: which count, and what is left after a save."""

import os
import signal

import pytest

from utils.signals import NOTHING, REPEAT_SECONDS, SAVE, Requests


class Left(Exception):
    pass


@pytest.fixture
def requests(monkeypatch):
    """Makes Requests; leaving at once is an exception with the status."""

    def leave(status):
        raise Left(status)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(os, "write", lambda *_: said.append(_[1]))
    made, said = [], []

    def make(processes):
        made.append(Requests(processes))
        return made[-1]

    make.said = said
    yield make
    for each in made:
        each.close()


def test_a_launcher_repeats_what_the_terminal_has_sent(requests):
    asked = requests(2)
    asked._note(signal.SIGINT, None)
    asked._note(signal.SIGTERM, None)  # the launcher's, at once
    assert asked.pending == signal.SIGTERM
    asked.first_stop -= REPEAT_SECONDS
    with pytest.raises(Left, match=str(128 + signal.SIGINT)):
        asked._note(signal.SIGINT, None)


def test_one_process_leaves_at_the_second_signal(requests, capsys):
    asked = requests(1)
    with capsys.disabled():  # a real stderr
        asked._note(signal.SIGTERM, None)
    assert b"SIGTERM: ends after this update" in requests.said[0] and len(requests.said) == 1
    with pytest.raises(Left, match=str(128 + signal.SIGTERM)):
        asked._note(signal.SIGTERM, None)


def test_a_stop_during_a_save_is_not_forgotten(requests):
    asked = requests(1)
    asked._note(signal.SIGUSR1, None)
    assert asked.pending == SAVE
    asked.met()
    assert asked.pending == NOTHING
    asked._note(signal.SIGUSR1, None)
    asked._note(signal.SIGTERM, None)
    asked.met()
    assert asked.pending == signal.SIGTERM


def test_the_handlers_of_before_come_back(requests):
    before = signal.getsignal(signal.SIGUSR1)
    asked = requests(1)
    assert signal.getsignal(signal.SIGUSR1) == asked._note
    asked.close()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_closing_terminal_signals_twice(requests):
    asked = requests(1)
    asked._note(signal.SIGHUP, None)
    asked._note(signal.SIGHUP, None)
    assert asked.pending == signal.SIGHUP > SAVE


def test_nohup_is_respected(requests):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        requests(1).close()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        asked = requests(1)
        assert signal.getsignal(signal.SIGHUP) == asked._note
        asked.close()
    finally:
        signal.signal(signal.SIGHUP, before)
