"""Differences of two checkpoints or adapters, read by blocks of rows; nothing large is held."""

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.adapters.factors import Factors
from adapterkit.adapters.keys import CONFIG, WEIGHTS
from adapterkit.adapters.peft import read_adapter
from adapterkit.adapters.record import Adapter, Tokens
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec, read_header
from adapterkit.checkpoint.reader import Sources
from adapterkit.checkpoint.shards import NOT_A_MODEL
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.errors import AdapterkitError, Interrupted, Refused, refuse_all, shown
from adapterkit.kernels import compare as kernel
from adapterkit.kernels.lowrank import Product, inner, rank_for_energy, stack_products
from adapterkit.plan import Progress
from adapterkit.planning.sites import join
from adapterkit.reports import configs
from adapterkit.reports.differences import NOISE
from adapterkit.tasks.edited import stored_parts
from adapterkit.weights.codec import QuantizedWeight
from adapterkit.weights.decoded import decoded_view
from adapterkit.weights.detect import quantization_evidence

ENERGY, ADAPTER_ENERGY = 0.9, 0.99
ELEMENTS = 1 << 18  # of one block: near a core's cache
WIDEST = 1 << 17  # columns of the widest matrix that gets a suggested rank: its sketch takes 64 MB
WORKERS = 2
STATES = (
    "identical",
    "equal",
    "rounded",
    "within",
    "changed",
)  # from the same bytes to different beyond the tolerance


@dataclass
class Result:
    """How one pair compares; the row says more where it changed."""

    state: str
    row: dict[str, Any] = field(default_factory=dict)
    squares: tuple[float, float] | None = None  # ‖A−B‖² and ‖A‖², where they were measured


class Pair(Protocol):
    """One thing that both sides have."""

    @property
    def a(self) -> Any: ...

    @property
    def b(self) -> Any: ...

    def compare(self, reader: "PairReader") -> Result: ...


@dataclass
class Found:
    """Pairs in A's file order, and what only one side has."""

    pairs: list[Pair]
    added: list[dict]
    removed: list[dict]
    config: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def are_adapters(folders: tuple[Folder, Folder]) -> bool:
    """Whether both sources are adapters; `Refused` where only one of them is."""
    adapters = [CONFIG in folder.files() for folder in folders]
    models = [any(_is_model(name) for name in folder.files()) for folder in folders]
    if all(adapters):
        return True
    if any(adapters) and not all(models):
        which = adapters.index(True)
        raise Refused(
            f"{folders[which].name} is an adapter, {folders[1 - which].name} is not",
            expected="two adapters, two checkpoints or two files",
            where="A and B",
            hint=f"merge the adapter first, or name its file {WEIGHTS} to compare bare tensors",
        )
    return False


def _is_model(name: str) -> bool:
    return "/" not in name and name.endswith(".safetensors") and not name.startswith(NOT_A_MODEL)


@dataclass
class Side:
    """Every tensor of a checkpoint, or of a file, by key; the checkpoint, and its config, if it has one."""

    tensors: dict[str, TensorSpec]
    base: Checkpoint | None = None
    config: dict | None = None


def _side(folder: Folder, number: int) -> Side:
    files = folder.files()
    only = next(iter(files)) if len(files) == 1 else ""
    if only.endswith(".safetensors"):
        return Side({spec.key: spec for spec in read_header(folder, only, number).tensors})
    base = open_checkpoint(folder, number)
    return Side(base.tensors, base, base.config if "config.json" in files else None)


def _decoded(side: Side) -> Side:
    """A quantized checkpoint as the floats that it decodes to."""
    assert side.base is not None
    plain = decoded_view(side.base)
    tensors = {
        key: replace(spec, dtype="F32") if isinstance(spec, QuantizedWeight) else spec
        for key, spec in plain.tensors.items()
    }
    return Side(tensors, plain, plain.config)


def _both(read: Callable[[Folder, int], Any], folders: tuple[Folder, Folder]) -> list[Any]:
    """What `read` makes of each side, or the problems of both."""
    sides, errors = [], []
    for number, folder in enumerate(folders):
        try:
            sides.append(read(folder, number))
        except AdapterkitError as error:
            errors.append(error)
    refuse_all(errors)
    return sides


def match_checkpoints(folders: tuple[Folder, Folder]) -> Found:
    sides: list[Side] = _both(_side, folders)
    quantized = [
        side.base is not None and quantization_evidence(side.base.config, side.tensors) is not None
        for side in sides
    ]
    notes = []
    if quantized[0] != quantized[1]:
        which = quantized.index(True)
        sides[which] = _decoded(sides[which])
        notes.append(f"{folders[which].name} is quantized: its weights are compared as they decode")
    a, b = ({("tensor", key): spec for key, spec in side.tensors.items()} for side in sides)
    found = _matched(a, b)
    first, second = (side.config for side in sides)
    if first is not None and second is not None:
        found.config, found.notes = configs.of_models(first, second)
    elif first is not second:
        lacking = folders[0 if first is None else 1].name
        found.notes.append(f"{lacking} has no config.json: settings are not compared")
    found.notes += notes
    if a and b and not found.pairs:
        found.notes.append(
            "no key is in both: the same model may store its parameters under other names (a prefix, fused or per-expert weights)"
        )
    return found


def match_adapters(folders: tuple[Folder, Folder]) -> Found:
    (first, a), (second, b) = _both(_parts, folders)
    found = _matched(a, b)
    found.config = configs.of_adapters(first, second)
    if a and b and not found.pairs:
        found.notes.append("no module is in both adapters")
    if any(kind == "magnitude" for kind, _ in (*a, *b)):
        found.notes.append(
            "DoRA rescales by norms of the base: deltas and magnitudes are compared apart"
        )
    if first.config.get("peft_version") != second.config.get("peft_version") and first.config.get(
        "target_parameters"
    ):
        found.notes.append(
            "PEFT 0.19 turned the factors of square experts: two versions' deltas there may be each other's transpose"
        )
    for adapter in (first, second):
        if adapter.changed_base():
            init = shown(adapter.config["init_lora_weights"])
            found.notes.append(
                f"{adapter.name}: init_lora_weights {init} had changed the base: its deltas are relative to that one"
            )
    return found


def _matched(a: dict[tuple[str, str], Any], b: dict[tuple[str, str], Any]) -> Found:
    pairs = [
        _pair(kind, name, part, b[kind, name])
        for (kind, name), part in a.items()
        if (kind, name) in b
    ]
    removed, added = (
        [
            {"name": name, "kind": kind, **_metrics(part)}
            for (kind, name), part in here.items()
            if (kind, name) not in there
        ]
        for here, there in ((a, b), (b, a))
    )
    return Found(pairs, added, removed)


def _parts(folder: Folder, number: int) -> tuple[Adapter, dict[tuple[str, str], Any]]:
    """An adapter, and all that it does by kind and name, in file order."""
    adapter = read_adapter(folder, number)
    parts: dict[tuple[str, str], Any] = {
        ("replaced", name): spec for name, spec in adapter.replaced.items()
    }
    errors: list[AdapterkitError] = []
    for name, site in join([adapter], errors).items():
        ((lora, factors),) = site.members.values()
        parts["delta", name] = factors
        if lora.magnitude is not None:  # (out,) or (1, out, 1, 1), as PEFT's versions have it
            parts["magnitude", name] = replace(
                lora.magnitude, shape=(math.prod(lora.magnitude.shape),)
            )
        if lora.bias is not None:
            parts["bias", name] = Bias(lora.bias, factors.scale)
    refuse_all(errors)
    parts |= {("rows", tokens.module): tokens for tokens in adapter.tokens}
    return adapter, dict(sorted(parts.items(), key=lambda item: _stored(item[1])[0].start))


@dataclass(frozen=True)
class Bias:
    """scale * bias of a LoRA's b, as a product of rank one."""

    spec: TensorSpec
    scale: float
    rank: int = 1
    experts: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    def products(self, reader: "PairReader") -> list[Product]:
        left = reader.tensor(self.spec).double().reshape(-1, 1) * self.scale
        return [Product(left, torch.ones(1, 1, dtype=torch.float64))]


def _stored(part: Any) -> tuple[TensorSpec, ...]:
    """The stored tensors of a part, the first in the file first."""
    if isinstance(part, Factors):
        return tuple(sorted((part.a, part.b), key=lambda spec: spec.start))
    return (
        part.values if isinstance(part, Tokens) else part.spec if isinstance(part, Bias) else part,
    )


def _shape(part: Factors | Bias) -> tuple[int, ...]:
    """(out, in) of a delta, (out, in, *kernel) of a convolution's, (out,) of a bias."""
    return (part.shape[0], *part.a.shape[1:]) if isinstance(part, Factors) else part.shape


def _metrics(part: Any) -> dict[str, Any]:
    """What a row says of one side."""
    if isinstance(part, Factors | Bias):
        metrics = {"rank": part.rank, "scale": part.scale, "shape": list(_shape(part))}
        return metrics | ({"experts": part.experts} if part.experts else {})
    spec = _stored(part)[0]
    return {
        "dtype": spec.name if isinstance(spec, QuantizedWeight) else spec.dtype,
        "shape": list(spec.shape),
    }


def _pair(kind: str, name: str, a: Any, b: Any) -> Pair:
    make = {"delta": Deltas, "bias": Deltas, "rows": Rows}.get(kind, Tensors)
    return make(name, kind, a, b)


@dataclass
class PairReader:
    """What the comparisons read through; `stop` ends them early."""

    sources: Sources
    energy: float
    stop: threading.Event = field(default_factory=threading.Event)
    held: threading.local = field(
        default_factory=threading.local
    )  # the weight that a thread decoded last

    def tensor(self, spec: TensorSpec) -> Tensor:
        return self.part(spec, spec.shape, 0)

    def part(self, spec: TensorSpec, shape: tuple[int, ...], start: int) -> Tensor:
        """A tensor of that shape, in the stored dtype, from byte `start` of the stored one."""
        if isinstance(spec, QuantizedWeight):
            first = start // 4  # float32
            return self._decoded(spec).view(-1)[first : first + math.prod(shape)].view(shape)
        dtype = dtypes.torch_dtype(spec.dtype)
        return (
            self.bytes(spec, start, start + math.prod(shape) * dtype.itemsize)
            .view(dtype)
            .view(shape)
        )

    def _decoded(self, spec: QuantizedWeight) -> Tensor:
        if getattr(self.held, "spec", None) is not spec:
            self.held.weight = None  # two would be held
            self.held.weight = spec.decode(
                {part.key: self.tensor(part) for part in spec.parts}
            ).contiguous()
            self.held.spec = spec
        return self.held.weight

    def bytes(self, spec: TensorSpec, start: int, stop: int) -> Tensor:
        if self.stop.is_set():
            raise Interrupted("stopped")
        data = torch.empty(stop - start, dtype=torch.uint8)
        if stop > start:
            self.sources.read_into(spec, start, data.numpy().data)
        return data


def measure(
    found: Found, folders: tuple[Folder, Folder], energy: float, progress: Progress
) -> list[Result]:
    """The results in the order of the pairs, on two threads."""
    threads = torch.get_num_threads()
    specs = [_stored(pair.a) + _stored(pair.b) for pair in found.pairs]
    getattr(progress, "expect", lambda total: None)(
        sum(spec.nbytes for pair in specs for spec in pair)
    )
    for number, folder in enumerate(folders):
        stored = (
            part
            for pair in specs
            for spec in pair
            if spec.folder == number
            for part in stored_parts(spec)
        )
        folder.prefetch(list(dict.fromkeys(part.file for part in stored)))
    with Sources(folders, {}) as sources:
        reader = PairReader(sources, energy)

        def one(pair: Pair) -> Result:
            torch.set_num_threads(1)  # this thread's; the workers are the parallelism
            with torch.inference_mode():
                result = pair.compare(reader)
            progress(sum(spec.nbytes for spec in _stored(pair.a) + _stored(pair.b)))
            return result

        with ThreadPoolExecutor(WORKERS) as pool:
            try:
                return list(pool.map(one, found.pairs))
            finally:
                reader.stop.set()
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(threads)


class Grid(NamedTuple):
    """A tensor as matrices of `height` rows under each other, the last axes together being columns."""

    rows: int
    columns: int
    height: int

    @staticmethod
    def of(shape: tuple[int, ...], name: str) -> "Grid":
        """Vectors, and what is too wide for a sketch, are one column: such have no rank."""
        stack = len(shape) == 3 and "expert" in name
        height, columns = (
            (shape[1], shape[2]) if stack else (shape[0] if shape else 1, math.prod(shape[1:]))
        )
        if len(shape) < 2 or min(height, columns) < 2 or columns > WIDEST:
            return Grid(math.prod(shape), 1, max(math.prod(shape), 1))
        return Grid(math.prod(shape) // columns, columns, height)

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        step = max(1, ELEMENTS // self.columns)
        return ((first, min(first + step, stop)) for first in range(start, stop, step))

    @property
    def exact(self) -> bool:
        """Whether all singular values are found, none of them estimated."""
        return self.columns <= kernel.EXACT or min(self.height, self.columns) <= kernel.SKETCH


@dataclass(frozen=True)
class Tensors:
    """A tensor of both sides."""

    name: str
    kind: str
    a: TensorSpec
    b: TensorSpec

    def compare(self, reader: PairReader) -> Result:
        floats = self.a.dtype in dtypes.FLOATS and self.b.dtype in dtypes.FLOATS
        if self.a.shape != self.b.shape:
            return _changed(self, "shape")
        if not floats:
            return (
                self._bytewise(reader) if self.a.dtype == self.b.dtype else _changed(self, "dtype")
            )
        state = self.alike(reader)
        return Result(state) if state else self._measured(reader)

    @property
    def grid(self) -> Grid:
        return Grid.of(self.a.shape, self.name)

    def _blocks(
        self, reader: PairReader, start: int, stop: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first row, its rows of A, of B), in their dtypes."""
        columns = self.grid.columns
        for first, last in self.grid.blocks(start, stop):
            a, b = (
                reader.part(
                    spec, (last - first, columns), first * columns * dtypes.BITS[spec.dtype] // 8
                )
                for spec in (self.a, self.b)
            )
            yield first, a, b

    def alike(self, reader: PairReader) -> str | None:
        """ "identical", "equal" or "rounded", or None at the first block that is none of these."""
        same, identical, forth, back = self.a.dtype == self.b.dtype, True, True, True
        for _, a, b in self._blocks(reader, 0, self.grid.rows):
            if not same:
                forth, back = forth and kernel.rounds_to(a, b), back and kernel.rounds_to(b, a)
            elif not torch.equal(_bits(a), _bits(b)):
                identical = False
                forth = kernel.same_values(a, b)
            if not forth and (same or not back):
                return None
        return "rounded" if not same else "identical" if identical else "equal"

    def _bytewise(self, reader: PairReader) -> Result:
        width = max(1, dtypes.BITS[self.a.dtype] // 8)  # elements smaller than a byte: by bytes
        size, differing = self.a.nbytes, 0
        for start in range(0, size, ELEMENTS * width):
            a, b = (
                reader.bytes(spec, start, min(start + ELEMENTS * width, size))
                for spec in (self.a, self.b)
            )
            if not torch.equal(a, b):
                differing += int((a != b).view(-1, width).any(1).sum())
        return (
            _changed(self, "values", differing=differing / (size // width))
            if differing
            else Result("identical")
        )

    def _measured(self, reader: PairReader) -> Result:
        grid, sums, spectra = self.grid, kernel.Sums(), []
        for start in range(0, grid.rows, grid.height):
            spectra.append(self._spectrum(reader, start, start + grid.height, sums))
        rank = (
            _suggested(kernel.pool_spectra(spectra), sums.error, grid, reader.energy)
            if grid.columns > 1
            else None
        )
        return _changed(
            self,
            "values",
            rank,
            relative_error=sums.relative,
            max_abs=sums.largest,
            cosine=sums.cosine,
            differing=sums.differing / math.prod(self.a.shape),
            norm=math.sqrt(sums.squares),
            squares=(sums.error, sums.squares),
        )

    def _spectrum(self, reader: PairReader, start: int, stop: int, sums: kernel.Sums) -> Tensor:
        """The singular values of one matrix of the difference, its sums added on the way."""
        columns = self.grid.columns
        if not reader.energy or columns == 1:
            for _, a, b in self._blocks(reader, start, stop):
                sums.add(a, b)
            return torch.zeros(1)
        if columns <= kernel.EXACT:
            gram = kernel.Gram(columns)
            for _, a, b in self._blocks(reader, start, stop):
                gram.add(sums.add(a, b))
            return gram.values()
        wide = "F64" in (self.a.dtype, self.b.dtype)
        sketch = kernel.Sketch(columns, torch.float64 if wide else torch.float32)
        for first, a, b in self._blocks(reader, start, stop):
            sketch.add(sums.add(a, b), first)
        gram = kernel.Gram(columns, sketch.basis())
        for _, a, b in self._blocks(reader, start, stop):
            gram.add(kernel.base_and_difference(a, b, sketch.z.dtype)[1])
        return gram.values()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


@dataclass(frozen=True)
class Deltas:
    """scale * b @ a, or scale * bias, of both sides."""

    name: str
    kind: str
    a: Factors | Bias
    b: Factors | Bias

    def compare(self, reader: PairReader) -> Result:
        if (_shape(self.a), self.a.experts) != (_shape(self.b), self.b.experts):
            return _changed(self, "shape")
        state = self._alike(reader)
        return Result(state) if state else self._measured(reader)

    def _alike(self, reader: PairReader) -> str | None:
        """How the stored factors compare, where the scales are the same."""
        if (self.a.scale, self.a.rank) != (self.b.scale, self.b.rank):
            return None
        states = []
        for one, other in zip(_factors(self.a), _factors(self.b), strict=True):
            state = Tensors("", "", one, other).alike(reader) if one.shape == other.shape else None
            if state is None:
                return None
            states.append(state)
        return max(states, key=STATES.index)

    def _measured(self, reader: PairReader) -> Result:
        squares = [0.0, 0.0, 0.0]  # ‖A‖², ⟨A, B⟩, ‖B‖²
        spectra, noise = [], 0.0
        for x, y in zip(self.a.products(reader), self.b.products(reader), strict=True):
            for i, (one, other) in enumerate(((x, x), (x, y), (y, y))):
                squares[i] += inner(one, other)
            difference = stack_products([x, y], [1.0, -1.0])
            noise = math.hypot(
                noise, *(NOISE * float(p.left.norm() * p.right.norm()) for p in (x, y))
            )
            spectra.append(kernel.singular_values(difference))
        s = kernel.pool_spectra(spectra)
        error, norm = float(s.norm()), math.sqrt(max(squares[0], 0.0))
        if error <= noise:
            return Result("rounded")
        needed = (
            rank_for_energy(s, reader.energy) if reader.energy and math.isfinite(error) else None
        )
        rank = (
            {"energy": reader.energy, "needed": needed, "above": None, "estimate": False}
            if needed
            else None
        )
        return _changed(
            self,
            "values",
            rank,
            relative_error=kernel.relative(error, norm),
            cosine=kernel.cosine(*squares),
            norm=norm,
            squares=(error**2, norm**2),
        )


def _factors(part: Factors | Bias) -> tuple[TensorSpec, ...]:
    return (part.a, part.b) if isinstance(part, Factors) else (part.spec,)


@dataclass(frozen=True)
class Rows:
    """Trained token rows of both sides, each row against the one of the same token."""

    name: str
    kind: str
    a: Tokens
    b: Tokens

    def compare(self, reader: PairReader) -> Result:
        if self.a.values.shape[1:] != self.b.values.shape[1:]:
            return _changed(self, "shape")
        if self.a.indices == self.b.indices:
            return Tensors(self.name, self.kind, self.a.values, self.b.values).compare(reader)
        at = {index: row for row, index in enumerate(self.b.indices)}
        common = [(row, at[index]) for row, index in enumerate(self.a.indices) if index in at]
        a = reader.tensor(self.a.values)[[row for row, _ in common]]
        b = reader.tensor(self.b.values)[[row for _, row in common]]
        sums = kernel.Sums()
        sums.add(a, b)
        only_a, only_b = len(self.a.indices) - len(common), len(self.b.indices) - len(common)
        if not (only_a or only_b):
            if kernel.same_values(a, b):
                return Result("equal")
            if a.dtype != b.dtype and (kernel.rounds_to(a, b) or kernel.rounds_to(b, a)):
                return Result("rounded")
        result = _changed(
            self,
            "rows" if only_a or only_b else "values",
            relative_error=sums.relative,
            max_abs=sums.largest,
            cosine=sums.cosine,
            differing=sums.differing / max(1, a.numel()),
            norm=math.sqrt(sums.squares),
            squares=(sums.error, sums.squares),
        )
        result.row |= {"rows_only_a": only_a, "rows_only_b": only_b}
        return result


def _changed(
    pair: Tensors | Deltas | Rows,
    why: str,
    rank: dict | None = None,
    squares: tuple[float, float] | None = None,
    **numbers: float,
) -> Result:
    """The row of a pair that differs; null for what is not measured or no number."""
    names = ("relative_error", "max_abs", "cosine", "differing", "norm")
    row = {
        "name": pair.name,
        "kind": pair.kind,
        "why": why,
        "a": _metrics(pair.a),
        "b": _metrics(pair.b),
    }
    row |= {
        name: numbers[name] if math.isfinite(numbers.get(name, math.nan)) else None
        for name in names
    }
    return Result("changed", row | {"rank": rank}, squares)


def _suggested(s: Tensor, total: float, grid: Grid, energy: float) -> dict | None:
    """The smallest rank that holds the share `energy` of ‖D‖² = total, None without one."""
    if not energy or not math.isfinite(total) or not bool(s.isfinite().all()):
        return None
    needed = min(
        rank_for_energy(s, energy, None if grid.exact else total), grid.height, grid.columns
    )
    above = not grid.exact and needed > kernel.SKETCH
    return {
        "energy": energy,
        "needed": None if above else needed,
        "above": kernel.SKETCH if above else None,
        "estimate": not grid.exact,
    }
