# SPDX-License-Identifier: Apache-2.0
"""A Hub on the loopback: enough of its HTTP interface to create, push, download and refuse, kept in memory.

It stores whole commits and moves a branch only when a commit is complete, as the Hub does. What the client library asks was
found by watching it (huggingface_hub 2.4).
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_loopback"
LARGE = 4096  # bytes from which a file is stored apart and named by its hash, as in Git LFS


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> files

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        contents = [
            f"{len(self.commits)}",
            *(f"{path}{hashlib.sha256(files[path]).hexdigest()}" for path in sorted(files)),
        ]
        commit = hashlib.sha1("".join(contents).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


class LoopbackHub(ThreadingHTTPServer):
    """`with LoopbackHub() as hub:` serves at `hub.url`; `hub.cut` names a path whose requests lose their connection."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.cut: str | None = None
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *_):
        pass

    def _answer(self, method: str) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{method} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.cut is not None and re.search(self.server.cut, f"{method} {path}"):
            self.close_connection = True
            self.connection.close()
            return
        for pattern, handler in ROUTES:
            found = re.fullmatch(pattern, f"{method} {path}")
            if found:
                return handler(self, body, **found.groupdict())
        self._json(404, {"error": f"no route for {method} {path}"})

    def do_GET(self):
        self._answer("GET")

    def do_HEAD(self):
        self._answer("HEAD")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    # ---- answers ----

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, status: int, content, **headers: str) -> None:
        self._send(status, json.dumps(content).encode(), Content_Type="application/json", **headers)

    def _trusted(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _readable(self, repo: str) -> Repo | None:
        """The repository; without a token, a private one looks as if it were not there."""
        found = self.server.repos.get(repo)
        if found is None or found.private and not self._trusted():
            status = 404 if self._trusted() else 401
            self._json(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    def _writable(self, repo: str) -> Repo | None:
        if not self._trusted():
            self._json(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
            return None
        return self._readable(repo)

    # ---- writing ----

    def create(self, body: bytes) -> None:
        if not self._trusted():
            return self._json(401, {"error": "Invalid credentials"})
        wanted = json.loads(body)
        repo = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        url = f"{self.server.url}/{repo}"
        if repo in self.server.repos:
            return self._json(409, {"error": "exists", "url": url, "name": repo})
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.server.repos[repo] = Repo(private)
        self.server.repos[repo].commit("main", {".gitattributes": b""})
        self._json(200, {"url": url, "name": repo})

    def branch(self, body: bytes, repo: str, branch: str) -> None:
        if (found := self._writable(repo)) is not None:
            if branch in found.branches:
                return self._json(409, {"error": "exists"})
            start = (json.loads(body) if body else {}).get("startingPoint") or "main"
            found.branches[branch] = found.branches[start]
            self._json(200, {})

    def validate(self, body: bytes) -> None:
        self._json(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if self._writable(repo) is not None:
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LARGE else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._json(200, {"files": modes})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        if self._writable(repo) is not None:
            objects = []
            for wanted in json.loads(body)["objects"]:
                entry = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in self.server.objects:
                    entry["actions"] = {"upload": {"href": f"{self.server.url}/store/{wanted['oid']}"}}
                objects.append(entry)
            self._json(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json(422, {"error": "the content has another hash"})
        self.server.objects[oid] = body
        self._send(200, b"")

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self._writable(repo)) is None:
            return
        current = found.files(revision)
        if current is None:
            return self._json(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        files = dict(current[1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = found.commit(revision, files)
        self._json(
            200, {"commitUrl": f"{self.server.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True}
        )

    # ---- reading ----

    def whoami(self, body: bytes) -> None:
        known = self._trusted()
        self._json(
            200 if known else 401, {"type": "user", "name": "me", "orgs": []} if known else {"error": "no token"}
        )

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        if (found := self._readable(repo)) is not None:
            at = found.files(revision)
            if at is None:
                return self._json(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
            siblings = [{"rfilename": path} for path in at[1]]
            self._json(
                200,
                {"id": repo, "modelId": repo, "sha": at[0], "private": found.private, "tags": [], "siblings": siblings},
            )

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self._readable(repo)) is not None:
            at = found.files(revision)
            if at is None:
                return self._json(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
            self._json(200, [{"type": "file", "path": p, "size": len(c), "oid": _etag(c)} for p, c in at[1].items()])

    def resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        if (found := self._readable(repo)) is None:
            return
        at = found.files(revision)
        if at is None:
            return self._json(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        if file not in at[1]:
            return self._json(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=at[0])
        content = at[1][file]
        self._send(200, content, ETag=f'"{_etag(content)}"', X_Repo_Commit=at[0])


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


_REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (r"GET /api/whoami-v2", _Handler.whoami),
    (rf"POST /api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.branch),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /store/(?P<oid>\w+)", _Handler.store),
    (rf"GET /api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (rf"GET /api/models/{_REPO}", _Handler.info),
    (rf"(GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
]
