"""A real web server on this machine, in place of Google's bucket, with one fault at a time."""

import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

os.environ["no_proxy"] = "127.0.0.1,localhost"


class LocalServer(ThreadingHTTPServer):
    """Serves at `url`, a free port of this machine, until its `with` block ends."""

    daemon_threads = True

    def __init__(self, handler: type):
        super().__init__(("127.0.0.1", 0), handler)
        self.seen, self.url = [], f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *exc):
        self.shutdown()
        self.server_close()


class QuietHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass


class Bucket(LocalServer):
    """Serves `files` (path -> bytes). Each request uses up one of `faults`, until none is left.

    A fault is a few words, a status, or "to ADDRESS". `seen` lists (path, first byte asked for or
    None) of every request; `sent` counts the bytes of bodies.
    """

    def __init__(self, files=None, faults=()):
        super().__init__(Handler)
        self.files, self.faults, self.sent = dict(files or {}), list(faults), 0
        self.stalled, self.go_on = threading.Event(), threading.Event()

    def handle_error(self, request, client_address):
        pass  # clients that go away are part of the tests

    def __exit__(self, *exc):
        self.go_on.set()
        super().__exit__(*exc)


class Handler(QuietHandler):
    def do_GET(self):
        server, path = self.server, unquote(self.path.partition("?")[0]).lstrip("/")
        fault = server.faults.pop(0) if server.faults else ""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        server.seen.append((path, int(asked[1]) if asked else None))
        self.close_connection = True
        body = server.files.get(path)
        if body is None or fault.isdigit():
            return self.answer(int(fault or 404))
        if fault.startswith("to "):
            return self.answer(302, {"Location": fault[3:]})
        if fault == "hang up":
            return None
        if self.headers["Accept-Encoding"] != "identity":
            return self.answer(406)
        asked = None if "no range" in fault else asked
        begin, size = int(asked[1]) if asked else 0, len(body)
        if begin >= size:
            return self.answer(416, {"Content-Range": f"bytes */{size}"})
        half = (begin + size) // 2
        end = half if fault == "half the range" else size
        shown = 7 if fault == "wrong range" else begin
        headers = {"Content-Length": end - begin + 1000 * (fault == "long")}
        if asked:
            headers["Content-Range"] = f"bytes {shown}-{end - 1}/{size}"
        self.answer(206 if asked else 200, {} if fault == "no length" else headers)
        end = half if "drop" in fault or fault == "stall" else end
        self.wfile.write(body[begin:end])
        server.sent += end - begin
        if fault == "stall":
            server.stalled.set()
            server.go_on.wait(40)

    def answer(self, status, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, str(value))
        self.end_headers()
