"""A Hub on 127.0.0.1, good enough for huggingface_hub: repositories in memory, every request logged, faults on demand.

It speaks Git-LFS, not Xet: clients set HF_HUB_DISABLE_XET=1. HF_ENDPOINT is read when huggingface_hub is imported, so a
client is best a process of its own:

    with Hub() as hub:
        commit = hub.commit("org/name", {"config.json": b"{}"})
        hub.faults = lambda asked: Fault(status=503) if asked.method == "GET" else None
        subprocess.run([...], env=os.environ | hub.environment(tmp_path))
        assert hub.moved("model.safetensors") == 8
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (
    ".safetensors",
    ".bin",
    ".gguf",
    ".pt",
)  # stored as LFS, with whatever holds a zero byte near its start


@dataclass
class Asked:
    """One request, and what was answered."""

    method: str
    raw: str  # the path as it came, where a quoted slash belongs to a name
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    body: bytes
    port: int
    status: int = 0
    sent: int = 0  # bytes of the body of the answer that were written

    @property
    def path(self) -> str:
        return unquote(self.raw)

    @property
    def range(self) -> tuple[int, int] | None:
        """The asked-for bytes as [start, stop)."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        return (int(match[1]), int(match[2]) + 1) if match else None

    @property
    def token(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")


@dataclass(frozen=True)
class Fault:
    """What to do instead of answering well; fields combine."""

    status: int | None = None  # answer so, with `body`, instead of doing anything
    body: bytes = b'{"error": "a fault of the test"}'
    headers: dict[str, str] = field(default_factory=dict)  # replaced in or added to the answer
    ignore_range: bool = False  # the whole file and 200
    cut: int | None = None  # promise the full length, send so many bytes, hang up
    delay: float = 0.0  # seconds before the answer
    reset: bool = False  # reset the connection without an answer
    lose_answer: bool = False  # do what was asked, then reset


@dataclass
class File:
    data: bytes
    large: bool
    sha256: str
    oid: str

    @classmethod
    def of(cls, path: str, data: bytes) -> "File":
        sha256 = hashlib.sha256(data).hexdigest()
        large = path.endswith(LARGE) or b"\0" in data[:512]
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        stored = pointer if large else data
        return cls(
            data, large, sha256, hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
        )

    def described(self) -> dict:
        lfs = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        return {"size": len(self.data), "oid": self.oid} | ({"lfs": lfs} if self.large else {})


Tree = dict[str, File]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    disabled: bool = False
    trees: dict[str, Tree] = field(default_factory=dict)  # by commit, oldest first
    refs: dict[str, str] = field(default_factory=dict)  # branches and tags

    def resolve(self, revision: str) -> str | None:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.trees else None

    def add(self, tree: Tree, branch: str = "main") -> str:
        commit = hashlib.sha1(f"{id(self)} {len(self.trees)}".encode()).hexdigest()
        self.trees[commit] = tree
        self.refs[branch] = commit
        return commit


class Refusal(Exception):
    """An answer with a status of 400 or more."""

    def __init__(
        self, status: int, code: str = "", message: str = "", headers: dict[str, str] | None = None
    ):
        self.status, self.message = status, message
        self.headers = (headers or {}) | ({"X-Error-Code": code} if code else {})
        if message:
            self.headers["X-Error-Message"] = message


class Hub:
    """The server and its state; `faults` may be set at any time to a function from a request to a `Fault` or None."""

    def __init__(self, token: str = "", redirect: bool = False, part_size: int = 64 << 20):
        self.token = (
            token  # the one token that may write and sees private repositories; empty: anybody may
        )
        self.redirect = (
            redirect  # send readers of large files to another port, as the real Hub does to its CDN
        )
        self.part_size = part_size  # larger files are uploaded in several parts
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # uploaded large files by sha256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.ignored: set[str] = set()  # names that the repositories' .gitignore leaves out
        self.log: list[Asked] = []
        self.faults: Callable[[Asked], Fault | None] = lambda asked: None
        self.lock = threading.RLock()
        self.servers = [self._serve() for _ in range(1 + redirect)]
        self.url, self.cdn = (
            f"http://127.0.0.1:{s.server_port}" for s in (self.servers[0], self.servers[-1])
        )

    def _serve(self) -> ThreadingHTTPServer:
        server = Server(("127.0.0.1", 0), Handler)
        server.hub = self
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def __enter__(self) -> "Hub":
        return self

    def __exit__(self, *_) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a client, with its cache and login in a folder of the test."""
        none = dict.fromkeys(("HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), "")
        return none | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "",
            "TRANSFORMERS_OFFLINE": "",
            "NO_PROXY": "127.0.0.1",
        }

    def repo(self, name: str, **how) -> Repo:
        """A repository, made as the Hub makes one: with one commit that holds .gitattributes."""
        with self.lock:
            if name not in self.repos:
                self.repos[name] = Repo(**how)
                self.repos[name].add(
                    {".gitattributes": File.of(".gitattributes", b"*.safetensors filter=lfs\n")}
                )
            return self.repos[name]

    def commit(self, name: str, files: dict[str, bytes | None], branch: str = "main") -> str:
        """Commit files (None deletes) on a branch; the new commit."""
        with self.lock:
            repo = self.repo(name)
            tree = dict(repo.trees[repo.refs.get(branch, repo.refs["main"])])
            for path, data in files.items():
                tree.pop(path, None)
                if data is not None:
                    tree[path] = File.of(path, data)
                    self.blobs[tree[path].sha256] = data
            return repo.add(tree, branch)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return {
            path: file.data for path, file in repo.trees[repo.refs.get(revision, revision)].items()
        }

    def asked(self, method: str = "", path: str = "") -> list[Asked]:
        """Logged requests of a method whose path holds a text."""
        return [a for a in list(self.log) if a.method in (method or a.method) and path in a.path]

    def moved(self, path: str = "") -> int:
        """Bytes that were sent in answers to GET requests for paths that hold a text."""
        return sum(a.sent for a in self.asked("GET", path))

    def uploaded(self) -> list[int]:
        """Sizes of the bodies of large files that clients sent."""
        return [len(a.body) for a in self.asked("PUT")]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, request, client_address) -> None:
        pass  # a client that hangs up is no news


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(
            self.command, parts.path, query, headers, self._body(), self.server.server_port
        )
        hub.log.append(asked)
        fault = hub.faults(asked) or Fault()
        time.sleep(fault.delay)
        if fault.reset:
            return self._reset()
        if fault.status:
            return self._answer(asked, fault, fault.status, {}, fault.body)
        try:
            with hub.lock:
                status, extra, body = Answer(hub, asked, fault).find()
        except Refusal as refusal:
            status, extra, body = (
                refusal.status,
                refusal.headers,
                json.dumps({"error": refusal.message}).encode(),
            )
        if fault.lose_answer:
            return self._reset()
        self._answer(asked, fault, status, extra, body)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(
        self, asked: Asked, fault: Fault, status: int, headers: dict[str, str], body: bytes
    ) -> None:
        asked.status = status
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers | fault.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if asked.method != "HEAD":
            part = body if fault.cut is None else body[: fault.cut]
            asked.sent = len(part)  # before: a client that has it all may look at once
            try:
                self.wfile.write(part)
            except OSError:
                asked.sent = 0
                raise
        if fault.cut is not None:
            self.close_connection = True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


class Answer:
    """Status, headers and body for one request, found by the first route whose method and pattern match."""

    ROUTES: tuple[tuple[str, str, str], ...] = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>.+)", "info"),
        (
            "GET",
            r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.+))?",
            "tree",
        ),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/commits/(?P<revision>[^/]+)", "commits"),
        (
            "POST",
            r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<kind>branch|tag)/(?P<revision>.+)",
            "point",
        ),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("GET HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET HEAD", r"/cdn/(?P<oid>[0-9a-f]{64})", "from_cdn"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?", "put"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", "complete"),
        ("POST", r"/lfs/verify", "verify"),
    )

    def __init__(self, hub: Hub, asked: Asked, fault: Fault):
        self.hub, self.asked, self.fault = hub, asked, fault

    def find(self) -> tuple[int, dict[str, str], bytes]:
        for methods, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, self.asked.raw)
            if match and self.asked.method in methods.split():
                given = {key: unquote(text) for key, text in match.groupdict().items() if text}
                answer = getattr(self, name)(**given)
                return (
                    answer
                    if isinstance(answer, tuple)
                    else (200, JSON, json.dumps(answer).encode())
                )
        raise Refusal(404, message="no such route")

    # Repositories

    def create(self):
        wanted = self._json()
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        self._may_write()
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            return (
                409,
                JSON,
                json.dumps(url | {"error": "You already created this model repo"}).encode(),
            )
        self.hub.repo(name, private=wanted.get("visibility") == "private")
        return url

    def validate(self):
        return {"errors": [], "warnings": []}

    def info(self, repo, revision="main"):
        commit, tree = self._tree(repo, revision)
        blobs = self.asked.query.get("blobs", "").lower() in ("true", "1")
        siblings = [
            {"rfilename": path} | (self._sibling(file) if blobs else {})
            for path, file in tree.items()
        ]
        about = {"private": self.hub.repos[repo].private, "tags": [], "downloads": 0, "likes": 0}
        date = {"lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z"}
        return {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings} | about | date

    def _sibling(self, file: File) -> dict:
        lfs = (
            {"lfs": {"sha256": file.sha256, "size": len(file.data), "pointerSize": 134}}
            if file.large
            else {}
        )
        return {"size": len(file.data), "blobId": file.oid} | lfs

    def tree(self, repo, revision, path=""):
        _, tree = self._tree(repo, revision)
        prefix = f"{path}/" if path else ""
        inside = {name: file for name, file in tree.items() if name.startswith(prefix)}
        if prefix and not inside:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
        deep = self.asked.query.get("recursive", "").lower() in ("true", "1")
        folders = {
            f"{prefix}{part}"
            for name in inside
            for part in _parents(name.removeprefix(prefix), deep)
        }
        files = [(n, f) for n, f in inside.items() if deep or "/" not in n.removeprefix(prefix)]
        listed = [
            {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
            for name in sorted(folders)
        ]
        return listed + [{"type": "file", "path": name} | file.described() for name, file in files]

    def refs(self, repo):
        heads = self._readable(repo).refs.items()
        branches = [
            {"name": n, "ref": f"refs/heads/{n}", "targetCommit": commit} for n, commit in heads
        ]
        return {"branches": branches, "tags": [], "converts": []}

    def commits(self, repo, revision):
        self._tree(repo, revision)
        trees = reversed(self._readable(repo).trees)
        date = "2026-01-01T00:00:00.000Z"
        return [
            {"id": c, "title": c[:8], "message": "", "authors": [], "date": date} for c in trees
        ]

    def point(self, repo, kind, revision):
        """A branch at `startingPoint`, or a tag on the revision in the path."""
        self._may_write()
        wanted = self._json()
        name, at = (
            (revision, wanted.get("startingPoint", "main"))
            if kind == "branch"
            else (wanted["tag"], revision)
        )
        self._readable(repo).refs[name], _ = self._tree(repo, at)
        return {}

    def paths_info(self, repo, revision):
        _, tree = self._tree(repo, revision)
        paths = [path for path in self._json()["paths"] if path in tree]
        return [{"type": "file", "path": path} | tree[path].described() for path in paths]

    # Reading

    def resolve(self, repo, revision, path):
        commit, tree = self._tree(repo, revision)
        found = self.hub.repos[repo]
        at = {"X-Repo-Commit": commit}
        if found.gated and not (self.hub.token and self.asked.token == self.hub.token):
            raise Refusal(403, "GatedRepo", f"Access to model {repo} is restricted.")
        if path not in tree:
            raise Refusal(404, "EntryNotFound", "Entry not found", at)
        file = tree[path]
        linked = (
            {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
            if file.large
            else {}
        )
        if file.large and self.hub.redirect:
            address = f"{self.hub.cdn}/cdn/{file.sha256}?Signature=secret"
            return 302, at | linked | {"Location": address}, b""
        status, headers, body = self._bytes(file.data)
        return (
            status,
            headers | at | linked | {"ETag": f'"{file.sha256 if file.large else file.oid}"'},
            body,
        )

    def from_cdn(self, oid):
        return self._bytes(self.hub.blobs[oid])

    def _bytes(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        kind = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        wanted = self.asked.range
        if wanted is None or self.fault.ignore_range:
            return 200, kind, data
        start, stop = wanted[0], min(wanted[1], len(data))
        if start >= len(data):
            raise Refusal(416, headers={"Content-Range": f"bytes */{len(data)}"})
        return (
            206,
            kind | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"},
            data[start:stop],
        )

    # Writing

    def preupload(self, repo, revision):
        self._may_write()
        _, tree = self._tree(repo, revision)
        return {"files": [self._mode(file, tree) for file in self._json()["files"]]}

    def _mode(self, file: dict, tree: Tree) -> dict:
        path, sample = file["path"], base64.b64decode(file["sample"])
        large = path.endswith(LARGE) or b"\0" in sample
        there = tree.get(path)
        oid = {"oid": there.sha256 if there.large else there.oid} if there else {}
        ignore = path in self.hub.ignored
        return {
            "path": path,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": ignore,
        } | oid

    def batch(self, repo):
        self._may_write()
        self._readable(repo)
        return {
            "transfer": "basic",
            "objects": [self._actions(o["oid"], o["size"]) for o in self._json()["objects"]],
        }

    def _actions(self, oid: str, size: int) -> dict:
        if oid in self.hub.blobs:
            return {"oid": oid, "size": size}
        address = f"{self.hub.url}/lfs/{oid}"
        upload = {"href": f"{address}?X-Amz-Signature=signed"}
        if size > self.hub.part_size:
            count = -(-size // self.hub.part_size)
            urls = {f"{part:05d}": f"{address}/{part}" for part in range(1, count + 1)}
            upload = {
                "href": f"{address}/complete",
                "header": {"chunk_size": str(self.hub.part_size)} | urls,
            }
        return {
            "oid": oid,
            "size": size,
            "actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}},
        }

    def put(self, oid, part=""):
        if part:
            self.hub.parts[oid, int(part)] = self.asked.body
        else:
            self._keep(oid, self.asked.body)
        return 200, {"ETag": f'"{hashlib.md5(self.asked.body).hexdigest()}"'}, b""

    def complete(self, oid):
        parts = sorted(p["partNumber"] for p in self._json()["parts"])
        self._keep(oid, b"".join(self.hub.parts[oid, part] for part in parts))
        return {}

    def _keep(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, message="the upload does not have the promised sha256")
        self.hub.blobs[oid] = data

    def verify(self):
        wanted = self._json()
        if len(self.hub.blobs.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, message="object not found")
        return {}

    def commit(self, repo, revision):
        self._may_write()
        head, tree = self._tree(repo, revision)
        tree = dict(tree)
        for line in self.asked.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit", head) != head:
                raise Refusal(
                    412, message="A commit has happened since. Please refresh and try again."
                )
            if entry["key"] == "file":
                tree[value["path"]] = File.of(value["path"], base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refusal(
                        400,
                        message=f"LFS pointer pointed to a file that does not exist: {value['path']}",
                    )
                tree[value["path"]] = File.of(value["path"], self.hub.blobs[value["oid"]])
            elif entry["key"].startswith("deleted"):
                gone = value["path"].rstrip("/")
                tree = {n: f for n, f in tree.items() if n != gone and not n.startswith(gone + "/")}
        commit = self.hub.repos[repo].add(tree, revision)
        return {
            "success": True,
            "commitOid": commit,
            "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}",
        }

    # What all share

    def _json(self) -> dict:
        return json.loads(self.asked.body)

    def _may_write(self) -> None:
        if self.hub.token and self.asked.token != self.hub.token:
            known = (
                f"Invalid token {self.asked.token}"
                if self.asked.token
                else "Invalid username or password."
            )
            raise Refusal(401, message=known)

    def _readable(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        known = not self.hub.token or self.asked.token == self.hub.token
        if self.asked.token and not known:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        if repo is None or (repo.private and not known):
            raise Refusal(404 if known else 401, "RepoNotFound", "Repository not found")
        if repo.disabled:
            raise Refusal(403, message="Access to this resource is disabled.")
        return repo

    def _tree(self, name: str, revision: str) -> tuple[str, Tree]:
        repo = self._readable(name)
        commit = repo.resolve(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.trees[commit]


JSON = {"Content-Type": "application/json"}


def _parents(path: str, deep: bool) -> list[str]:
    """The folders above a file, outermost first; only that one where the listing is not deep."""
    parts = path.split("/")[:-1]
    folders = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return folders if deep else folders[:1]
