"""The answers of the Hub on 127.0.0.1, route by route."""

import base64
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote

from tests.support.hub_state import LARGE, Account, Asked, Fault, File, Refusal, Repo, Tree
from tests.support.hub_store import Blob

if TYPE_CHECKING:
    from tests.support.hub_server import Hub


@dataclass(frozen=True)
class Body:
    """The bytes [start, stop) of a blob, as the body of an answer."""

    blob: Blob
    start: int
    stop: int

    @classmethod
    def of(cls, data: bytes) -> "Body":
        return cls(Blob(len(data), "", data), 0, len(data))

    @property
    def size(self) -> int:
        return self.stop - self.start

    def first(self, count: int) -> "Body":
        return Body(self.blob, self.start, min(self.stop, self.start + count))

    def pieces(self) -> Iterator[bytes]:
        return self.blob.pieces(self.start, self.stop)


class Answer:
    """Status, headers and body for one request, found by the first route whose method and pattern
    match."""

    ROUTES: tuple[tuple[str, str, str], ...] = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/auth-check(?P<write>/write)?", "auth_check"),
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
        (
            "GET",
            r"/api/models/(?P<repo>[^/]+/[^/]+)/xet-(?P<kind>read|write)-token/(?P<revision>.+)",
            "xet_token",
        ),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/lfs-files/duplicate", "duplicate"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("GET HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET HEAD", r"/cdn/(?P<oid>[0-9a-f]{64})", "from_cdn"),
        ("PUT", r"/lfs/(?P<repo>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?", "put"),
        ("POST", r"/lfs/(?P<repo>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})/complete", "complete"),
        ("POST", r"/lfs/(?P<repo>[^/]+/[^/]+)/verify", "verify"),
    )

    def __init__(self, hub: "Hub", asked: Asked, fault: Fault):
        self.hub, self.asked, self.fault = hub, asked, fault

    def find(self) -> tuple[int, dict[str, str], bytes | Body]:
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

    # Accounts and repositories

    def whoami(self):
        account = self._account()
        if account is None:
            raise Refusal(401, message="Invalid username or password.")
        return account.described()

    def auth_check(self, repo, write=""):
        self._readable(repo)
        if write:
            self._may_write(repo)
        return {}

    def create(self):
        wanted = self._json()
        account = self._account()
        name = f"{wanted.get('organization') or (account or Account()).name}/{wanted['name']}"
        self._may_write(name, "You don't have the rights to create a model under the namespace")
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
            {"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": 134}}
            if file.large
            else {}
        )
        return {"size": file.size, "blobId": file.oid} | lfs

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
        self._may_write(repo)
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
        asked = parse_qs(self.asked.body.decode()).get("paths", [])  # a form, not JSON
        paths = [path for path in asked if path in tree]
        return [{"type": "file", "path": path} | tree[path].described() for path in paths]

    # Reading

    def resolve(self, repo, revision, path):
        commit, tree = self._tree(repo, revision)
        found = self.hub.repos[repo]
        at = {"X-Repo-Commit": commit}
        if found.gated and self.asked.token not in self.hub.accounts:
            raise Refusal(403, "GatedRepo", f"Access to model {repo} is restricted.")
        if path not in tree:
            raise Refusal(404, "EntryNotFound", "Entry not found", at)
        file = tree[path]
        linked = self._links(repo, commit, file) if file.large else {}
        if file.large and self.hub.redirect:
            address = f"{self.hub.cdn}/cdn/{file.sha256}?Signature=secret"
            return 302, at | linked | {"Location": address}, b""
        status, headers, body = self._bytes(file.blob)
        return (
            status,
            headers | at | linked | {"ETag": f'"{file.sha256 if file.large else file.oid}"'},
            body,
        )

    def _links(self, repo: str, commit: str, file: File) -> dict[str, str]:
        links = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if self.hub.xet is None or not file.size:
            return links
        route = f"{self.hub.url}/api/models/{repo}/xet-read-token/{commit}"
        return links | {"X-Xet-Hash": file.xet_hash or "", "Link": f'<{route}>; rel="xet-auth"'}

    def from_cdn(self, oid):
        return self._bytes(self.hub.store.blobs[oid])

    def _bytes(self, blob: Blob) -> tuple[int, dict[str, str], Body]:
        kind = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        wanted, size = self.asked.range, blob.size
        if wanted is None or self.fault.ignore_range:
            return 200, kind, Body(blob, 0, size)
        start, stop = wanted[0], min(wanted[1], size)
        if start >= size:
            raise Refusal(416, headers={"Content-Range": f"bytes */{size}"})
        headers = kind | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        return 206, headers, Body(blob, start, stop)

    def xet_token(self, repo, kind, revision):
        """Where Xet's store is, in headers for one half of the client, as JSON for the other."""
        if kind == "write":
            self._may_write(repo)
        self._readable(repo)
        if self.hub.xet is None:
            raise Refusal(404, message="no such route")
        about = {"casUrl": self.hub.xet.url, "accessToken": "xet", "exp": int(time.time()) + 3600}
        headers = {
            "X-Xet-Cas-Url": about["casUrl"],
            "X-Xet-Access-Token": about["accessToken"],
            "X-Xet-Token-Expiration": str(about["exp"]),
        }
        return 200, JSON | headers, json.dumps(about).encode()

    # Writing

    def preupload(self, repo, revision):
        self._may_write(repo)
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
        self._may_write(repo)
        self._readable(repo)
        wanted = self._json()["objects"]
        return {
            "transfer": "basic",
            "objects": [self._actions(repo, o["oid"], o["size"]) for o in wanted],
        }

    def _actions(self, repo: str, oid: str, size: int) -> dict:
        if oid in self.hub.repos[repo].objects:
            return {"oid": oid, "size": size}
        address = f"{self.hub.url}/lfs/{repo}/{oid}"
        upload: dict = {"href": f"{address}?X-Amz-Signature=signed"}
        if size > self.hub.part_size:
            count = -(-size // self.hub.part_size)
            urls = {f"{part:05d}": f"{address}/{part}" for part in range(1, count + 1)}
            upload = {
                "href": f"{address}/complete",
                "header": {"chunk_size": str(self.hub.part_size)} | urls,
            }
        verify = {"href": f"{self.hub.url}/lfs/{repo}/verify"}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def put(self, repo, oid, part=""):
        blob = self.asked.upload or Body.of(b"").blob
        if part:
            self.hub.parts[oid, int(part)] = blob
        else:
            self._keep(repo, oid, blob)
        return 200, {"ETag": f'"{blob.sha256[:32]}"'}, b""

    def complete(self, repo, oid):
        numbers = sorted(p["partNumber"] for p in self._json()["parts"])
        parts = [self.hub.parts.pop((oid, number)) for number in numbers]
        receiver = self.hub.store.receiver(sum(part.size for part in parts))
        for part in parts:
            for piece in part.pieces():
                receiver.take(piece)
        self._keep(repo, oid, receiver.blob())
        return {}

    def _keep(self, repo: str, oid: str, blob: Blob) -> None:
        if blob.sha256 != oid:
            raise Refusal(400, message="the upload does not have the promised sha256")
        self.hub.store.blobs[oid] = blob
        self.hub.repos[repo].objects.add(oid)

    def verify(self, repo):
        wanted = self._json()
        blob = self.hub.store.blobs.get(wanted["oid"])
        if blob is None or blob.size != wanted["size"]:
            raise Refusal(404, message="object not found")
        return {}

    def duplicate(self, repo):
        """Large files of one repository become objects of another, of the same region."""
        wanted = self._json()
        source, target = self._readable(repo), wanted["target"]["name"]
        self._may_write(target)
        into = self._readable(target)
        if source.region != into.region:
            raise Refusal(403, message="Cross-region copy is not supported")
        there = {(f.sha256, f.xet_hash) for tree in source.trees.values() for f in tree.values()}
        asked = {(file["sha256"], file["xetHash"]) for file in wanted["files"]}
        into.objects |= {sha256 for sha256, _ in asked & there}
        return {"failed": [{"sha256": s, "error": "no such object"} for s, _ in asked - there]}

    def commit(self, repo, revision):
        self._may_write(repo)
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
                blob = self.hub.store.keep(base64.b64decode(value["content"]))
                tree[value["path"]] = self.hub.file(value["path"], blob)
            elif entry["key"] == "lfsFile":
                blob = self._object(repo, value["path"], value["oid"])
                tree[value["path"]] = self.hub.file(value["path"], blob)
            elif entry["key"].startswith("deleted"):
                gone = value["path"].rstrip("/")
                tree = {n: f for n, f in tree.items() if n != gone and not n.startswith(gone + "/")}
        commit = self.hub.repos[repo].add(tree, revision)
        return {
            "success": True,
            "commitOid": commit,
            "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}",
        }

    def _object(self, repo: str, path: str, oid: str) -> Blob:
        """The large file that a commit names; the repository must hold it, or Xet's store."""
        found, xet = self.hub.repos[repo], self.hub.xet
        if oid in found.objects:
            return self.hub.store.blobs[oid]
        if xet is None or oid not in (hashes := xet.hashes()):
            problem = f"LFS pointer pointed to a file that does not exist: {path}"
            raise Refusal(400, message=problem)
        if oid not in self.hub.store.blobs:
            copy = self.hub.store.folder / oid
            xet.download(*hashes[oid], copy)
            assert self.hub.store.keep(copy).sha256 == oid
        found.objects.add(oid)
        return self.hub.store.blobs[oid]

    # What all share

    def _json(self) -> dict:
        return json.loads(self.asked.body)

    def _account(self) -> Account | None:
        """Whose the token of the request is; None without one. 401 for an unknown one."""
        if not self.hub.accounts:
            return Account() if self.asked.token else None
        if self.asked.token and self.asked.token not in self.hub.accounts:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return self.hub.accounts.get(self.asked.token)

    def _may_write(self, repo: str, problem: str = "") -> None:
        """401 without a token; for a private repository of others 404; 403 for a token that may
        only read."""
        if repo in self.hub.repos and self.hub.repos[repo].read_only:
            raise Refusal(403, message=f"You may not write to {repo}")
        if not self.hub.accounts:
            return
        account = self._account()
        if account is None:
            raise Refusal(401, message="Invalid username or password.")
        if repo in self.hub.repos:
            self._readable(repo)
        if not account.may_write(repo):
            namespace = f' "{repo.partition("/")[0]}"'
            message = "Forbidden: you must use a write token to upload to a repository."
            raise Refusal(403, message=problem + namespace if problem else message)

    def _readable(self, name: str) -> Repo:
        repo, account = self.hub.repos.get(name), self._account()
        hides = repo is None or (repo.private and not (account and account.owns(name)))
        if repo is None or (hides and self.hub.accounts):
            unknown = self.hub.accounts and account is None
            raise Refusal(401 if unknown else 404, "RepoNotFound", "Repository not found")
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
