"""One file from a web server to a path: resumed, retried, checked, and fetched by one process.

While it arrives the file is called `NAME.part`, which a later call goes on with; `.NAME.lock` keeps
other processes waiting. Its sha256 is recorded beside it in `NAME.sha256`, in sha256sum's format.
"""

import email.utils
import hashlib
import http.client
import os
import re
import shlex
import shutil
import socket
import ssl
import time
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    build_opener,
)

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

CHUNK = 1 << 18  # bytes: small enough that a bar moves on a slow line
LONGEST_PAUSE = 30.0  # seconds between two attempts
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class DownloadError(ValueError):
    """A file that cannot be fetched, or is not what it was; the message says what would help."""


class Passing(Exception):
    """A fault that another attempt may not meet again; `pause` is what the server asks for."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


tell = partial(print, flush=True)


def by_hand(url: str, target: Path) -> str:
    """The command that does the same."""
    return f"curl -fL --create-dirs -o {shlex.quote(str(target))} {shlex.quote(url)}"


def check_url(url: str, trusted: str = "") -> None:
    """Only https; plain http is for a loopback server that `trusted`, a base URL, names."""
    parts, base = urlsplit(url), urlsplit(trusted)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts[:2] == base[:2] and parts.scheme == "http" and parts.hostname in LOOPBACK:
        return
    raise DownloadError(f"{url}: only https:// addresses are fetched")


def download(
    url: str,
    target: str | Path,
    *,
    trusted: str = "",
    attempts: int = 5,
    pause: float = 1.0,
    patience: float = 20.0,
    say: Callable[[str], None] = tell,
) -> None:
    """Fetch the `.npz`, `.safetensors` or `.bin` of torch at `url` to `target`, if not there.

    Gives up after `attempts` in a row that brought nothing new, `pause` seconds apart and twice as
    many each time; `patience` is how many seconds a server may be silent. Raises DownloadError.
    """
    target = Path(target)
    check_url(url, trusted)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock"))
        try:
            held = lock.acquire(blocking=False)
        except Timeout:
            say(f"{target} is being fetched by another process: waiting for it")
            held = lock.acquire()
        with held:
            if not target.exists():
                _fetch(url, target, _opener(url, trusted), attempts, pause, patience, say)
    except OSError as error:  # those of the network are handled where they occur
        why = os.strerror(error.errno) if error.errno else str(error)
        raise DownloadError(f"{url} could not be written to {target}: {why}") from None


def verify(path: str | Path) -> None:
    """Raise DownloadError if a sha256 is recorded beside `path` and is another."""
    path = Path(path)
    if (recorded := recorded_sha256(path)) and recorded != (found := _sha256(path)):
        raise DownloadError(
            f"{path} has changed: its sha256 is {found[:16]}..., {_sidecar(path).name} records "
            f"{recorded[:16]}...; delete the file to fetch it again, or the record to accept it"
        )


def recorded_sha256(path: Path) -> str | None:
    try:
        words = _sidecar(path).read_text().split()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DownloadError(f"{_sidecar(path)} cannot be read ({error})") from None
    if not words or not re.fullmatch("[0-9a-fA-F]{64}", words[0]):
        raise DownloadError(f"{_sidecar(path)} holds no sha256: delete it, or mend it")
    return words[0].lower()


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------- the attempts


def _fetch(url, target, opener, attempts, pause, patience, say) -> None:
    part = target.with_name(target.name + ".part")
    start, most, failures = time.monotonic(), _size(part), 0
    say(f"fetching {url} to {target}" + (f", from byte {most} on" if most else ""))
    while True:
        try:
            _attempt(url, part, opener, patience)
            _check_content(part)
            break
        except Passing as fault:
            # A drop after some gain is no failure: on a poor line a large file still arrives.
            failures = 0 if _size(part) > most else failures + 1
            most = max(most, _size(part))
            if failures >= attempts:
                raise DownloadError(
                    f"{url} could not be fetched to {target} ({fault}); by hand: "
                    + by_hand(url, target)
                ) from None
            wait = min(LONGEST_PAUSE, max(fault.pause, pause * 2 ** max(0, failures - 1)))
            say(f"{fault}: trying again in {wait:g} s")
            time.sleep(wait)
        except DownloadError as error:
            raise DownloadError(f"{error}; by hand: {by_hand(url, target)}") from None
    found, recorded = _sha256(part), recorded_sha256(target)
    if recorded and recorded != found:
        part.unlink()
        raise DownloadError(
            f"{url} has sha256 {found[:16]}..., {_sidecar(target)} records {recorded[:16]}...: "
            "if the server's file is right, delete the record"
        )
    os.replace(part, target)
    if not recorded:
        record = _sidecar(target).with_name(_sidecar(target).name + ".tmp")
        record.write_text(f"{found}  {target.name}\n")
        os.replace(record, _sidecar(target))
    say(f"fetched {target}: {_size(target):,} bytes in {time.monotonic() - start:.0f} s")


def _attempt(url: str, part: Path, opener: OpenerDirector, patience: float) -> None:
    """Bring `part` to the size that the server announces, or raise Passing or DownloadError."""
    have = _size(part)
    # Compressed on the way, neither its size nor a byte range would be the file's.
    headers = {"Accept-Encoding": "identity", "User-Agent": "vit-checkpoints"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        answer = opener.open(Request(url, headers=headers), timeout=patience)
    except HTTPError as error:
        return _refused(error, url, part, have)
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)  # urllib wraps what happens before the answer
        offline = isinstance(cause, socket.gaierror) and not have
        if offline or isinstance(cause, ssl.SSLCertVerificationError):
            raise DownloadError(f"{url} could not be fetched ({_reason(cause)})") from None
        raise Passing(_reason(cause)) from None
    with answer:
        begin, total = _extent(answer)
        if begin not in (0, have):
            part.unlink(missing_ok=True)
            raise Passing(f"the server sent bytes from {begin} instead of {have}")
        free = shutil.disk_usage(part.parent).free + have  # what is here may be overwritten
        if total is not None and total > free:
            raise DownloadError(f"{url} needs {total:,} bytes, {part.parent} has {free:,} free")
        _receive(answer, part, begin, total)


def _extent(answer) -> tuple[int, int | None]:
    """(first byte, size of the whole file or None) that an answer announces."""
    if answer.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
        if not found:
            raise Passing("the server sent part of the file, but not which")
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = answer.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None  # a server may ignore the range


def _receive(answer, part: Path, begin: int, total: int | None) -> None:
    name = part.name.removesuffix(".part")
    with (
        part.open("r+b" if part.exists() else "wb") as file,
        tqdm(desc=name[-40:], total=total, initial=begin, unit="B", unit_scale=True,
             unit_divisor=1024, dynamic_ncols=True, disable=None) as bar,
    ):  # fmt: skip
        file.truncate(begin)
        file.seek(begin)
        while data := _read(answer):
            file.write(data)
            bar.update(len(data))
        file.flush()
        os.fsync(file.fileno())
        have = file.tell()
    if total is not None and have != total:
        raise Passing(f"the server announced {total:,} bytes and sent {have:,}")


def _read(answer) -> bytes:
    """What has come, up to CHUNK: waiting for a whole chunk would lose it to a stall."""
    try:
        return answer.read1(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise Passing(_reason(error)) from None


def _refused(error: HTTPError, url: str, part: Path, have: int) -> None:
    """What an answer of 400 and above means."""
    error.close()
    if error.code == 416 and have:
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
            return  # all of it is here already
        part.unlink()
        raise Passing("the server's file is not the one that was begun")
    if error.code in (408, 429) or error.code >= 500:
        raise Passing(f"the server answered {error.code} {error.reason}", _retry_after(error))
    raise DownloadError(f"{url} could not be fetched (the server answered {error.code} "
                        f"{error.reason})")  # fmt: skip


def _retry_after(error: HTTPError) -> float:
    """Seconds that a busy server asks for, in either of the header's two forms."""
    text = error.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def _check_content(part: Path) -> None:
    """A damaged file is fetched again from its start. Every byte counts in a zip archive's CRCs;
    a .safetensors has none, but says how long it is."""
    try:
        if part.name.endswith(".safetensors.part"):
            with safe_open(part, "numpy"):
                damaged = None
        else:
            with zipfile.ZipFile(part) as archive:
                damaged = archive.testzip()
    except SafetensorError:
        damaged = "header or length"
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
        damaged = "archive"
    if damaged:
        size = _size(part)
        part.unlink()
        raise Passing(f"what arrived, {size:,} bytes, is no whole file (bad {damaged})")


# ----------------------------------------------------------------------------------------- helpers


class _Redirects(HTTPRedirectHandler):
    """urllib would follow from https to http or ftp."""

    def __init__(self, trusted: str):
        self.trusted = trusted

    def redirect_request(self, request, answer, code, message, headers, new_url):
        try:
            check_url(new_url, self.trusted)
        except DownloadError:
            raise DownloadError(
                f"{request.full_url} redirects to {new_url}, which is not https"
            ) from None
        return super().redirect_request(request, answer, code, message, headers, new_url)


def _opener(url: str, trusted: str) -> OpenerDirector:
    handlers = [_Redirects(trusted), HTTPSHandler(context=ssl.create_default_context())]
    if urlsplit(url).hostname in LOOPBACK:
        handlers.append(ProxyHandler({}))
    return build_opener(*handlers)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error) -> str:
    if isinstance(error, TimeoutError):
        return "the server fell silent"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
