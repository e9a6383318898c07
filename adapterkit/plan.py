"""Plan before data: what every output tensor is made of, and the only executor.

A `Plan` says for each output file its exact bytes' layout, and for each tensor its `Step`: the stored tensor its rows start from
and the edits they go through. A file of factors is `Computed` instead: its `Task`s of tensors decide their own ranks, within
bounds that the plan knows. Everything that can be refused has been refused when a plan exists. `run` carries it out.
"""

import hashlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from adapterkit import __version__, dtypes
from adapterkit.checkpoint.folder import Folder, LocalFolder
from adapterkit.checkpoint.hashes import sha256_of_file
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import ShardLayout, Stored, laid_out
from adapterkit.checkpoint.reader import Identity, changed, identity
from adapterkit.checkpoint.stage import RECEIPT, Stage
from adapterkit.checkpoint.storage import free_bytes
from adapterkit.checkpoint.system import cores, quarter_of_memory
from adapterkit.edits import Edit
from adapterkit.errors import AdapterkitError, Interrupted, Refused, Unrecoverable
from adapterkit.kernels.stochastic import Draws

if TYPE_CHECKING:
    from torch import Tensor, device

RECEIPT_VERSION = 1
IDENTITY = ("inode", "size", "modified", "changed")
SEAL = b',\n  "seal": "'
BLOCK = 16 << 20  # bytes of a copied file at a time
SLACK = 128  # bytes by which the guess of a text's size may be wrong, its numbers in the header included
BUFFERS = 32_000_000  # bytes of one worker's
AHEAD = 2  # tasks for each worker that may wait to be written
STACKS = 1 << 30  # bytes of stacks of experts' factors that may be kept
HANDOFF = ".handoff"  # what a shard lays aside for later ones, until all are done


@dataclass(frozen=True, slots=True)
class Step:
    """One output tensor: its rows start from `source` and go through `edits`, in float32 (`wide`: in float64), rounded once to
    `dtype`: to nearest, or with `draws` stochastically."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorSpec
    edits: tuple[Edit, ...] = ()
    rows: int = 0  # the grid's rows when there are edits
    adapters: tuple[str, ...] = ()  # whose parts go in
    draws: Draws | None = None
    wide: bool = False

    @property
    def copied(self) -> bool:
        """Whether the source's bytes are taken unseen: an adapter's own values are looked at, they may not be finite."""
        unseen = self.source.folder == 0 or self.dtype not in dtypes.FLOATS
        return not self.edits and self.dtype == self.source.dtype and unseen

    @property
    def grid(self) -> tuple[int, int]:
        count = math.prod(self.shape)
        if not self.edits:
            return count, 1
        return self.rows, count // self.rows if self.rows else 0


@dataclass(frozen=True)
class Shard:
    """One output file and the steps of its tensors, in file order."""

    layout: ShardLayout
    steps: tuple[Step, ...]

    @property
    def file(self) -> str:
        return self.layout.file

    @property
    def size(self) -> int:
        return self.layout.size


class Inputs(Protocol):
    """What a computation may read: whole tensors, in `dtype`, on `device`, finite."""

    device: "device"

    def tensor(self, spec: TensorSpec) -> "Tensor": ...

    def stored(self, spec: TensorSpec) -> "Tensor":
        """In its own dtype."""
        ...

    def bytes(self, spec: TensorSpec) -> bytearray: ...

    def kept(self, spec: TensorSpec, cut: "Callable[[Tensor], Tensor]") -> "Tensor":
        """`cut(stored tensor)`, once for all who ask for it before long."""
        ...

    def handoff(self, key: str) -> "Tensor":
        """What a task of an earlier file laid aside."""
        ...


class TaskResult(NamedTuple):
    """What a task gave: its tensors by key, in the order of writing, and measured metrics for the receipt.

    A `TensorSpec` in place of a tensor: the bytes that are there, unseen. `aside`: tensors for tasks of later files.
    """

    tensors: "Mapping[str, Tensor | TensorSpec]"
    metrics: dict[str, Any]
    handoff: "dict[str, Tensor]" = {}  # noqa: RUF012 (never changed)


class Task(Protocol):
    """Tensors that are computed together, such as the factors of one module; a frozen record."""

    @property
    def name(self) -> str:
        """What the receipt calls it: the module."""
        ...

    @property
    def reads(self) -> tuple[TensorSpec, ...]: ...

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        """Its tensors, as large as they can become."""
        ...

    @property
    def memory(self) -> int:
        """Bytes that making it takes at most."""
        ...

    def compute(self, inputs: Inputs) -> TaskResult: ...


@dataclass(frozen=True)
class Computed:
    """One output file whose tensors are made by tasks, in this order; `size` is the most it can take.

    `by_width`: the tensors are in safetensors' own order instead, as its library writes them. Then sizes are as planned, but for
    those that a task's `varies` names, small ones whose size is only a good guess (JSON texts of a format).
    """

    file: str
    tasks: tuple[Task, ...]
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})
    finalize: "Callable[[list[dict[str, Any]]], list[Callable[[TaskResult], TaskResult]]] | None" = None  # metrics of all -> what to do to each
    safetensors_order: bool = False

    @cached_property
    def layout(self) -> ShardLayout:
        tensors = [stored for task in self.tasks for stored in task.max_outputs]
        if self.safetensors_order:
            tensors.sort(key=lambda stored: (dtypes.SERIAL.index(stored.dtype), stored.key))
        return laid_out(self.file, tensors, self.metadata, ordered=True)

    @cached_property
    def variable_size(self) -> frozenset[str]:
        return frozenset(key for task in self.tasks for key in getattr(task, "variable_size", ()))

    @property
    def size(self) -> int:
        return self.layout.size + SLACK * len(self.variable_size)


@dataclass(frozen=True)
class CopyFile:
    """A file of an input folder that goes into the output as it is."""

    folder: int
    name: str


@dataclass(frozen=True)
class FromMetrics:
    """A small file whose content depends on what was computed: metrics by task's or tensor's name, and by how many bytes tensors
    whose size was a guess have grown."""

    content: Callable[[dict[str, dict], int], bytes]


@dataclass(frozen=True)
class Plan:
    """What a verb will do, complete: inputs, output files, and what the receipt will say of it."""

    verb: str
    options: dict[str, Any]
    folders: tuple[Folder, ...]
    headers: dict[tuple[int, str], str]  # (folder, file) -> sha256 of its header
    identities: dict[
        tuple[int, str], Identity
    ]  # of the local ones: what tells a file from an edited one
    shards: tuple[Shard | Computed, ...]
    files: dict[
        str, bytes | CopyFile | FromMetrics
    ]  # index, config, tokenizer, card: written after the shards
    metrics: dict[str, Any] = field(
        default_factory=dict
    )  # for the receipt: what was decided while planning
    notes: tuple[str, ...] = ()
    models: tuple[int, ...] = (
        0,
    )  # the inputs that are too large to be read again for the receipt's hashes
    memory: int | None = (
        None  # bytes that tasks may take together; a quarter of the machine's if not given
    )
    warn: Callable[[dict[str, dict]], list[str]] = (
        lambda metrics: []
    )  # what the measured metrics give reason to say

    def recipe(self) -> dict[str, Any]:
        """What makes two plans the same: version, verb, options, inputs and output layout."""
        inputs: list[dict] = [{"name": f.name, **f.origin, "files": {}} for f in self.folders]
        for (folder, name), sha in sorted(self.headers.items()):
            inputs[folder]["files"][name] = {"header": sha}
        for (folder, name), who in self.identities.items():
            # not the device: its number can differ after a restart
            inputs[folder]["files"][name]["identity"] = dict(zip(IDENTITY, who[1:], strict=True))
        layout = hashlib.sha256()
        for shard in self.shards:
            layout.update(shard.file.encode() + shard.layout.header)
        return {
            "version": __version__,
            "verb": self.verb,
            "options": self.options,
            "inputs": inputs,
            "layout": layout.hexdigest(),
        }

    def totals(self) -> dict[str, Any]:
        """Sizes that a dry run prints: tensors and bytes; exact, but for computed files, where they are the most it can be."""
        streamed = [shard for shard in self.shards if isinstance(shard, Shard)]
        tasks = [
            task for shard in self.shards if isinstance(shard, Computed) for task in shard.tasks
        ]
        steps = [
            (step, stored)
            for shard in streamed
            for step, stored in zip(shard.steps, shard.layout.tensors, strict=True)
        ]
        changed = [(step, stored) for step, stored in steps if not step.copied]
        as_is = [
            stored
            for task in tasks
            if getattr(task, "copied", False)
            for stored in task.max_outputs
        ]
        computed = [
            stored
            for task in tasks
            if not getattr(task, "copied", False)
            for stored in task.max_outputs
        ]
        small = sum(self._small(file) for file in self.files.values())
        readers = [*(edit for step, _ in changed for edit in step.edits), *tasks]
        kept = {spec for reader in readers for spec in kept_by(reader)}  # read once for all
        factors = sum(
            spec.nbytes for reader in readers for spec in reader.reads if spec not in kept
        )
        factors += sum(spec.nbytes for spec in kept)
        written = sum(shard.layout.size for shard in self.shards) + small
        return {
            "shards": len(self.shards),
            "tensors": len(steps) + len(as_is) + len(computed),
            "tensors_changed": len(changed) + len(computed),
            "bytes_copied": sum(
                stored.nbytes
                for stored in [*(stored for step, stored in steps if step.copied), *as_is]
            ),
            "bytes_changed": sum(
                stored.nbytes for stored in [*(stored for _, stored in changed), *computed]
            ),
            "bytes_read": sum(step.source.nbytes for step, _ in steps) + factors,
            "bytes_written": written,
            "disk_needed": written,
            "memory_peak": BUFFERS * cores()
            + max(self._streamed_memory(step for step, _ in changed), self._computed_memory()),
        }

    @property
    def budget(self) -> int:
        """Bytes that tasks may take together; one that takes more is made by itself."""
        return quarter_of_memory() if self.memory is None else self.memory

    def _streamed_memory(self, changed: Iterable[Step]) -> int:
        """Factors of the steps that workers are at, the largest ones, one of them while it is read; and stacks that are kept."""
        steps = list(changed)
        sizes = sorted(
            sum(s.nbytes << step.wide for edit in step.edits for s in edit.reads) for step in steps
        )[-2 * cores() :]
        stacks = sum(
            spec.nbytes
            for spec in {spec for step in steps for edit in step.edits for spec in kept_by(edit)}
        )
        return 2 * sum(sizes) + 2 * sum(sizes[-1:]) + min(STACKS, stacks)

    def _computed_memory(self) -> int:
        """The most that tasks take which `in_order` has in memory together: those ahead, and the one that is written."""
        most = 0
        for shard in self.shards:
            if isinstance(shard, Computed):
                window, held = deque[int](), 0
                for task in shard.tasks:
                    window.append(task.memory)
                    held += window[-1]
                    while len(window) > AHEAD * cores() + 1 or (
                        len(window) > 1 and held > self.budget
                    ):
                        held -= window.popleft()
                    most = max(most, held)
        return most

    def _small(self, file: bytes | CopyFile | FromMetrics) -> int:
        if isinstance(file, CopyFile):
            return self.folders[file.folder].files()[file.name]
        return len(file) if isinstance(file, bytes) else 0


def kept_by(reader: Edit | Task) -> tuple[TensorSpec, ...]:
    """Of what an edit or a task reads, what stays at hand for others: stacks of experts' factors."""
    return getattr(reader, "kept", ())


def identities(
    folders: tuple[Folder, ...], names: Iterable[tuple[int, str]]
) -> dict[tuple[int, str], Identity]:
    """Device, inode, size and times of the inputs' local files, to be taken when their headers are read."""
    local = [(folder, name) for folder, name in names if isinstance(folders[folder], LocalFolder)]
    return {(folder, name): identity(os.stat(folders[folder].path(name))) for folder, name in local}


def digest(recipe: dict) -> str:
    """The fingerprint of a job: the sha256 of its recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


class Progress(Protocol):
    """Called with the bytes just done; `expect`, where there is one, with the bytes to come."""

    def __call__(self, done: int, /) -> None: ...


@dataclass
class ShardResult:
    """What writing one shard gave: its hash, the hash of its bytes up to each tensor's end, and measured metrics."""

    file: str
    size: int
    sha256: str | None
    marks: dict[
        str, str
    ]  # key -> first 16 hex digits of the sha256 of the file up to that tensor's end
    metrics: dict[str, dict]
    grown: int = 0  # bytes by which tensors are larger than planned, all together
    tensors: int | None = None  # how many there are, where the plan knew the most alone
    handoffs: dict[str, list] = field(
        default_factory=dict
    )  # key -> dtype, shape, position in the file of what was laid aside


class Engine(Protocol):
    """Where steps run. `finished` is called with each shard's result, once its bytes are durable under its name."""

    def __call__(
        self,
        plan: Plan,
        shards: list[Shard | Computed],
        stage: Stage,
        *,
        hash: bool,
        finished: Callable[[ShardResult], None],
        progress: Progress,
    ) -> None: ...


@dataclass(frozen=True)
class Receipt:
    """What a job did; `data` is the content of `adapterkit.json`."""

    out: Path
    data: dict[str, Any]
    finished_before: bool = False


def run(
    plan: Plan,
    out: Path,
    engine: Engine,
    *,
    hash: str = "sha256",
    resume: bool = False,
    overwrite: bool = False,
    check: Callable[[Path], object] | None = None,
    progress: Progress = lambda done: None,
) -> Receipt:
    """Carry the plan out and publish the folder `out`; its receipt. On any failure nothing stands under a final name.

    `check` looks at the finished folder before it gets its name; when it raises, nothing is published. Raises `Refused` before
    anything is written (output in the way, another plan's unfinished run, too little space) and `Failed` or `Interrupted` after;
    then `resume=True` goes on with what is done.
    """
    stage = Stage(out)
    recipe = json.loads(json.dumps(plan.recipe()))  # as it is read again
    fingerprint = digest(_public(recipe))
    stage.state(fingerprint, resume=resume, overwrite=overwrite)  # refuses before anything is made
    try:
        with stage:
            state = stage.state(fingerprint, resume=resume, overwrite=overwrite)
            if state == "finished":
                receipt = _finished(out, fingerprint, recipe)
                stage.discard()
                if check is not None:
                    check(out)
                return receipt
            if state != "fresh":
                _check_same_job(stage, recipe)
            if state != "publish":
                _build(
                    plan,
                    stage,
                    engine,
                    recipe,
                    fresh=state == "fresh",
                    hash=hash,
                    progress=progress,
                )
            data = json.loads((stage.path / RECEIPT).read_bytes())
            if check is not None:
                _check(stage, check)
            stage.publish()
            return Receipt(out, data)
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped; finished shards are kept",
            where=str(out),
            hint="run the same command with --resume",
        ) from None


def _build(
    plan: Plan,
    stage: Stage,
    engine: Engine,
    recipe: dict,
    *,
    fresh: bool,
    hash: str,
    progress: Progress,
) -> None:
    """Fill the stage: the shards that are not done, the small files, the receipt."""
    began = time.monotonic()
    fingerprint = digest(_public(recipe))
    if fresh:
        stage.forget()
    done = _done_before(stage, plan)
    stage.clear(keep=[*done, *(name + HANDOFF for name in done)])
    todo = [shard for shard in plan.shards if shard.file not in done]
    _check_space(plan, todo, stage)
    stage.begin()
    if fresh:
        stage.note({"fingerprint": fingerprint, "recipe": recipe, "overwrite": stage.replaces})
    getattr(progress, "expect", lambda total: None)(sum(shard.layout.size for shard in plan.shards))
    for shard in plan.shards:
        if shard.file in done:
            progress(shard.layout.size)

    def finished(result: ShardResult) -> None:
        done[result.file] = result
        stage.note({"shard": vars(result)})

    pool = ThreadPoolExecutor(1, "hash")
    try:
        inputs = (
            pool.submit(_input_hashes, plan) if hash != "none" else None
        )  # beside the work: it leaves Python's lock alone
        engine(plan, todo, stage, hash=hash == "sha256", finished=finished, progress=progress)
        metrics = {
            key: metric for shard in plan.shards for key, metric in done[shard.file].metrics.items()
        }
        for shard in plan.shards:
            (stage.path / (shard.file + HANDOFF)).unlink(missing_ok=True)
        sums = _write_files(
            plan, stage, metrics, sum(result.grown for result in done.values()), hash == "sha256"
        )
        hashes = inputs.result() if inputs else {}
    except Unrecoverable:
        stage.forget()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    receipt = _receipt(
        plan, recipe, fingerprint, done, sums, hashes, hash, time.monotonic() - began
    )
    stage.write_file(RECEIPT, [sealed(receipt)])
    stage.ready()


def _check(stage: Stage, check: Callable[[Path], object]) -> None:
    try:
        check(stage.path)
    except AdapterkitError:
        stage.forget()  # nobody can say what else is wrong there
        raise


def _finished(out: Path, fingerprint: str, recipe: dict) -> Receipt:
    data = json.loads((out / RECEIPT).read_text())
    if data.get("fingerprint") != fingerprint:
        raise Refused(
            f"a finished output of another job ({_difference(data.get('recipe', {}), _public(recipe))} differs)",
            expected="the job that --resume goes on with",
            where=str(out),
            hint="choose another --out, or give --overwrite",
        )
    return Receipt(out, data, finished_before=True)


def _check_same_job(stage: Stage, recipe: dict) -> None:
    """`Refused` when the interrupted run was of other inputs, options or another version."""
    before = stage.journal()[0].get("recipe", {})
    if before != recipe:
        raise Refused(
            f"an interrupted run of another job: {_difference(before, recipe)} differs",
            expected="the same inputs, options and version",
            where=str(stage.control),
            hint="give the options of that run, or --overwrite to begin again",
        )


def _done_before(stage: Stage, plan: Plan) -> dict[str, ShardResult]:
    """The shards that the journal calls done and that are there."""
    sizes = {shard.file: shard.size for shard in plan.shards}
    done = {}
    for entry in stage.journal()[1:]:
        name = entry.get("shard", {}).get("file")
        path = stage.path / str(name)
        if (
            name in sizes
            and path.is_file()
            and path.stat().st_size == entry["shard"].get("size") <= sizes[name]
        ):
            done[name] = ShardResult(**entry["shard"])
    if len(done) < len(plan.shards):  # what is missing may need what the others laid aside
        done = {
            name: r
            for name, r in done.items()
            if not r.handoffs or (stage.path / (name + HANDOFF)).is_file()
        }
    return done


def _difference(before: dict, now: dict, path: str = "") -> str:
    """The first place where two recipes differ, as a dotted path."""
    for key in dict.fromkeys([*now, *before]):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        here = f"{path}.{key}" if path else str(key)
        if isinstance(old, dict) and isinstance(new, dict):
            return _difference(old, new, here)
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            pairs = [(dict(enumerate(old)), dict(enumerate(new)))]
            return _difference(*pairs[0], here)
        return here
    return "something"


def _check_space(plan: Plan, todo: list[Shard | Computed], stage: Stage) -> None:
    small = plan.totals()["bytes_written"] - sum(shard.layout.size for shard in plan.shards)
    needed = sum(shard.layout.size for shard in todo) + small + (1 << 20)
    free = free_bytes(stage.path)
    if needed > free:
        raise Refused(
            f"{free:,} bytes free",
            expected=f"{needed:,} bytes",
            where=str(stage.path.parent),
            hint="free some space, or choose an --out on another disk",
        )


def _write_files(
    plan: Plan, stage: Stage, metrics: dict[str, dict], grown: int, hashed: bool
) -> dict[str, dict]:
    sums = {}
    for name, content in plan.files.items():
        if isinstance(content, FromMetrics):
            content = content.content(metrics, grown)
        size, sha = stage.write_file(
            name, [content] if isinstance(content, bytes) else _blocks(plan, content)
        )
        sums[name] = {"size": size, "sha256": sha if hashed else None}
    return sums


def _blocks(plan: Plan, copy: CopyFile) -> Iterator[bytes]:
    """The bytes of a file of an input folder; `Failed` if they are not as many as when the job was planned."""
    folder = plan.folders[copy.folder]
    size = folder.files()[copy.name]
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        block = folder.read(copy.name, start, stop)
        if len(block) != stop - start:
            raise changed(copy.name)
        yield block


def _input_hashes(plan: Plan) -> dict[str, dict[str, str]]:
    """The sha256 of the adapters' files, and of a model's where the Hub has told it: a base is not read again to be hashed."""
    found: dict[str, dict[str, str]] = {}
    for number, folder in enumerate(plan.folders):
        known = getattr(folder, "hashes", {})
        names = [name for where, name in plan.headers if where == number]
        sums = {
            name: known.get(name)
            or (sha256_of_file(folder.path(name)) if number not in plan.models else None)
            for name in names
        }
        found[f"{number} {folder.name}"] = {name: value for name, value in sums.items() if value}
    return found


def _public(recipe: dict) -> dict:
    """The recipe without device and inode numbers: of use to a resume, not to a reader."""
    recipe = json.loads(json.dumps(recipe))
    for entry in recipe["inputs"]:
        for file in entry["files"].values():
            file.pop("identity", None)
    return recipe


def _receipt(
    plan: Plan,
    recipe: dict,
    fingerprint: str,
    done: dict[str, ShardResult],
    sums: dict,
    inputs: dict,
    hash: str,
    seconds: float,
) -> dict[str, Any]:
    shards = [done[shard.file] for shard in plan.shards]
    size, totals = sum(shard.size for shard in shards), plan.totals()
    for shard, result in zip(plan.shards, shards, strict=True):
        if result.tensors is not None:  # what was not written after all had been counted as changed
            fewer, less = (
                len(shard.layout.tensors) - result.tensors,
                shard.layout.size - result.size,
            )
            totals["tensors"] -= fewer
            totals["tensors_changed"] -= fewer
            totals["bytes_changed"] -= less
    totals["bytes_written"] = size + sum(entry["size"] for entry in sums.values())
    return {
        "adapterkit": RECEIPT_VERSION,
        "fingerprint": fingerprint,
        "recipe": _public(recipe),
        "inputs": inputs,
        "hash": hash,
        "files": {s.file: {"size": s.size, "sha256": s.sha256} for s in shards} | sums,
        "keys": {s.file: s.marks for s in shards},
        "totals": totals,
        **plan.metrics,
        "parameters": {key: metric for s in shards for key, metric in s.metrics.items()},
        "notes": [
            *plan.notes,
            *plan.warn({key: metric for s in shards for key, metric in s.metrics.items()}),
        ],
        "timings": {
            "seconds": round(seconds, 3),
            "bytes_per_second": round(size / seconds) if seconds else None,
        },
    }


def sealed(receipt: dict) -> bytes:
    """The receipt's file. Its last value is the sha256 of all bytes before it; as it differs between two runs of one job, it stands
    among the timings."""
    text = json.dumps(receipt, indent=1, ensure_ascii=False).encode().removesuffix(b"\n }\n}")
    return text + SEAL + hashlib.sha256(text).hexdigest().encode() + b'"\n }\n}\n'


def is_sealed(data: bytes) -> bool:
    """Whether a receipt's bytes are those that were written."""
    text, seal, _ = data.rpartition(SEAL)
    return (
        bool(seal)
        and data == text + SEAL + hashlib.sha256(text).hexdigest().encode() + b'"\n }\n}\n'
    )
