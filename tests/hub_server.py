"""A web server on this machine that speaks the protocol of Hugging Face's hub."""

import base64
import hashlib
import json
import re
from urllib.parse import unquote, urlsplit

from tests.bucket import LocalServer, QuietHandler


class HubServer(LocalServer):
    """Serves `repos` (ORG/NAME -> [commits], each path -> bytes); `main` is the last commit.

    Commit number i of a repository is called by 40 times the digit i. Large files are redirected to
    another path, as the hub does it. `gated` repositories ask for `token`. `seen` lists (method,
    path) of all requests.
    """

    def __init__(self, **repos):
        super().__init__(Handler)
        self.repos, self.gated, self.token = repos, set(), None
        self.blobs = f"http://localhost:{self.server_port}/blobs"  # another host, as on the hub
        self.messages = []


class Handler(QuietHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append((self.command, path))
        if path.startswith("/blobs/"):
            commits = [commit for commits in self.server.repos.values() for commit in commits]
            blobs = {oid(data): data for commit in commits for data in commit.values()}
            return self.answer(200, blobs[path.removeprefix("/blobs/")])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            files, commit = self.commit(*found.groups())
            names = [{"rfilename": name} for name in files or ()]
            found = {"id": "x/y", "sha": commit, "siblings": names, "tags": [], "private": False}
            return files is not None and self.answer(200, json.dumps(found).encode())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            files, _ = self.commit(*found.groups())
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": oid(data)}
                for name, data in (files or {}).items()
            ]
            return files is not None and self.answer(200, json.dumps(rows).encode())
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not found:
            return self.refuse(404, "")
        files, commit = self.commit(found[1], found[2])
        if files is None:
            return None
        if found[3] not in files:
            return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        data, headers = files[found[3]], {"X-Repo-Commit": commit}
        if not found[3].endswith(".json"):  # as for files of git LFS
            headers |= {"X-Linked-Etag": f'"{oid(data)}"', "X-Linked-Size": len(data)}
            return self.answer(302, b"", headers | {"Location": f"{self.server.blobs}/{oid(data)}"})
        return self.answer(200, data, headers | {"ETag": f'"{oid(data)}"'})

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append(("POST", path))
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            wanted = json.loads(sent)
            name = "/".join(filter(None, (wanted.get("organization") or "me", wanted["name"])))
            if self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
                return self.refuse(401, "")
            status = 409 if name in self.server.repos else 200
            self.server.repos.setdefault(name, [{}])
            answer = {"url": f"{self.server.url}/{name}", "id": name, "name": name}
            return self.answer(status, json.dumps(answer).encode())
        if path == "/api/validate-yaml":  # of a card
            return self.answer(200, b'{"errors": [], "warnings": []}')
        if re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            asked = json.loads(sent)["files"]
            kinds = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer(200, json.dumps({"files": [f | kinds for f in asked]}).encode())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            rows = [json.loads(line) for line in sent.splitlines()]
            values = [row["value"] for row in rows if row["key"] == "file"]
            new = {row["path"]: base64.b64decode(row["content"]) for row in values}
            commits = self.server.repos[found[1]]
            commits.append(commits[-1] | new)
            self.server.messages += [r["value"]["summary"] for r in rows if r["key"] == "header"]
            number = str(len(commits) - 1) * 40
            url = f"{self.server.url}/{found[1]}/commit/{number}"
            answer = {"commitUrl": url, "commitOid": number, "success": True}
            return self.answer(200, json.dumps(answer).encode())
        return self.refuse(404, "")

    def commit(self, repo, revision):
        """(files, name) of a commit; (None, None) after the refusal was sent."""
        commits = self.server.repos.get(repo)
        names = [str(i) * 40 for i in range(len(commits or ()))]
        token = f"Bearer {self.server.token}"
        if repo in self.server.gated and self.headers["Authorization"] != token:
            self.refuse(403, "GatedRepo")
        elif not commits:
            self.refuse(404, "RepoNotFound")
        elif revision == "main":
            return commits[-1], names[-1]
        elif revision in (*names, *(f"v{i}" for i in range(len(names)))):
            number = int(revision.removeprefix("v")[0])
            return commits[number], names[number]
        else:
            self.refuse(404, "RevisionNotFound")
        return None, None

    def refuse(self, status, code, headers=None):
        self.answer(status, b"", {"X-Error-Code": code} | (headers or {}))

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
