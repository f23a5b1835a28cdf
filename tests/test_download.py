"""Downloads over real sockets: every fault of a server, two processes at once, and what is kept."""

import hashlib
import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save

from models.download import DownloadError, by_hand, check_url, download, verify
from tests.bucket import Bucket
from tests.helpers import ROOT


def archive(seed=0, size=300_000):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        data = b"".join(hashlib.sha256(b"%d %d" % (seed, i)).digest() for i in range(size // 32))
        file.writestr("data.npy", data)
    return buffer.getvalue()


DATA = archive()
HALF = len(DATA) // 2
NAME = "bucket/file.npz"


def fetch(server, target, **kw):
    """(lines said, what was asked for) of a download without pauses."""
    lines = []
    options = {"pause": 0.0, "patience": 0.5, "attempts": 3, "say": lines.append}
    download(f"{server.url}/{NAME}", target, trusted=server.url, **(options | kw))
    return lines, [begin for _, begin in server.seen]


def names(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_a_file_arrives_whole_with_its_sha256(tmp_path):
    target = tmp_path / "new" / "folder" / "file.npz"
    with Bucket({NAME: DATA}) as server:
        lines, asked = fetch(server, target)
        assert target.read_bytes() == DATA and asked == [None]
        assert server.url in lines[0] and str(target) in lines[0]
        assert names(target.parent) == ["file.npz", "file.npz.sha256"]
        record = f"{hashlib.sha256(DATA).hexdigest()}  file.npz\n"
        assert (target.parent / "file.npz.sha256").read_text() == record
        fetch(server, target)
        assert len(server.seen) == 1  # what is here is not asked for again


def test_a_safetensors_is_checked_by_its_own_header(tmp_path):
    data = save({"x": np.arange(1000.0)})
    target = tmp_path / "a.safetensors"
    with Bucket({"a.safetensors": data}, ["short"]) as server:  # the first answer is cut
        download(f"{server.url}/a.safetensors", target, trusted=server.url, pause=0.0,
                 say=lambda line: None)  # fmt: skip
        assert target.read_bytes() == data and len(server.seen) == 2


# fault(s) -> where every request begins; None asks for the whole file
RECOVERED = {
    ("drop",): [None, HALF],
    ("drop", "drop"): [None, HALF, (HALF + len(DATA)) // 2],
    ("stall",): [None, HALF],
    ("hang up",): [None, None],
    ("500",): [None, None],
    ("503", "429"): [None, None, None],
    ("drop", "500"): [None, HALF, HALF],
    ("drop", "no range"): [None, HALF],
    ("drop", "wrong part"): [None, HALF, None],
    ("short",): [None, None],
    ("garbled",): [None, None],
    ("long",): [None, len(DATA)],  # 416 says that it is all here
    ("no length",): [None],
}


@pytest.mark.parametrize("faults", RECOVERED, ids=" then ".join)
def test_faults_that_pass(faults, tmp_path):
    with Bucket({NAME: DATA}, faults) as server:
        _, asked = fetch(server, tmp_path / "file.npz")
    assert asked == RECOVERED[faults]
    assert (tmp_path / "file.npz").read_bytes() == DATA
    assert names(tmp_path) == ["file.npz", "file.npz.sha256"]


def test_many_drops_with_some_gain_each_are_no_failure(tmp_path):
    with Bucket({NAME: DATA}, ["drop"] * 8) as server:
        fetch(server, tmp_path / "file.npz", attempts=1)
    assert server.sent == len(DATA)  # and no byte came twice


@pytest.mark.parametrize(
    ("fault", "tries", "why"),
    [
        ("403", 1, "403 Forbidden"),
        ("410", 1, "410 Gone"),
        ("500", 3, "500 Internal Server Error"),
        ("hang up", 3, "closed connection without response"),
        ("short", 3, "no whole file"),
        ("garbled", 3, r"bad data.npy"),
    ],
)
def test_faults_that_stay_are_one_line(fault, tries, why, tmp_path):
    target = tmp_path / "file.npz"
    with Bucket({NAME: DATA}, [fault] * 20) as server:
        with pytest.raises(DownloadError, match=why) as caught:
            fetch(server, target)
        url = f"{server.url}/{NAME}"
    assert len(server.seen) == tries
    line = str(caught.value)
    assert "\n" not in line and url in line and line.endswith(by_hand(url, target))
    assert "file.npz" not in names(tmp_path)


def test_a_server_that_lies_about_the_length_for_good(tmp_path):
    with Bucket({NAME: DATA}, ["long", "no range"] * 9) as server:
        server.files[NAME] = DATA[:-10]  # cut at its end, where a zip keeps its table
        with pytest.raises(DownloadError, match="no whole file"):
            fetch(server, tmp_path / "file.npz")
    assert names(tmp_path) == []


def test_missing_file_unreachable_server_and_unknown_host(tmp_path):
    with Bucket({}) as server, pytest.raises(DownloadError, match="404 Not Found") as caught:
        fetch(server, tmp_path / "file.npz")
    assert len(server.seen) == 1 and "curl" in str(caught.value)
    with pytest.raises(DownloadError, match=r"Connection refused.*by hand: curl"):
        fetch(server, tmp_path / "file.npz")  # it is closed now
    with pytest.raises(DownloadError, match="by hand: curl"):
        download("https://no-such-host.invalid/x.npz", tmp_path / "x.npz", say=lambda line: None)
    assert names(tmp_path) == []


def test_a_later_call_goes_on_where_one_was_cut(tmp_path):
    (tmp_path / "file.npz.part").write_bytes(DATA[:1000])
    with Bucket({NAME: DATA}) as server:
        lines, asked = fetch(server, tmp_path / "file.npz")
    assert asked == [1000] and server.sent == len(DATA) - 1000 and "from byte 1000" in lines[0]
    assert (tmp_path / "file.npz").read_bytes() == DATA


@pytest.mark.parametrize("part", [archive(1)[:2000], archive(1), archive(1) + bytes(99)])
def test_the_rest_of_another_file_is_noticed(part, tmp_path):
    (tmp_path / "file.npz.part").write_bytes(part)
    with Bucket({NAME: DATA}) as server:
        if len(part) == len(DATA):  # whole, and as long: only a record could tell them apart
            record = hashlib.sha256(DATA).hexdigest()
            (tmp_path / "file.npz.sha256").write_text(f"{record}  file.npz\n")
            with pytest.raises(DownloadError, match="has sha256"):
                fetch(server, tmp_path / "file.npz")
        fetch(server, tmp_path / "file.npz")
    assert (tmp_path / "file.npz").read_bytes() == DATA


def test_nothing_is_left_of_a_longer_part(tmp_path):
    (tmp_path / "file.npz.part").write_bytes(DATA + bytes(99))
    with Bucket({NAME: DATA}, ["no range"]) as server:
        fetch(server, tmp_path / "file.npz")
    assert (tmp_path / "file.npz").read_bytes() == DATA


def test_sha256_is_verified_later(tmp_path):
    path, record = tmp_path / "file.npz", tmp_path / "file.npz.sha256"
    path.write_bytes(DATA)
    verify(path)  # nothing is recorded: nothing to say
    record.write_text(hashlib.sha256(DATA).hexdigest().upper() + " *file.npz\n")
    verify(path)
    path.write_bytes(DATA[:-1] + b"x")
    with pytest.raises(DownloadError, match=r"file\.npz has changed: its sha256"):
        verify(path)
    record.write_text("not a hash\n")
    with pytest.raises(DownloadError, match="holds no sha256"):
        verify(path)
    # A record that lies there already binds the server too.
    path.unlink()
    record.write_text("0" * 64)
    with Bucket({NAME: DATA}) as server, pytest.raises(DownloadError, match="records 0000"):
        fetch(server, path)
    assert not path.exists()


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "plain").write_text("")
    wrong = pytest.raises(DownloadError, match=r"could not be written to .*plain")
    with Bucket({NAME: DATA}) as server, wrong:
        fetch(server, tmp_path / "plain" / "file.npz")
    assert server.seen == []


# ------------------------------------------------------------------------------- https, and only it


def test_addresses(tmp_path):
    check_url("https://storage.googleapis.com/vit_models/x.npz")
    check_url("http://127.0.0.1:80/x", trusted="http://127.0.0.1:80")
    for url, trusted in [
        ("http://storage.googleapis.com/x", ""),
        ("http://example.org/x", "http://example.org"),  # trusted, but not on this machine
        ("http://127.0.0.1:80/x", ""),
        ("http://127.0.0.1:81/x", "http://127.0.0.1:80"),
        ("http://127.0.0.1:80@example.org/x", "http://127.0.0.1:80"),
        ("ftp://127.0.0.1/x", ""),
        ("file:///etc/passwd", "file:///etc"),
        ("https:///x", ""),
    ]:
        with pytest.raises(DownloadError, match="only https"):
            check_url(url, trusted)


def test_redirects_to_other_schemes_are_refused(tmp_path):
    other = tmp_path / "secret.npz"
    other.write_bytes(DATA)
    with Bucket({NAME: DATA}) as second:
        for target in (f"file://{other}", "ftp://127.0.0.1/x", f"{second.url}/{NAME}"):
            refused = pytest.raises(DownloadError, match=r"is not (https|allowed)")
            with Bucket({NAME: DATA}, [f"to {target}"]) as server, refused:
                fetch(server, tmp_path / "file.npz")
        assert second.seen == []
    with Bucket({NAME: DATA, "moved": DATA}) as server:
        server.faults = [f"to {server.url}/moved"]
        fetch(server, tmp_path / "file.npz")
        assert [path for path, _ in server.seen] == [NAME, "moved"]


def test_certificates_are_checked(tmp_path, monkeypatch):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1"], capture_output=True)  # fmt: skip
    if made.returncode:
        pytest.skip("openssl makes no certificate here")
    with Bucket({NAME: DATA}) as server:
        server.use_tls(certificate, key)
        with pytest.raises(DownloadError, match="certificate"):
            fetch(server, tmp_path / "file.npz")
        assert server.seen == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        fetch(server, tmp_path / "file.npz")
        with Bucket({NAME: DATA}) as plain:  # from https down to http
            server.faults = [f"to {plain.url}/{NAME}"]
            with pytest.raises(DownloadError, match="not https"):
                fetch(server, tmp_path / "second.npz")
        assert plain.seen == []
    assert (tmp_path / "file.npz").read_bytes() == DATA


# -------------------------------------------------------------------------------- several processes


def process(server, target):
    code = ("import sys; from models.download import download; "
            "download(sys.argv[1], sys.argv[2], trusted=sys.argv[3], pause=0.1)")  # fmt: skip
    command = [sys.executable, "-u", "-c", code, f"{server.url}/{NAME}", str(target), server.url]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_one_of_several_processes_downloads(tmp_path):
    target = tmp_path / "file.npz"
    with Bucket({NAME: DATA}, ["stall"]) as server:
        first = process(server, target)
        assert server.stalled.wait(30)
        second = process(server, target)
        assert "fetched by another process: waiting" in second.stdout.readline()
        server.go_on.set()  # the first goes on from the half, and the second finds the file
        assert first.wait(30) == 0 and second.wait(30) == 0
        assert [begin for _, begin in server.seen] == [None, HALF]
        assert server.sent == len(DATA)
    assert target.read_bytes() == DATA


def test_the_next_process_takes_over_from_one_that_was_killed(tmp_path):
    target = tmp_path / "file.npz"
    with Bucket({NAME: DATA}, ["stall"]) as server:
        first = process(server, target)
        assert server.stalled.wait(30)
        second = process(server, target)
        assert "waiting" in second.stdout.readline()
        first.kill()
        assert second.wait(30) == 0
    assert target.read_bytes() == DATA and first.wait() != 0
    assert len(server.seen) == 2 and server.seen[1][1]  # what had arrived was not asked for again
