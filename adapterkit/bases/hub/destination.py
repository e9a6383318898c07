"""Outputs on the Hub: a repository, a branch and a folder, checked before a byte is sent, and
created if missing.

The rule is that of local folders (`core/output/folder_output.py`): an output never replaces an
input or foreign files, and an older output only with --overwrite.
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from pathlib import PurePosixPath

from adapterkit.bases.hub.errors import explained_errors
from adapterkit.bases.hub.folder import HubFolder
from adapterkit.bases.hub.listing import RemoteEntry, list_remote, offline
from adapterkit.bases.hub.retry import retry
from adapterkit.core.checkpoint.folder import Folder, original
from adapterkit.core.checkpoint.hub_ids import COMMIT, HubId, place_on_hub
from adapterkit.core.commands import command
from adapterkit.core.errors import Refused, listed, shown
from adapterkit.core.output.stage import RECEIPT, parse_receipt

# Weights that a loader picks by name alone, so that old ones next to new ones are silently wrong.
LOADABLE = re.compile(
    r"((diffusion_)?pytorch_model|adapter_model|model)[^/]*\.(safetensors|bin)(\.index\.json)?"
)

MOST_SOURCES = 100  # sources whose visibility is checked

FOLDER = "hf://org/name[@branch][:folder]"
FILE = "hf://org/name[@branch]:path/file"
FILES = (".safetensors", ".gguf")


def parse_output(out: str, *, endings: Collection[str] = ("",)) -> HubId:
    """Parse `hf://org/name[@branch][:folder]`, if "" is one of the `endings`, or a file with one of
    the others, `hf://org/name[@branch]:path/file.safetensors`; `Refused` for another text."""
    hub_id = place_on_hub(out)
    suffix = PurePosixPath(hub_id.subfolder).suffix if hub_id else ""
    if hub_id is None or COMMIT.fullmatch(hub_id.revision or ""):
        problem = "this is a commit" if hub_id else "this is no such name"
        hint = "give your account's or organization's name, the repository's, and a branch of it"
    elif "" not in endings and suffix not in endings:
        problem = "this is no name of a file"
        hint = f"give a name that ends in {' or '.join(endings)} after the colon"
    elif suffix in FILES and suffix not in endings:
        problem = "this is the name of a file"
        hint = "give its folder, because the format determines the file name"
    else:
        return hub_id
    raise Refused(
        f"{shown(out)}: {problem}",
        expected=" or ".join(FILE + ending if ending else FOLDER for ending in endings),
        where="--out",
        hint=hint,
        code="AK701",
    )


def _why_private(sources: Collection[str]) -> str | None:
    """The reason to make the output of these repositories private; None if all are public."""
    from huggingface_hub import HfApi

    if len(sources) > MOST_SOURCES:
        return f"it was made from more than {MOST_SOURCES} repositories"
    for source in sources:
        try:
            info = retry(lambda source=source: HfApi().model_info(source), HubId(source))
        except Refused:  # gone, or of others
            return f"its source {source} cannot be seen"
        if info.private:
            return f"{source} is private"
    return None


def _role() -> str | None:
    """The role of the account's token, if the Hub states it."""
    from huggingface_hub import HfApi

    return HfApi().whoami().get("auth", {}).get("accessToken", {}).get("role")


def check_apart(hub_id: HubId, folders: Iterable[Folder], head: str = "") -> None:
    """`Refused` if the output would replace an input; `head`: the commit of its branch, which may
    also name an input."""
    place = replace(hub_id, revision=hub_id.revision or "main")
    for folder in map(original, folders):
        if not isinstance(folder, HubFolder):
            continue
        read = replace(folder.pinned, revision=folder.hub_id.revision or "main")
        # names of the Hub lead to one repository in any case of their letters
        same = lambda one, other: str(one).lower() == str(other).lower()
        # by a commit or a tag; another branch stays where it is
        at_head = head == folder.commit and read.revision != "main"
        if same(replace(read, revision=place.revision) if at_head else read, place):
            raise Refused(
                f"the output is the input {folder.label}",
                expected="an output apart from the inputs",
                where=str(hub_id),
                hint=f"give another repository, or a new branch: --out hf://{hub_id.repo}@NAME",
                code="AK705",
            )


class Destination:
    """A repository, branch and folder on the Hub that files are written to. `exists`: the
    repository and the branch.

    `sources`: repositories whose weights go into it (`repositories`); a new one is private if one
    of them is, or cannot be seen. `inputs`: of the job. `Refused` if HF_HUB_OFFLINE is set, and if
    the destination is an input.
    """

    def __init__(
        self,
        hub_id: HubId,
        sources: Collection[str] = (),
        inputs: Collection[Folder] = (),
        receipt_name: str = RECEIPT,
    ):
        check_apart(hub_id, inputs)
        if offline():
            raise Refused(
                "HF_HUB_OFFLINE is set",
                expected="a network to push over",
                where=hub_id.repo,
                hint="unset HF_HUB_OFFLINE, or write a folder and push it later with `hf upload`",
                code="AK703",
            )
        self.hub_id, self.sources, self.inputs = hub_id, sources, inputs
        self.receipt_name = receipt_name  # of the output, in its folder
        self.exists = False
        self.is_new = True  # the place is still to be made, or a branch that stands where main does
        self.parent = ""  # the commit that the next one is made upon; "" before `create`
        self.before: dict[str, RemoteEntry] = {}  # the files of that commit in the folder
        self.outdated: list[str] = []  # files of an older output that go with the commit
        self.notes: list[str] = []  # for the receipt: what was created, and how
        self._repo_exists: bool | None = None  # None: unknown
        self._receipt: bytes | None = None  # None: not read yet

    def _has_repo(self) -> bool:
        if self._repo_exists is None:
            from huggingface_hub import HfApi

            ask = lambda: HfApi().repo_exists(self.hub_id.repo)
            self._repo_exists = retry(ask, self.hub_id)
        return self._repo_exists

    def check_account(self) -> None:
        """`Refused` unless there is a token that may write there, as far as the Hub says before
        anything is created."""
        from huggingface_hub import HfApi, get_token

        expected = "a token with write access"
        hint = "create one at https://huggingface.co/settings/tokens, then `hf auth login`"
        if not get_token():
            raise Refused(
                "not logged in to the Hub",
                expected=expected,
                where=str(self.hub_id),
                hint=hint,
                code="AK702",
            )
        if retry(_role, self.hub_id) == "read":
            raise Refused(
                "the token can only read",
                expected=expected,
                where=str(self.hub_id),
                hint=hint,
                code="AK702",
            )
        if self._has_repo():
            retry(lambda: HfApi().auth_check(self.hub_id.repo, write=True), self.hub_id)

    def check_files(
        self,
        names: Collection[str],
        *,
        overwrite: bool,
        job: str = "",
        is_there: Callable[[str, RemoteEntry], bool] = lambda name, entry: False,
    ) -> None:
        """`Refused` if these files would replace foreign ones, or if a loader might pick foreign
        weights in their folders. Older outputs need `overwrite`, or the same `job` (a fingerprint).
        `is_there`: whether the Hub has a file with the same content. Call `look` first."""
        older = parse_receipt(self.receipt())
        written = {*older["files"], self.receipt_name} if older else set[str]()
        folders = {str(PurePosixPath(name).parent) for name in names}
        beside = set(self._weights(folders)).difference(names)
        there = set() if self.is_new else {name for name in names if name in self.before}
        differs = lambda name: name in beside or not is_there(name, self.before[name])
        folders = {other for other in self.before for name in names if other.startswith(f"{name}/")}
        foreign = sorted(folders.union(filter(differs, (there | beside) - written)))
        if foreign:
            raise Refused(
                f"files that adapterkit did not write are there already: {listed(foreign)}",
                expected="a new destination, or that of an older output"
                + "; a loader might pick the old weights" * bool(beside.intersection(foreign)),
                where=str(self.hub_id),
                hint="push to another repository or a new branch, or delete them first\n"
                + self._deletion(foreign),
                code="AK705",
            )
        replaces = overwrite or self.is_new or bool(job and older.get("fingerprint") == job)
        if not replaces and (replaced := sorted(filter(differs, there))):
            raise Refused(
                f"an older output is there: {listed(replaced)}",
                expected="a new destination",
                where=str(self.hub_id),
                hint="choose another repository or a new branch, or give --overwrite to replace it",
                code="AK705",
            )
        self.outdated = sorted(written.intersection(self.before) - set(names)) if replaces else []

    def _deletion(self, names: Collection[str]) -> str:
        """The command that removes these files."""
        repo, branch = self.hub_id.repo, self.hub_id.revision
        paths = [self.hub_id.path(name) for name in names]
        deletion = command("hf repos delete-files", repo, *paths, revision=branch)
        if self.exists or branch is None:
            return deletion
        # the branch would begin with the files of main
        return f"{command('hf repos branch create', repo, branch)} && {deletion}"

    def receipt(self) -> bytes:
        """The receipt on the Hub; empty without one."""
        if self._receipt is None:
            entry, self._receipt = self.before.get(self.receipt_name), b""
            if entry is not None:
                there = HubFolder(HubId(self.hub_id.repo, self.parent, self.hub_id.subfolder))
                self._receipt = there.read(self.receipt_name, 0, entry.size)
        return self._receipt

    def look(self) -> None:
        """List the files of the branch; if it does not exist yet, those it would start with.
        `Refused` if the destination is an input, or a file."""
        from huggingface_hub import HfApi

        repo, branch, api = self.hub_id.repo, self.hub_id.revision, HfApi()
        if not self._has_repo():
            return
        self.exists = branch is None or retry(
            lambda: api.revision_exists(repo, branch), self.hub_id
        )
        there = self.hub_id if self.exists else HubId(repo, None, self.hub_id.subfolder)
        self.parent, self.before = list_remote(there, hidden=True)
        self.is_new = branch not in (None, "main") and (
            not self.exists or self.parent == list_remote(HubId(repo))[0]
        )
        if not self.is_new:
            check_apart(self.hub_id, self.inputs, self.parent)
        if "" in self.before:
            raise Refused(
                "a file of this name exists",
                expected="a folder, there or not",
                where=str(self.hub_id),
                hint="choose another folder",
                code="AK705",
            )

    def create(self) -> None:
        """Create a missing repository and branch; `Refused` if this account may not."""
        from huggingface_hub import HfApi

        repo, branch, api = self.hub_id.repo, self.hub_id.revision, HfApi()
        if self.exists:
            return
        with explained_errors(self.hub_id):
            if not self._has_repo():
                reason = _why_private(self.sources)
                create = lambda: api.create_repo(repo, private=bool(reason) or None, exist_ok=True)
                retry(create, self.hub_id)
                if reason:
                    self.notes.append(f"{repo} is new, and private: {reason}")
            if branch is not None:
                retry(lambda: api.create_branch(repo, branch=branch, exist_ok=True), self.hub_id)
            self.is_new = self._has_repo()  # another writer may have committed to a new one
        self.parent, self.before = list_remote(self.hub_id, hidden=True)
        self.exists = True

    def _weights(self, folders: Collection[str]) -> list[str]:
        """The weights that a loader would pick in these folders."""
        return sorted(
            name
            for name in self.before
            if str(PurePosixPath(name).parent) in folders
            and LOADABLE.fullmatch(PurePosixPath(name).name)
        )
