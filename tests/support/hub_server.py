"""A Hub on 127.0.0.1, good enough for huggingface_hub: repositories in memory, every request
logged, faults on demand.

It speaks Git-LFS, not Xet: clients set HF_HUB_DISABLE_XET=1. HF_ENDPOINT is read when
huggingface_hub is imported, so a client is best a process of its own:

    with Hub() as hub:
        commit = hub.commit("org/name", {"config.json": b"{}"})
        hub.faults = lambda asked: Fault(status=503) if asked.method == "GET" else None
        subprocess.run([...], env=os.environ | hub.environment(tmp_path))
        assert hub.moved("model.safetensors") == 8
"""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.support.hub_answers import Answer
from tests.support.hub_state import Asked, Fault, File, Refusal, Repo


class Hub:
    """The server and its state; `faults` may be set at any time to a function from a request to a
    `Fault` or None."""

    def __init__(
        self,
        token: str = "",
        redirect: bool = False,
        part_size: int = 64 << 20,
        read_token: str = "",
    ):
        # the one token that may write and sees private repositories; empty: anybody may
        self.token = token
        self.tokens = {token, read_token} - {""}  # those that see private repositories
        # send readers of large files to another port, as the real Hub does to its CDN
        self.redirect = redirect
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
                    repo.objects.add(tree[path].sha256)
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
