"""Downloads over real sockets: every fault of a server, and several processes at once."""

import io
import subprocess
import sys
import time

import numpy as np
import pytest

from models.download import by_hand, check_address, download
from models.errors import UserError
from tests.bucket import Bucket
from tests.helpers import ROOT

DATA = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_100)
HALF = len(DATA) // 2
NAME = "bucket/file.npz"


def fetch(server, target, **options):
    """Download without pauses. Returns the first bytes that the server was asked for."""
    options = {"pause": 0.0, "timeout": 0.5, "attempts": 3} | options
    download(f"{server.url}/{NAME}", target, **options)
    return [begin for _, begin in server.seen]


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_file_is_downloaded_once(tmp_path, capsys):
    target = tmp_path / "new" / "folder" / "file.npz"
    with Bucket({NAME: DATA}) as server:
        assert fetch(server, target) == [None]
        assert target.read_bytes() == DATA and names(target.parent) == ["file.npz"]
        line = f"downloading {server.url}/{NAME} to {target}\n"
        assert capsys.readouterr() == ("", line)
        fetch(server, target)
        assert len(server.seen) == 1 and capsys.readouterr().err == ""


# Faults, one a request -> where each request begins; None asks for the whole file.
RECOVERED = {
    ("drop",): [None, HALF],
    ("drop", "drop"): [None, HALF, (HALF + len(DATA)) // 2],
    ("stall",): [None, HALF],
    ("hang up",): [None, None],
    ("500",): [None, None],
    ("503", "429"): [None, None, None],
    ("drop", "500"): [None, HALF, HALF],
    ("drop", "no range"): [None, HALF],
    ("drop", "wrong range"): [None, HALF, None],
    ("drop", "half the range"): [None, HALF, (HALF + len(DATA)) // 2],
    ("long",): [None, len(DATA), None],  # the second answer is 416
    ("no length",): [None],
}


@pytest.mark.parametrize("faults", RECOVERED, ids=" then ".join)
def test_temporary_faults(faults, tmp_path):
    start = time.monotonic()
    with Bucket({NAME: DATA}, faults) as server:
        assert fetch(server, tmp_path / "file.npz") == RECOVERED[faults]
        assert time.monotonic() - start < 20  # a stall is no wait for the server
    assert (tmp_path / "file.npz").read_bytes() == DATA and names(tmp_path) == ["file.npz"]


def test_a_drop_after_new_bytes_is_no_failed_attempt(tmp_path):
    with Bucket({NAME: DATA}, ["drop"] * 8) as server:
        fetch(server, tmp_path / "file.npz", attempts=1)
    assert server.sent == len(DATA)  # no byte came twice


@pytest.mark.parametrize(
    ("fault", "tries", "reason"),
    [
        ("403", 1, "403: Forbidden"),
        ("500", 3, "500: Internal Server Error"),
        ("hang up", 3, "closed connection without response"),
        ("drop, no range", 4, "150,000 of 300,000 bytes arrived"),  # only the first brings new ones
        ("long", 4, "416"),
    ],
)
def test_lasting_faults_end_with_one_line(fault, tries, reason, tmp_path):
    target = tmp_path / "file.npz"
    with Bucket({NAME: DATA}, [fault] * 20) as server:
        with pytest.raises(UserError, match=reason) as caught:
            fetch(server, target)
        url = f"{server.url}/{NAME}"
    assert len(server.seen) == tries
    line = str(caught.value)
    assert "\n" not in line and url in line and line.endswith(f"by hand: {by_hand(url, target)}")
    assert not target.exists()


def test_missing_file_unreachable_server_and_unknown_host(tmp_path, capsys):
    target = tmp_path / "file.npz"
    with Bucket({}) as server, pytest.raises(UserError, match=r"404: Not Found\b.*curl"):
        fetch(server, target)
    assert len(server.seen) == 1 and "trying again" not in capsys.readouterr().err
    with pytest.raises(UserError, match=r"Connection refused.*by hand: curl"):
        fetch(server, target)  # it is closed now
    assert capsys.readouterr().err.count("refused>; trying again\n") == 2
    with pytest.raises(UserError, match="by hand: curl"):
        download("https://no-such-host.invalid/x.npz", target, pause=0.0)
    assert names(tmp_path) == []
    (tmp_path / "plain").write_text("")
    with pytest.raises(UserError, match=r"plain/file\.npz cannot be written"):
        fetch(server, tmp_path / "plain" / "file.npz")


def test_pauses_double(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr("models.download.time.sleep", pauses.append)
    with Bucket({NAME: DATA}, ["500"] * 4) as server:
        fetch(server, tmp_path / "file.npz", pause=0.5, attempts=5)
    assert pauses == [0.5, 1, 2, 4]


@pytest.mark.parametrize("fault", ["", "no range"])
@pytest.mark.parametrize("part", [DATA[:1000], OTHER], ids=["continued", "of a longer file"])
def test_a_later_call(part, fault, tmp_path):
    (tmp_path / "file.npz.part").write_bytes(part)
    with Bucket({NAME: DATA}, [fault]) as server:
        assert fetch(server, tmp_path / "file.npz")[0] == len(part)
    assert (tmp_path / "file.npz").read_bytes() == DATA
    if part != OTHER and not fault:
        assert server.sent == len(DATA) - 1000


@pytest.mark.parametrize(("rank", "shown"), [(None, True), ("0", True), ("1", False)])
def test_the_bar_is_for_a_terminal_and_for_rank_0(rank, shown, tmp_path, monkeypatch):
    terminal, plain = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)
    with Bucket({NAME: DATA}) as server:
        for stderr in (terminal, plain):
            monkeypatch.setattr(sys, "stderr", stderr)
            fetch(server, tmp_path / f"{stderr.isatty()}.npz")
    assert ("True.npz: 100%" in terminal.getvalue()) == shown
    assert plain.getvalue().count("\n") == 1 and "%" not in plain.getvalue()


# ---------------------------------------------------------------------------------- addresses


def test_addresses():
    for url in ("https://storage.googleapis.com/x", "http://127.0.0.1:80/x", "http://[::1]/x"):
        check_address(url)
    hosts = "storage.googleapis.com 127.0.0.1:80@example.org 127.0.0.1.example.org"
    wrong = [f"http://{host}/x" for host in hosts.split()]
    for url in [*wrong, "ftp://127.0.0.1/x", "file:///etc/passwd", "https:///x"]:
        with pytest.raises(UserError, match="only https"):
            download(url, ROOT / "no.npz")


def test_redirects(tmp_path, monkeypatch):
    (tmp_path / "secret").write_bytes(DATA)
    with Bucket({NAME: DATA}) as second:
        # Another name of this machine stands in for another machine.
        elsewhere = second.url.replace("127.0.0.1", "0.0.0.0") + f"/{NAME}"
        monkeypatch.setenv("no_proxy", "127.0.0.1,0.0.0.0")
        for address in (f"file://{tmp_path}/secret", elsewhere):
            refused = pytest.raises(UserError, match=r"only https|not allowed")
            with Bucket({NAME: DATA}, [f"to {address}"]) as server, refused:
                fetch(server, tmp_path / "file.npz")
    assert names(tmp_path) == ["secret"]
    with Bucket({NAME: DATA, "moved": DATA}) as server:
        server.faults = [f"to {server.url}/moved"]
        fetch(server, tmp_path / "file.npz")
        assert [path for path, _ in server.seen] == [NAME, "moved"]


# --------------------------------------------------------------------------- several processes


def process(server, target):
    code = "import sys, pathlib; from models.download import download; print('started', flush=True)"
    code += "; download(sys.argv[1], pathlib.Path(sys.argv[2]), pause=0.1)"
    command = [sys.executable, "-c", code, f"{server.url}/{NAME}", str(target)]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "started\n"
    return started


@pytest.mark.parametrize("killed", [False, True])
def test_one_of_two_processes_downloads(killed, tmp_path):
    target = tmp_path / "file.npz"
    with Bucket({NAME: DATA}, ["stall"]) as server:
        first = process(server, target)
        assert server.stalled.wait(30)
        second = process(server, target)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(0.5)
        assert len(server.seen) == 1  # the second one waits for the lock
        if killed:
            first.kill()
            assert second.wait(30) == 0
        server.go_on.set()
        assert second.wait(30) == 0 and first.wait(30) == (-9 if killed else 0)
        assert len(server.seen) == 2 and server.seen[1][1] > 0  # it continues the first one's part
    assert target.read_bytes() == DATA
