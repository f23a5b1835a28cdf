"""Download one file: resumed after a drop, retried, and by one process at a time."""

import http.client
import os
import re
import shlex
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock
from tqdm import tqdm

from models.errors import UserError

RETRIED = (408, 416, 429, 500, 502, 503, 504)  # HTTP statuses that another attempt may not get


def by_hand(url: str, target: Path) -> str:
    """The curl command that does the same."""
    return f"curl -fL --create-dirs -o {shlex.quote(str(target))} {shlex.quote(url)}"


def check_address(url: str) -> None:
    """Raise UserError unless `url` is https, or http on this machine."""
    parts = urlsplit(url)
    local = parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")
    if not local and not (parts.scheme == "https" and parts.hostname):
        raise UserError(f"{url}: only https:// addresses are downloaded")


def download(url: str, target: Path, *, attempts=5, pause=1.0, timeout=20.0) -> None:
    """Download `url` to `target`, if it is not there. Raises UserError.

    Gives up after `attempts` in a row that bring nothing new; the `pause` between them, in seconds,
    doubles each time. A server may be silent for `timeout` seconds.
    """
    check_address(url)
    part = target.with_name(f"{target.name}.part")  # a later call continues it
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(f".{target.name}.lock")).acquire()
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    with lock:  # other processes wait for it, and then find the file
        failures, most = 0, _size(part)
        while not target.exists():
            print(f"downloading {url} to {target}", file=sys.stderr)
            try:
                _continue(url, part, timeout)
                part.replace(target)
            except (OSError, http.client.HTTPException) as error:  # HTTPError is an OSError
                # A drop after new bytes is no failure: a large file also arrives over a poor line.
                failures, most = (0, _size(part)) if _size(part) > most else (failures + 1, most)
                code, reason = getattr(error, "code", None), " ".join(str(error).split())
                if code == 416:  # what is here is not the start of the server's file
                    part.unlink(missing_ok=True)
                if failures >= attempts or (code and code not in RETRIED):
                    raise UserError(f"{url}: {reason}; by hand: {by_hand(url, target)}") from error
                print(f"{reason}; trying again", file=sys.stderr)
                time.sleep(pause * 2 ** (failures - 1))


def _continue(url: str, part: Path, timeout: float) -> None:
    """Append to `part` what it lacks of `url`. Raises OSError if not all of it arrives."""
    have = _size(part)
    # http.client asks for "identity": compressed, the answer would have other byte ranges.
    headers = {"Range": f"bytes={have}-"} if have else {}
    with urlopen(Request(url, headers=headers), timeout=timeout) as answer:
        check_address(answer.url)  # a redirect may lead anywhere
        sent = re.fullmatch(rf"bytes {have}-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if answer.status == 206 and not sent:
            part.unlink(missing_ok=True)
            raise OSError(f"the server did not send the bytes from {have} on")
        have = have if sent else 0  # a server may ignore the range, and send the whole file
        size = int(sent[1]) if sent else answer.length  # None if the server does not say
        # None: no bar if stderr is no terminal. A notebook's is none, but shows it.
        notebook = type(sys.stderr).__module__.startswith("ipykernel")
        off = os.environ.get("RANK", "0") != "0" or (False if notebook else None)
        bar = tqdm(desc=part.stem, initial=have, total=size, unit="B", unit_scale=True, disable=off)
        with part.open("ab" if have else "wb") as file, bar:
            while data := answer.read1(2**18):  # bytes, as they come: a drop loses none
                file.write(data)
                bar.update(len(data))
    if size is not None and _size(part) != size:
        raise OSError(f"{_size(part):,} of {size:,} bytes arrived")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
