"""Random jobs on a Hub that fails at random requests: what comes of each is a complete and right
output, or nothing changed and a message; no input and no file of others is ever replaced.

The oracle is apart from the code: the bytes of the same job without a fault on this machine, and
from the files that were there before, whether the job may write at all.
"""

import collections
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.hub_client import TOKEN, Client, ClientError
from tests.support.hub_models import CALLS, adapter_files, base_files
from tests.support.hub_server import Hub
from tests.support.hub_state import Account, Asked, Fault

FIRST = range(2)  # layers: the shards of the others are copied on the Hub
JOBS = {
    "merge": "adapterkit.merge('{base}', ['me/adapter'], {more})",
    "copies": "adapterkit.merge('{base}', ['me/first'], {more})",
    "one-file": "adapterkit.merge('{base}', ['me/adapter'], max_shard_size='10MB', {more})",
    "init": "adapterkit.init('{base}', method='pissa', rank=2, targets='q_proj', {more})",
    "convert": "adapterkit.convert('me/adapter', to='mlx', {more})",
    "foreign": "adapterkit.convert('me/mlx', to='peft', {more})",
}
PUSHED = ("merge", "copies", "one-file")  # verbs with --push
INPUTS = ("me/base", "me/adapter", "me/first", "me/mlx")
FAULTS = {
    "503": Fault(status=503),
    "500": Fault(status=500),
    "429": Fault(status=429, headers={"Retry-After": "0"}),
    "404": Fault(status=404),
    "403": Fault(status=403),
    "401": Fault(status=401),
    "412": Fault(status=412),
    "reset": Fault(reset=True),
    "lost": Fault(lose_answer=True),
    "cut": Fault(cut=100),
    "short": Fault(take=100),
    "whole": Fault(ignore_range=True),
    "nonsense": Fault(status=200, body=b'{"x": []}', headers={"Content-Type": "application/json"}),
}
EVENTS = ("permission", "moved base", "moved output")
CALM = lambda asked: None


@dataclass(frozen=True)
class Case:
    """A job, where it goes, what is there, and what goes wrong."""

    job: str
    push: bool
    there: str  # nothing, foreign, card, older, an input's place, a new or an old branch
    folder: str
    overwrite: bool
    fault: str
    at: int  # the request that it begins with
    times: int

    @classmethod
    def drawn(cls, seed: int) -> "Case":
        draw = random.Random(f"hub {seed}")
        push = draw.random() < 0.35
        places = ["nothing", "nothing", "nothing", "foreign", "card", "older", "older", "input"]
        there = draw.choice(places if push else [*places, "new branch", "old branch"])
        in_folder = not push and there != "input" and draw.random() < 0.3
        return cls(
            draw.choice(PUSHED if push else [*JOBS]),
            push,
            there,
            "in/it" if in_folder else "",
            draw.random() < 0.4,
            draw.choice([*FAULTS, *EVENTS, "none"]),
            draw.randrange(40),
            draw.choice((1, 1, 2, 4, 1000)),
        )


@dataclass
class Place:
    """A hub with inputs, a client, and what each job makes without a fault."""

    hub: Hub
    client: Client
    root: Path
    wanted: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def expected(self, job: str) -> dict[str, bytes]:
        if job not in self.wanted:
            out = self.root / "wanted" / job
            self.client(JOBS[job].format(base="me/base", more=f"out={str(out)!r}") + ".data")
            self.wanted[job] = {
                path.relative_to(out).as_posix(): path.read_bytes()
                for path in out.rglob("*")
                if path.is_file()
            }
        return self.wanted[job]


@contextmanager
def opened(root: Path) -> Iterator[Place]:
    with Hub(token=TOKEN) as hub:
        variables = os.environ | hub.environment(root / "home") | {"HF_TOKEN": TOKEN}
        client = Client(variables, root / "stderr")
        client(CALLS)
        client("retry.WAIT, retry.MAX_WAIT = 0.001, 0.002")
        client("import huggingface_hub.utils._http as http\nhttp.time.sleep = lambda s: None")
        try:
            hub.commit("me/base", base_files())
            hub.commit("me/adapter", adapter_files())
            hub.commit("me/first", adapter_files(layers=FIRST))
            place = Place(hub, client, root)
            mlx = place.expected("convert")
            hub.commit("me/mlx", {name: mlx[name] for name in mlx if name != "adapterkit.json"})
            yield place
        finally:
            client.close()


@dataclass
class Outcome:
    case: Case
    allowed: bool
    first: str = ""  # done, or the error's class
    second: str = ""
    wrong: list[str] = field(default_factory=list)


def run(place: Place, seed: int) -> Outcome:
    """One case: with its fault, then resumed without."""
    return _Run(place, Case.drawn(seed), f"me/out{seed}").run()


class _Run:
    def __init__(self, place: Place, case: Case, repo: str):
        self.place, self.hub, self.case = place, place.hub, case
        self.out = place.root / "out"
        self.base = "me/base"
        self.branch = "main"
        self.repo = INPUTS[0] if case.there == "input" else repo
        if case.job in ("convert", "foreign") and case.there == "input":
            self.repo = "me/adapter" if case.job == "convert" else "me/mlx"
        self.expected = place.expected(case.job)
        if case.there.endswith("branch"):
            self.branch = "dev"
        self._prepare()
        self.before = {name: self._state(name) for name in self.hub.repos}

    def _prepare(self) -> None:
        """What is at the output's place before."""
        case, folder = self.case, f"{self.case.folder}/" if self.case.folder else ""
        name = next(name for name in self.expected if name.endswith(".safetensors"))
        foreign = {f"{folder}{name}": b"\0of somebody", f"{folder}notes.txt": b"of somebody"}
        if case.there == "foreign":
            self.hub.commit(self.repo, foreign)
        if case.there == "card":
            self.hub.commit(self.repo, {f"{folder}README.md": b"by hand", "x.png": b"\0"})
        if case.there == "new branch":
            self.hub.commit(self.repo, {f"{folder}notes.txt": b"of somebody"})
        if case.there == "old branch":
            self.hub.commit(self.repo, foreign, "dev")
        if case.there == "older":
            older = "one-file" if case.job != "one-file" else "merge"
            files = self.place.expected(older) | {"notes.txt": b"by hand"}
            self.hub.commit(self.repo, {f"{folder}{n}": data for n, data in files.items()})

    @property
    def allowed(self) -> bool:
        """Whether the job may write: by what is there, not by what the code says."""
        there = self.case.there
        if there == "older":
            return self.case.overwrite
        if there == "card":  # of somebody, where the output has one too
            return "README.md" not in self.expected
        return there in ("nothing", "new branch")

    def call(self, more: str = "") -> str:
        """The job, as the client does it."""
        place = f"out={str(self.out)!r}, push={self.repo!r}"
        if not self.case.push:
            branch = f"@{self.branch}" if self.branch != "main" else ""
            folder = f":{self.case.folder}" if self.case.folder else ""
            place = f"out='hf://{self.repo}{branch}{folder}'"
        more = f"{place}, overwrite={self.case.overwrite}{more}"
        return JOBS[self.case.job].format(base=self.base, more=more) + ".data"

    def run(self) -> Outcome:
        outcome = Outcome(self.case, self.allowed)
        self.hub.faults = self._faults()
        outcome.first = self._attempt(outcome, self.call())
        self._settle()
        self._look(outcome, outcome.first)
        for _ in range(2):  # the second time there is nothing to do
            outcome.second = self._attempt(outcome, self.call(", resume=True"))
            self._look(outcome, outcome.second)
            # what is finished is not gone on with: it reads the base where that is by now
            is_other = self.case.fault == "moved base" and outcome.first == "done"
            if (outcome.second == "done") != self.allowed and not is_other:
                outcome.wrong.append(f"without faults: {outcome.second}")
        self._tidy()
        return outcome

    def _attempt(self, outcome: Outcome, call: str) -> str:
        try:
            self.place.client(call)
            return "done"
        except ClientError as error:
            if error.kind not in ("Refused", "Failed", "Unreachable", "Damaged", "MultipleErrors"):
                outcome.wrong.append(f"{error.kind}: {error.trace}")
            elif error.kind != "MultipleErrors" and not (
                error.parts["problem"] and error.parts["hint"]
            ):
                outcome.wrong.append(f"no hint: {error.text}")
            return f"{error.kind}: {error.parts['problem']}"

    # -- the fault ---------------------------------------------------------------------------------

    def _faults(self):
        case, count = self.case, [0]
        self.moved: dict[str, bytes] = {}

        def faults(asked: Asked) -> Fault | None:
            count[0] += 1
            number = count[0] - case.at
            if case.fault == "none" or not 0 <= number < case.times:
                return None
            if case.fault not in EVENTS:
                fault = FAULTS[case.fault]
                return None if fault.take and asked.method != "PUT" else fault
            if number == 0:
                self._event(case.fault)
            return None

        return faults

    def _event(self, event: str) -> None:
        if event == "permission":
            self.hub.accounts[TOKEN] = Account(role="read")
        elif event == "moved base":
            self.hub.commit(INPUTS[0], {".later": b"1"})
            self.before[INPUTS[0]] = self._state(INPUTS[0])
        elif self.repo in self.hub.repos and self.repo not in INPUTS:
            files = {".later": b"by others"}
            self.hub.commit(self.repo, files, self.branch)
            if self.repo in self.before:
                before = self.before[self.repo].get(self.branch)
                main = self.before[self.repo]["main"]
                self.before[self.repo][self.branch] = (main if before is None else before) | files

    def _settle(self) -> None:
        self.hub.faults = CALM
        self.hub.accounts[TOKEN] = Account()

    # -- what has come of it -----------------------------------------------------------------------

    def _state(self, name: str) -> dict[str, dict[str, bytes]]:
        return {ref: self.hub.files(name, ref) for ref in self.hub.repos[name].refs}

    def _look(self, outcome: Outcome, said: str) -> None:
        """Compare all repositories with what they were, and with the right output."""
        for name, before in self.before.items():
            for branch, files in before.items():
                if (name, branch) != (self.repo, self.branch):
                    now = self.hub.files(name, branch)
                    if now != files:
                        outcome.wrong.append(f"{name}@{branch} has changed: {_changes(files, now)}")
        repo = self.hub.repos.get(self.repo)
        there = repo is not None and self.branch in repo.refs
        refs = self.before.get(self.repo, {})
        before = refs.get(self.branch, refs.get("main", {}))
        now = self.hub.files(self.repo, self.branch) if there else before
        is_right = there and self._is_right(before, now)
        unchanged = {n: d for n, d in now.items() if n not in (".gitattributes", ".later")} == {
            n: d for n, d in before.items() if n not in (".gitattributes", ".later")
        }
        if said == "done" and not is_right:
            outcome.wrong.append(f"done, and wrong: {_changes(before, now)}")
        if said != "done" and not (unchanged or (is_right and self.allowed)):
            outcome.wrong.append(f"{said}, and changed: {_changes(before, now)}")
        if said == "done" and not self.allowed:
            outcome.wrong.append("done, where it may not write")

    def _is_right(self, before: dict[str, bytes], now: dict[str, bytes]) -> bool:
        """The output, whole, and of what was there before all that is not of an older output."""
        prefix = f"{self.case.folder}/" if self.case.folder else ""
        output = {prefix + name: data for name, data in self.expected.items()}
        receipt = before.get(prefix + "adapterkit.json")
        older = {prefix + name for name in json.loads(receipt)["files"]} if receipt else set()
        kept = {n: d for n, d in before.items() if n not in older and n not in output}
        ignored = (".gitattributes", ".later", prefix + "adapterkit.json")
        strip = lambda files: {name: data for name, data in files.items() if name not in ignored}
        is_whole = strip(now) == strip(kept | output) and prefix + "adapterkit.json" in now
        return is_whole and self._is_receipt(now[prefix + "adapterkit.json"])

    def _is_receipt(self, data: bytes) -> bool:
        files = {name: len(content) for name, content in self.expected.items()}
        listed = json.loads(data)["files"]
        return {n: entry["size"] for n, entry in listed.items()} == {
            name: size for name, size in files.items() if name != "adapterkit.json"
        }

    def _tidy(self) -> None:
        """Forget the case: its output here, its work, its repository."""
        shutil.rmtree(self.out, ignore_errors=True)
        for work in (self.place.root, self.place.root / "home" / "adapterkit"):
            for path in work.glob(".*.adapterkit"):
                shutil.rmtree(path, ignore_errors=True)
        if self.repo not in INPUTS:
            self.hub.repos.pop(self.repo, None)


def _changes(before: dict[str, bytes], now: dict[str, bytes]) -> str:
    gone, new = sorted(before.keys() - now.keys()), sorted(now.keys() - before.keys())
    other = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    return f"gone {gone}, new {new}, other {other}"


def main() -> None:
    """Run the seeds from the first number to before the second, and print what came of them."""
    counts: collections.Counter = collections.Counter()
    first, last = map(int, sys.argv[1:3])
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder)) as place:
        for seed in range(first, last):
            outcome = run(place, seed)
            counts[outcome.first.partition(":")[0], outcome.second.partition(":")[0]] += 1
            if outcome.wrong:
                print(seed, outcome.case, *outcome.wrong, sep="\n   ", flush=True)
                counts["wrong"] += 1
    print(dict(counts))


if __name__ == "__main__":
    main()
