"""A Hub on 127.0.0.1, good enough for huggingface_hub: repositories, accounts, every request
logged with the bytes each way, faults on demand, a line of limited speed.

It speaks Git-LFS, or with `xet` also Xet, through hf_xet's store in a local folder. HF_ENDPOINT is
read when huggingface_hub is imported, so a client is best a process of its own:

    with Hub() as hub:
        commit = hub.commit("org/name", {"config.json": b"{}"})
        hub.faults = lambda asked: Fault(status=503) if asked.method == "GET" else None
        subprocess.run([...], env=os.environ | hub.environment(tmp_path))
        assert hub.moved("model.safetensors") == 8
"""

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.support.hub_answers import Answer, Body
from tests.support.hub_state import Account, Asked, Fault, File, Refusal, Repo
from tests.support.hub_store import PIECE, Blob, Line, Store
from tests.support.hub_xet import Xet, stand_in


class Hub:
    """The server and its state; `faults` may be set at any time to a function from a request to a
    `Fault` or None."""

    def __init__(
        self,
        token: str = "",
        read_token: str = "",
        redirect: bool = False,
        part_size: int = 64 << 20,
        xet: bool = False,
        folder: Path | None = None,
    ):
        # who has which token; with none of them everybody may do everything
        self.accounts: dict[str, Account] = {token: Account()} if token else {}
        if read_token:
            self.accounts[read_token] = Account(role="read")
        # send readers of large files to another host, as the real Hub does to its CDN
        self.redirect = redirect
        self.part_size = part_size  # larger files are uploaded in several parts
        self.repos: dict[str, Repo] = {}
        self.store = Store(folder)
        self.xet = Xet(self.store.folder / "cas") if xet else None
        self.parts: dict[tuple[str, int], Blob] = {}
        self.ignored: set[str] = set()  # names that the repositories' .gitignore leaves out
        self.log: list[Asked] = []
        self.faults: Callable[[Asked], Fault | None] = lambda asked: None
        self.down, self.up = Line(), Line()  # what clients get and what they send
        self.lock = threading.RLock()
        self.servers = [self._serve() for _ in range(1 + redirect)]
        self.url = f"http://127.0.0.1:{self.servers[0].server_port}"
        # another name too: huggingface_hub 1.32 takes another port for the same host
        self.cdn = f"http://localhost:{self.servers[1].server_port}" if redirect else self.url

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
        self.store.close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a client, with its cache and login in a folder of the test."""
        none = dict.fromkeys(("HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), "")
        return none | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_HUB_DISABLE_XET": "" if self.xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "",
            "TRANSFORMERS_OFFLINE": "",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def repo(self, name: str, **how) -> Repo:
        """A repository, made as the Hub makes one: with one commit that holds .gitattributes."""
        with self.lock:
            if name not in self.repos:
                self.repos[name] = Repo(**how)
                first = self.store.keep(b"*.safetensors filter=lfs\n")
                self.repos[name].add({".gitattributes": self.file(".gitattributes", first)})
            return self.repos[name]

    def commit(
        self, name: str, files: Mapping[str, bytes | Path | None], branch: str = "main"
    ) -> str:
        """Commit files (None deletes; a path is read from there, and stays) on a branch; the new
        commit."""
        with self.lock:
            repo = self.repo(name)
            tree = dict(repo.trees[repo.refs.get(branch, repo.refs["main"])])
            for path, content in files.items():
                tree.pop(path, None)
                if content is not None:
                    tree[path] = self.file(path, self.store.keep(content))
            return repo.add(tree, branch)

    def file(self, path: str, blob: Blob) -> File:
        """A file of a tree, in Xet's store if that is in use and the file large."""
        file = File.of(path, blob, stand_in(blob.sha256))
        if self.xet is None or not file.large or not blob.size:
            return file
        if blob.sha256 not in self.xet.hashes():
            self.xet.upload(blob)
        return File.of(path, blob, self.xet.hashes()[blob.sha256][0])

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
        return [a.received for a in self.asked("PUT")]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that hangs up is no news
            super().handle_error(request, client_address)


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
        asked = Asked(self.command, parts.path, query, headers, self.server.server_port)
        is_upload = self.command == "PUT"
        if not is_upload:
            self._receive(asked, None)
        hub.log.append(asked)
        fault = hub.faults(asked) or Fault()
        if is_upload:
            self._receive(asked, fault.take)
        time.sleep(fault.delay)
        if fault.reset or fault.take is not None:
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

    def _receive(self, asked: Asked, limit: int | None) -> None:
        """Read the body at the speed of the line, at most so many bytes of it."""
        hub, size = self.server.hub, self.headers.get("Content-Length")
        if limit is None and not size and "Transfer-Encoding" not in self.headers:
            return
        receiver = hub.store.receiver(int(size) if size else None)
        for piece in self._pieces(int(size) if size else None):
            piece = piece if limit is None else piece[: limit - asked.received]
            hub.up.carry(len(piece))
            receiver.take(piece)
            asked.received += len(piece)
            if limit is not None and asked.received >= limit:
                return receiver.drop()
        asked.upload = receiver.blob()

    def _pieces(self, size: int | None) -> Iterator[bytes]:
        while size:
            piece = self.rfile.read(min(PIECE, size))
            if not piece:
                raise ConnectionError("the client hung up")
            size -= len(piece)
            yield piece
        if size is None:
            while length := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()

    def _answer(
        self, asked: Asked, fault: Fault, status: int, headers: dict[str, str], body: bytes | Body
    ) -> None:
        body = body if isinstance(body, Body) else Body.of(body)
        asked.status = status
        self.send_response(status)
        for name, value in ({"Content-Length": str(body.size)} | headers | fault.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if asked.method != "HEAD":
            self._send(asked, body if fault.cut is None else body.first(fault.cut))
        if fault.cut is not None:
            self.close_connection = True

    def _send(self, asked: Asked, body: Body) -> None:
        for piece in body.pieces():
            self.server.hub.down.carry(len(piece))
            asked.sent += len(piece)  # before: a client that has it all may look at once
            try:
                self.wfile.write(piece)
            except OSError:
                asked.sent -= len(piece)
                raise

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
