"""What the Hub on 127.0.0.1 holds: requests, faults, repositories."""

import hashlib
import re
from dataclasses import dataclass, field
from urllib.parse import unquote

# stored as LFS, with whatever holds a zero byte near its start
LARGE = (".safetensors", ".bin", ".gguf", ".pt")


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
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n"
        ).encode()
        stored = pointer if large else data
        return cls(
            data, large, sha256, hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
        )

    def described(self) -> dict:
        lfs = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        large = {"lfs": lfs, "xetHash": self.sha256[::-1]} if self.large else {}
        return {"size": len(self.data), "oid": self.oid} | large


Tree = dict[str, File]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    disabled: bool = False
    read_only: bool = False  # for whoever asks
    region: str = "us"
    objects: set[str] = field(default_factory=set)  # sha256 of the large files that it holds
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
