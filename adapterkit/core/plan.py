"""Records of a plan: how every output tensor is made, complete before any data is read.

A `Plan` gives each output file's exact layout, and for each tensor its `Step`: the stored tensor
that its rows start from, and the edits that change them. A file of factors has `Task`s instead,
which decide their own ranks, within bounds that the plan knows. Once a plan exists, every check
that can refuse the job has passed."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol

from adapterkit import __version__
from adapterkit.core import dtypes
from adapterkit.core.budget import BUFFERS, factors_memory, most_together
from adapterkit.core.calls import call_of, is_data, with_command
from adapterkit.core.checkpoint.folder import Folder, check_names
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.layout import ShardLayout, TensorPlan, laid_out
from adapterkit.core.checkpoint.reader import Identity
from adapterkit.core.errors import WARNING
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.options import OptionRecord, Progress, bytes_text
from adapterkit.core.output.journal import ShardResult
from adapterkit.core.output.stage import Workspace
from adapterkit.core.output.writer import part_name
from adapterkit.core.records import Json
from adapterkit.core.system import cores, quarter_of_memory
from adapterkit.core.weights.codec import stored_parts
from adapterkit.core.weights.parameters import Positions
from adapterkit.core.weights.reader import Reader
from adapterkit.kernels.block_sizes import GPU
from adapterkit.kernels.quant.stochastic import Draws

IDENTITY = ("size", "modified", "changed")
# bytes by which the guess of a text's size may be wrong, its numbers in the header included
SLACK = 128
HANDOFF_FOLDER = -1  # of tensors that an earlier output file hands on
READ = {"read": True}  # metadata of fields that hold tensors which are read
# (block of rows, number of its first row): changes the block in place
Apply = Callable[[Tensor, int], None]


def _marked_reads(record: RowEdit | Task) -> tuple[TensorSpec, ...]:
    """Return the stored tensors in the fields of a record that are marked `READ`."""
    return tuple(
        spec for name in _marked_fields(type(record)) for spec in _specs_in(getattr(record, name))
    )


@cache
def _marked_fields(cls: type[RowEdit | Task]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls) if field.metadata == READ)


def _specs_in(value: object) -> Iterator[TensorSpec]:
    """Yield the stored tensors of a tensor, of a tuple of them, or of a record's `reads`."""
    if isinstance(value, TensorSpec):
        yield from stored_parts(value)
        return
    for one in value if isinstance(value, tuple) else getattr(value, "reads", ()):
        yield from _specs_in(one)


@dataclass
class Loaded:
    """An edit with its tensors read.

    `apply` changes rows in place; `delta_norm` is the Frobenius norm of the addition, if known;
    `exact`, if `apply` rounds, is the same without rounding, to measure the error."""

    apply: Apply
    delta_norm: float | None = None
    exact: Apply | None = None


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Counts of computation besides reading and writing; `engine/cost.py` has the price of each on
    a machine."""

    encoded: float = 0.0  # elements that are rounded to a quantized format, and compared with it
    decoded: float = 0.0  # elements of a quantized format that become numbers
    elected: float = 0.0  # elements of dense deltas that a method reads, of all adapters
    drawn: float = 0.0  # random numbers
    flops: float = 0.0  # of products in float32
    wide: float = 0.0  # of products in float64
    columns: float = 0.0  # of weights, where each is rounded after the one before
    decompositions: float = 0.0

    def __add__(self, other: Effort) -> Effort:
        return Effort(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def __rmul__(self, times: int) -> Effort:
        return Effort(**{name: times * value for name, value in vars(self).items()})


@dataclass(frozen=True, slots=True)
class RowEdit(ABC):
    """One change to a stored tensor; subclasses are frozen, picklable dataclasses."""

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        """The tensors that `load` reads, except the source: the fields that are marked `READ`."""
        return _marked_reads(self)

    @property
    def shared_reads(self) -> tuple[TensorSpec, ...]:
        """Those of `reads` that are read once for many steps: stacks of experts' factors."""
        return ()

    @property
    def flops(self) -> int:
        """Multiplications and additions of the edit's products, over all rows."""
        return 0

    @property
    def effort(self) -> Effort:
        """The edit's effort besides `flops`."""
        return Effort()

    @property
    def memory(self) -> int:
        """The most bytes that the edit takes while it is loaded and after."""
        return 4 * sum(spec.nbytes for spec in self.reads)

    @property
    def gpu_memory(self) -> int:
        """Additional bytes on a GPU."""
        return 0

    @property
    def is_dense(self) -> bool:
        """True if the loaded edit is as large as the tensor. Then a task computes the whole tensor,
        with a claim on memory."""
        return False

    @abstractmethod
    def load(self, inputs: Reader, source: TensorSpec, grid: tuple[int, int]) -> Loaded:
        """Return the edit of `source`, seen as rows and columns of `grid`."""


@dataclass(frozen=True, slots=True)
class Span:
    """The outputs of one module on a stored tensor, and the covariance (in, in) of its inputs."""

    outputs: Positions
    covariance: TensorSpec


@dataclass(frozen=True, slots=True)
class Compensation:
    """Compensated rounding: errors are carried from input to input of the tensor's modules. Outputs
    outside the spans are rounded to nearest."""

    spans: tuple[Span, ...]
    by_columns: bool = False  # the outputs are the grid's columns, the inputs its rows

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        """The covariances, each once."""
        return tuple(dict.fromkeys(span.covariance for span in self.spans))


@dataclass(frozen=True, slots=True)
class Step:
    """One output tensor: its rows start from `source`, go through `edits` in float32 (`wide`: in
    float64), and are rounded once to `dtype`: to nearest, stochastically with `draws`, or with
    `compensation`."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorSpec
    edits: tuple[RowEdit, ...] = ()
    rows: int = 0  # the grid's rows when there are edits
    adapters: tuple[str, ...] = ()  # the adapters that change it
    draws: Draws | None = None
    wide: bool = False
    measures_error: bool = False  # of the written values, relative to the source's norm
    compensation: Compensation | None = None

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.source, *(spec for edit in self.edits for spec in edit.reads))

    @property
    def copied(self) -> bool:
        """True if the source's bytes are copied as a range. Values of an adapter are read instead,
        because they may not be finite."""
        unread = self.source.folder == 0 or self.dtype not in dtypes.FLOATS
        return not self.edits and self.dtype == self.source.dtype and unread

    @property
    def planned(self) -> TensorPlan:
        return TensorPlan(self.key, self.dtype, self.shape)

    @property
    def needs_full_tensor(self) -> bool:
        """True if a task computes the whole tensor."""
        return self.compensation is not None or any(edit.is_dense for edit in self.edits)

    @property
    def effort(self) -> Effort:
        flops = sum(edit.flops for edit in self.edits)
        products = Effort(wide=flops) if self.wide else Effort(flops=flops)
        return sum((edit.effort for edit in self.edits), products)

    @property
    def grid(self) -> tuple[int, int]:
        count = math.prod(self.shape)
        if not self.edits:
            return count, 1
        return self.rows, count // self.rows if self.rows else 0


Metrics = dict[str, Any]  # of a task or a tensor, for the receipt
PIECE_BYTES = 40  # of temporaries, for each element of a piece


class TaskResult(NamedTuple):
    """The tensors of a task by key, in the order of writing, and metrics for the receipt.

    A `TensorSpec` instead of a tensor stands for its stored bytes. `handoff`: tensors for tasks of
    later files."""

    tensors: Mapping[str, Tensor | TensorSpec]
    metrics: Metrics
    handoff: dict[str, Tensor] = {}  # noqa: RUF012 (never changed)


# (file, tensors in order, metadata) -> a file in another container than safetensors
LayOut = Callable[[str, Sequence[TensorPlan], Mapping[str, Any]], ShardLayout]
Change = Callable[[TaskResult], TaskResult]
# the metrics of all tasks of a file -> a change for the result of each
Finalize = Callable[[list[Metrics]], list[Change]]


def unchanged(result: TaskResult) -> TaskResult:
    """Return the result as it is: the `Change` that changes nothing."""
    return result


@dataclass(frozen=True)
class Task(ABC):
    """Output tensors that are computed together, such as the factors of one module.

    Subclasses are frozen, picklable dataclasses. Their results are checked against these
    properties."""

    name: str  # in the receipt: the module's, or the tensor's key

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        """The tensors that `compute` reads, each once: the fields that are marked `READ`."""
        return tuple(dict.fromkeys(_marked_reads(self)))

    @property
    def shared_reads(self) -> tuple[TensorSpec, ...]:
        """Those of `reads` that are read once for many tasks: stacks of experts' factors."""
        return ()

    @property
    @abstractmethod
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        """The task's tensors, each at its largest possible size."""

    @property
    def planned_metrics(self) -> Metrics | None:
        """The metrics that small files need, if the outputs are known to be `max_outputs` before
        any value is read; None if values decide."""
        return None

    @property
    def handoff_reads(self) -> tuple[str, ...]:
        """Keys of tensors from earlier files that `compute` reads."""
        return _handed_on(self.reads)

    @property
    def handoff_writes(self) -> tuple[str, ...]:
        """Keys of the tensors that `compute` keeps for later files."""
        return ()

    @property
    def copied(self) -> bool:
        """True if the outputs are stored bytes, written as they are."""
        return False

    @property
    def effort(self) -> Effort:
        return Effort()

    @property
    @abstractmethod
    def memory(self) -> int:
        """The most bytes that `compute` takes."""

    @property
    def gpu_memory(self) -> int:
        """The same for a GPU's memory: pieces that are computed at once are larger there."""
        if self.copied:
            return 0
        largest = max(math.prod(one.shape) for one in (*self.reads, *self.max_outputs))
        return self.memory + PIECE_BYTES * min(GPU, largest)

    @abstractmethod
    def compute(self, inputs: Reader) -> TaskResult: ...


class Collecting(Protocol):
    """Sums that are made before the tasks of a file, in blocks that several processes share:
    statistics (`verbs/stats/plan.py`)."""

    @property
    def blocks(self) -> int: ...
    @property
    def reads(self) -> tuple[str, ...]:
        """Files of the model, in the order in which they are read."""
        ...

    @property
    def work(self) -> int:
        """Bytes of disk for all sums."""
        ...

    @property
    def device_memory(self) -> int:
        """Bytes of GPU memory, if it runs on one."""
        ...

    @property
    def effort(self) -> Effort: ...

    def temporary_disk(self, budget: int) -> int:
        """Return the temporary bytes of disk, with a memory budget."""
        ...

    def totals(self, budget: int) -> dict[str, int]:
        """Return the figures that a dry run prints, with a memory budget."""
        ...

    def collect_blocks(
        self,
        plan: Plan,
        files: Sequence[OutputFile],
        stage: Workspace,
        device: torch.device,
        finished: Callable[[ShardResult], None],
        progress: Progress,
    ) -> None:
        """Make some of the blocks."""
        ...

    def collected(
        self,
        plan: Plan,
        file: OutputFile,
        stage: Workspace,
        device: torch.device,
        progress: Progress,
    ) -> OutputFile:
        """Return the file with the tasks that follow from the sums of all blocks; a single process
        makes the sums first."""
        ...


@dataclass(frozen=True)
class OutputFile:
    """One output file: of `steps`, which are streamed, or of `tasks`, which are computed whole, in
    file order; `layout` has each tensor of a task at its largest possible size.

    `safetensors_order`: the tensors are in the order in which the safetensors library writes them.
    Then sizes are as planned, except those of `variable_size`. `lay_out`: for a container in which
    no size varies. `collection`: sums that are collected first and determine the tasks. `range`:
    only bytes [start, stop) of the file, in whole pieces, or one block of the collection, in a file
    of their own until all are there."""

    layout: ShardLayout
    steps: tuple[Step, ...] = ()
    tasks: tuple[Task, ...] = ()
    metadata: Json = field(default_factory=dict)
    finalize: Finalize | None = None
    safetensors_order: bool = False
    lay_out: LayOut | None = None
    collection: Collecting | None = None
    range: tuple[int, int] | None = None

    @classmethod
    def computed(
        cls,
        file: str,
        tasks: Iterable[Task],
        metadata: Json | None = None,
        *,
        finalize: Finalize | None = None,
        safetensors_order: bool = False,
        lay_out: LayOut | None = None,
    ) -> OutputFile:
        """Return a file of these tasks."""
        tasks = tuple(tasks)
        stored = [stored for task in tasks for stored in task.max_outputs]
        if safetensors_order:
            stored.sort(key=lambda stored: (dtypes.SERIAL.index(stored.dtype), stored.key))
        empty = cls(
            ShardLayout(file, b"", (), ()),
            tasks=tasks,
            metadata={"format": "pt"} if metadata is None else metadata,
            finalize=finalize,
            safetensors_order=safetensors_order,
            lay_out=lay_out,
        )
        return replace(empty, layout=empty.laid_out(stored))

    def laid_out(self, tensors: Sequence[TensorPlan], header_size: int = 0) -> ShardLayout:
        """Return the layout of the tasks' tensors as computed. If their sizes are not as planned,
        the header has at least `header_size` bytes."""
        if self.lay_out is not None:
            return self.lay_out(self.file, tensors, self.metadata)
        reserved = 0 if self.safetensors_order else header_size
        return laid_out(self.file, list(tensors), self.metadata, ordered=True, header_size=reserved)

    @property
    def file(self) -> str:
        """The output file's name."""
        return self.layout.file

    @property
    def name(self) -> str:
        """The name under which it is written: that of the file, or of its range."""
        return self.file if self.range is None else part_name(self.file, *self.range)

    @property
    def size(self) -> int:
        """The most bytes of the file; for a block, its share of them."""
        if self.range is None:
            return self.layout.size + SLACK * len(self.variable_size)
        if self.collection is not None:
            return self.layout.size // self.collection.blocks
        return self.range[1] - self.range[0]

    @cached_property
    def variable_size(self) -> frozenset[str]:
        """Keys of tensors whose planned size is an estimate: JSON texts of a format."""
        return frozenset(stored.key for stored in self.layout.tensors if stored.varies)

    @property
    def is_block(self) -> bool:
        """True if it is a block of the file's collection."""
        return self.collection is not None and self.range is not None

    def block_files(self) -> list[OutputFile]:
        """Return the blocks of the file's collection."""
        count = 0 if self.collection is None else self.collection.blocks
        return [replace(self, range=(number, number + 1)) for number in range(count)]

    @property
    def sizes_are_planned(self) -> bool:
        """True if every tensor is as large as planned, except those of `variable_size`."""
        return not self.tasks or self.safetensors_order or self.lay_out is not None

    @property
    def reads(self) -> Iterator[TensorSpec]:
        """Yield the tensors that the steps and tasks read."""
        for one in (*self.steps, *self.tasks):
            yield from one.reads

    @property
    def handoff_reads(self) -> tuple[str, ...]:
        """Keys of tensors from earlier files that its steps and tasks read."""
        edits = (edit for step in self.steps for edit in step.edits)
        in_tasks = (key for task in self.tasks for key in task.handoff_reads)
        return (*_handed_on(spec for edit in edits for spec in edit.reads), *in_tasks)

    @property
    def handoff_writes(self) -> tuple[str, ...]:
        """Keys of the tensors that its tasks keep for later files."""
        return tuple(key for task in self.tasks for key in task.handoff_writes)

    def accepts(self, result: ShardResult, *, hashed: bool) -> bool:
        """Return whether a recorded result is of this file, with a hash if one is expected: the
        result of a range has none."""
        is_size = result.size <= self.size if self.tasks else result.size == self.size
        is_size = is_size or self.is_block  # a list of files
        is_hashed = (result.sha256 is not None) == (hashed and self.range is None)
        return result.file == self.name and is_size and is_hashed


def _handed_on(reads: Iterable[TensorSpec]) -> tuple[str, ...]:
    return tuple(spec.key for spec in reads if spec.folder == HANDOFF_FOLDER)


@dataclass(frozen=True)
class CopyFile:
    """A file of an input folder that goes into the output as it is."""

    folder: int
    name: str


@dataclass(frozen=True)
class FromMetrics:
    """A small file whose content depends on the output's files whose names begin with `folder`: on
    the metrics by task or tensor, and on the bytes by which tensors with estimated sizes have
    grown."""

    content: Callable[[dict[str, dict], int], bytes]
    folder: str = ""


Files = dict[str, bytes | CopyFile | FromMetrics]


def no_warnings(metrics: dict[str, dict]) -> list[str]:
    """The `Plan.warn` of verbs whose metrics give no reason for one."""
    return []


@dataclass(frozen=True)
class Placement:
    """The device on which a plan runs, and its needs there; not recorded as part of the job."""

    device: str = "cpu"  # the kind that its bits are of
    # additional totals: those of a GPU, or of an output on the Hub
    totals: Mapping[str, int] = field(default_factory=dict)
    temporary_disk: int = 0  # temporary bytes of disk, in addition to the final files


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """A complete job: inputs, output files, options, and decisions for the receipt.

    As text it is a summary; `totals()` are the numbers of a dry run, `warnings` and `notes` the
    remarks before anything is read. It pickles: its values are records, module-level functions and
    partials of these."""

    verb: str
    options: Json
    folders: tuple[Folder, ...]
    headers: dict[tuple[int, str], str]  # (folder, file) -> sha256 of its header
    identities: dict[tuple[int, str], Identity]  # of local files: tells an edited file
    shards: tuple[OutputFile, ...]
    # index, config, tokenizer, card: written after the shards
    files: Files
    # decided while planning, for the receipt
    decisions: Json = field(default_factory=dict)
    # those that begin with `WARNING` become `warnings`, without the word
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    models: tuple[int, ...] = (0,)  # inputs too large to be read again for the receipt's hashes
    memory: int | None = None  # bytes for tasks together; None: a quarter of the machine's
    # from the measured metrics; `Unrecoverable` where the output is not to be published
    warn: Callable[..., list[str]] = no_warnings
    placement: Placement = Placement()
    is_file: bool = False  # the output is its one file, and no folder
    # folders of models of a pipeline, whose names are before those of tensors in the receipt
    parts: tuple[str, ...] = ()
    call: OptionRecord | None = None  # the verb that made it, for the receipt and the cards

    def __post_init__(self):
        check_names(dict.fromkeys([*(shard.file for shard in self.shards), *self.files]))
        marked = [note for note in self.notes if note.startswith(WARNING)]
        warnings = (*self.warnings, *(note.removeprefix(WARNING) for note in marked))
        object.__setattr__(self, "warnings", warnings)
        object.__setattr__(self, "notes", tuple(n for n in self.notes if n not in marked))

    def __repr__(self) -> str:
        totals = self.totals()
        written, memory = (bytes_text(totals[n]) for n in ("bytes_written", "memory_peak"))
        changed = f"{totals['tensors_changed']} of {totals['tensors']} tensors changed"
        texts = [f"{self.verb}: {changed}; {written} to write, {memory} of memory at most"]
        texts += [f"warning: {text}" for text in self.warnings]
        return "\n".join([*texts, *(f"note: {note}" for note in self.notes)])

    def notes_of(self, name: str) -> list[str]:
        """Return the warnings and notes for an enclosing plan, in which this one has that name."""
        warnings = [f"{WARNING}{name}: {text}" for text in self.warnings]
        return warnings + [f"{name}: {note}" for note in self.notes]

    def decided(self) -> Json:
        """Return the decisions, and the call that makes the output again, unless it has a function
        of the caller's, which nobody else can call."""
        call = None if self.call is None else call_of(self.call)
        return self.decisions | ({"call": call} if call is not None and is_data(call) else {})

    def written_files(self) -> Files:
        """Return the small files as they are written: cards with the command."""
        return self.files if self.call is None else with_command(self.files, self.call)

    def recipe(self) -> Json:
        """Return the identity of the plan, as it is read again from a file: version, verb, options,
        inputs and output layout."""
        inputs: list[dict] = [{"name": f.name, **f.origin, "files": {}} for f in self.folders]
        for (folder, name), sha in sorted(self.headers.items()):
            inputs[folder]["files"][name] = {"header": sha}
        for (folder, name), identity in self.identities.items():
            file = inputs[folder]["files"].setdefault(name, {})
            file["identity"] = dict(zip(IDENTITY, identity, strict=True))
        layout = hashlib.sha256()
        for shard in self.shards:
            layout.update(shard.file.encode() + shard.layout.header)
        recipe = {
            "version": __version__,
            "verb": self.verb,
            "options": self.options,
            "inputs": inputs,
            "layout": layout.hexdigest(),
        }
        return json.loads(json.dumps(recipe))

    def needs(self) -> dict[str, tuple[str, ...]]:
        """Return, for each output file, the files that must be made before it because it reads
        their handoffs."""
        written = {key: shard.file for shard in self.shards for key in shard.handoff_writes}
        return {
            shard.file: tuple(dict.fromkeys(written[key] for key in shard.handoff_reads))
            for shard in self.shards
        }

    def totals(self) -> Json:
        """Return the sizes that a dry run prints: tensors and bytes. They are exact, except for
        computed files, where they are upper bounds."""
        tasks = [task for shard in self.shards for task in shard.tasks]
        steps = [
            (step, stored)
            for shard in self.shards
            for step, stored in zip(shard.steps, shard.layout.tensors, strict=False)
        ]
        changed = [step for step, _ in steps if not step.copied]
        copied = [stored for step, stored in steps if step.copied]
        copied += [stored for task in tasks if task.copied for stored in task.max_outputs]
        made = [stored for step, stored in steps if not step.copied]
        made += [stored for task in tasks if not task.copied for stored in task.max_outputs]
        readers = [*(edit for step in changed for edit in step.edits), *tasks]
        shared = {spec for reader in readers for spec in reader.shared_reads}  # read once for all
        read = [spec for reader in readers for spec in reader.reads if spec not in shared]
        read += [*shared, *(step.source for step, _ in steps)]
        small = sum(map(self._small, self.written_files().values()))
        written = sum(shard.layout.size for shard in self.shards) + small
        collections = [shard.collection for shard in self.shards if shard.collection is not None]
        collected = {k: v for each in collections for k, v in each.totals(self.budget).items()}
        return {
            "shards": len(self.shards),
            "tensors": len(copied) + len(made),
            "tensors_changed": len(made),
            "bytes_copied": sum(stored.nbytes for stored in copied),
            "bytes_changed": sum(stored.nbytes for stored in made),
            "bytes_read": sum(spec.nbytes for spec in read),
            "bytes_written": written,
            "disk_needed": written + self.temporary_disk(self.shards),
            "memory_peak": BUFFERS * cores()
            + max(self.factors_memory(changed, cores()), self.tasks_memory(cores())),
            **collected,
            **self.placement.totals,
        }

    def temporary_disk(self, shards: Iterable[OutputFile]) -> int:
        """Return the temporary bytes of disk that these files take in addition to their final
        sizes."""
        collections = [shard.collection for shard in shards if shard.collection is not None]
        own = self.placement.temporary_disk
        return own + sum(each.temporary_disk(self.budget) for each in collections)

    @property
    def budget(self) -> int:
        """Return the bytes that tasks may take together; a larger task runs alone."""
        return quarter_of_memory() if self.memory is None else self.memory

    def factors_memory(self, steps: Sequence[Step], workers: int) -> int:
        """Return the bytes of the factors of the steps that run at once."""
        sizes = (
            sum(s.nbytes << step.wide for edit in step.edits for s in edit.reads) for step in steps
        )
        shared = {s for step in steps for edit in step.edits for s in edit.shared_reads}
        return factors_memory(sizes, sum(spec.nbytes for spec in shared), workers)

    def tasks_memory(self, workers: int, *, gpu: bool = False) -> int:
        """Return the most bytes that tasks take together, with that many workers."""
        files = (
            [task.gpu_memory if gpu else task.memory for task in shard.tasks]
            for shard in self.shards
        )
        return max((most_together(claims, self.budget, workers) for claims in files), default=0)

    def _small(self, file: bytes | CopyFile | FromMetrics) -> int:
        if isinstance(file, CopyFile):
            return self.folders[file.folder].files()[file.name]
        return len(file) if isinstance(file, bytes) else 0
