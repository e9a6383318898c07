"""The answers of the Hub on 127.0.0.1, route by route."""

import base64
import hashlib
import json
import re
from typing import TYPE_CHECKING
from urllib.parse import unquote

from tests.support.hub_state import LARGE, Asked, Fault, File, Refusal, Repo, Tree

if TYPE_CHECKING:
    from tests.support.hub_server import Hub


class Answer:
    """Status, headers and body for one request, found by the first route whose method and pattern
    match."""

    ROUTES: tuple[tuple[str, str, str], ...] = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/auth-check(?P<write>/write)?", "auth_check"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/lfs-files/duplicate", "duplicate"),
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

    def __init__(self, hub: "Hub", asked: Asked, fault: Fault):
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

    def whoami(self):
        if not self.asked.token or (self.hub.token and self.asked.token not in self.hub.tokens):
            raise Refusal(401, message="Invalid credentials in Authorization header")
        reads = bool(self.hub.token) and self.asked.token != self.hub.token
        token = {"displayName": "test", "role": "read" if reads else "write"}
        return {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": token}}

    def auth_check(self, repo, write=""):
        found = self._readable(repo)
        if write:
            self._may_write()
            if found.read_only:
                raise Refusal(403, message=f"You may not write to {repo}")
        return {}

    def duplicate(self, repo):
        """Large files of this repository that another one holds from now on, too."""
        self._may_write()
        wanted = self._json()
        source, target = self._readable(repo), self._readable(wanted["target"]["name"])
        if source.region != target.region:
            raise Refusal(403, message="Cross-region copy is not supported")
        missing = [file for file in wanted["files"] if file["sha256"] not in source.objects]
        target.objects |= {f["sha256"] for f in wanted["files"] if f not in missing}
        failed = [{"sha256": file["sha256"], "error": "no such object"} for file in missing]
        return {"failed": failed}

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
        found, wanted = self._readable(repo), self._json()["objects"]
        found.objects |= {o["oid"] for o in wanted}  # once they are there
        return {
            "transfer": "basic",
            "objects": [self._actions(o["oid"], o["size"]) for o in wanted],
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
                held = self.hub.repos[repo].objects
                if value["oid"] not in self.hub.blobs or value["oid"] not in held:
                    raise Refusal(
                        400,
                        message=(
                            f"LFS pointer pointed to a file that does not exist: {value['path']}"
                        ),
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
        if self.asked.token in self.hub.tokens and self.asked.token != self.hub.token:
            raise Refusal(403, message="This token may only read")
        if self.hub.token and self.asked.token != self.hub.token:
            known = (
                f"Invalid token {self.asked.token}"
                if self.asked.token
                else "Invalid username or password."
            )
            raise Refusal(401, message=known)

    def _readable(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        known = not self.hub.token or self.asked.token in self.hub.tokens
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
