"""What the Hub on 127.0.0.1 knows: requests, faults, accounts, repositories."""

import hashlib
import re
from dataclasses import dataclass, field
from urllib.parse import unquote

from tests.support.hub_store import Blob

# stored as LFS, with whatever holds a zero byte near its start
LARGE = (".safetensors", ".bin", ".gguf", ".pt")


@dataclass
class Asked:
    """One request, and what was answered."""

    method: str
    raw: str  # the path as it came, where a quoted slash belongs to a name
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    port: int
    upload: Blob | None = None  # the body, once it is there
    status: int = 0
    received: int = 0  # bytes of the body that arrived
    sent: int = 0  # bytes of the body of the answer that were written

    @property
    def body(self) -> bytes:
        return self.upload.read() if self.upload else b""

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
    take: int | None = None  # of a PUT: read so many bytes of the body, then reset
    delay: float = 0.0  # seconds before the answer
    reset: bool = False  # reset the connection without an answer
    lose_answer: bool = False  # do what was asked, then reset


@dataclass(frozen=True)
class Account:
    """Whose a token is, and what the token may do."""

    name: str = "me"
    role: str = "write"  # read, write or fineGrained
    orgs: tuple[str, ...] | None = None  # None: a member of all
    permissions: tuple[str, ...] = ()  # of a fineGrained token, such as repo.write

    def owns(self, repo: str) -> bool:
        namespace = repo.partition("/")[0]
        return self.orgs is None or namespace in (self.name, *self.orgs)

    def may_write(self, repo: str) -> bool:
        writes = self.role == "write" or "repo.write" in self.permissions
        return writes and self.owns(repo)

    def described(self) -> dict:
        """As whoami-v2 answers."""
        token: dict = {"displayName": "a token of the test", "role": self.role}
        if self.role == "fineGrained":
            entities = [{"name": name, "type": "user"} for name in (self.name, *(self.orgs or ()))]
            token["fineGrained"] = {
                "global": [],
                "scoped": [
                    {"entity": entity, "permissions": list(self.permissions)} for entity in entities
                ],
            }
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in self.orgs or ()]
        return {
            "type": "user",
            "name": self.name,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": token},
        }


@dataclass(frozen=True)
class File:
    blob: Blob
    large: bool
    oid: str
    xet_hash: str | None

    @classmethod
    def of(cls, path: str, blob: Blob, xet_hash: str) -> "File":
        start = blob.read(0, 512)
        large = path.endswith(LARGE) or b"\0" in start
        pointer = (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{blob.sha256}\n"
            f"size {blob.size}\n"
        ).encode()
        stored = pointer if large else blob.read()
        oid = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
        return cls(blob, large, oid, xet_hash if large else None)

    @property
    def data(self) -> bytes:
        return self.blob.read()

    @property
    def sha256(self) -> str:
        return self.blob.sha256

    @property
    def size(self) -> int:
        return self.blob.size

    def described(self) -> dict:
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        large = {"lfs": lfs, "xetHash": self.xet_hash} if self.large else {}
        return {"size": self.size, "oid": self.oid} | large


Tree = dict[str, File]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    disabled: bool = False
    read_only: bool = False  # for whoever asks
    region: str = "us"  # files are not copied between repositories of two regions
    trees: dict[str, Tree] = field(default_factory=dict)  # by commit, oldest first
    refs: dict[str, str] = field(default_factory=dict)  # branches and tags
    objects: set[str] = field(default_factory=set)  # sha256 of the large files that it may commit

    def resolve(self, revision: str) -> str | None:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.trees else None

    def add(self, tree: Tree, branch: str = "main") -> str:
        commit = hashlib.sha1(f"{id(self)} {len(self.trees)}".encode()).hexdigest()
        self.trees[commit] = tree
        self.refs[branch] = commit
        self.objects |= {file.sha256 for file in tree.values() if file.large}
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
