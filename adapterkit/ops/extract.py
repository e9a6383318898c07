"""extract: the adapter that leads from a base to a fine-tune of it, from the two checkpoints' difference."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.adapter import EMBEDDINGS, PREFIX
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown
from adapterkit.factors import Place
from adapterkit.kernels.lowrank import Svd
from adapterkit.kernels.truncated import leading
from adapterkit.ops import produced
from adapterkit.ops.ranking import Cut, check_cut, even_rank, ranked, settled_by_size
from adapterkit.ops.sources import open_source
from adapterkit.patterns import matcher
from adapterkit.plan import Bundle, Inputs, Made, Plan, Progress, Receipt
from adapterkit.weights.names import Names, Parameter
from adapterkit.weights.quantised import check_not_quantised
from adapterkit.weights.reading import read_parameter

PIECE = 4 << 20  # bytes compared at a time
REST = ("save", "drop", "refuse")
SHARES = 8  # with --max-size no module gets more than this many times the rank that all could have alike: bounds the work
LAYERS = ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d")  # what gets factors


@dataclass(frozen=True)
class Options:
    """What an extraction can be told. Fields are the command's options."""

    cut: Cut
    include: str | None = None
    exclude: str | None = None
    rest: str = "save"
    dtype: str = "fp32"


def extract(
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    *,
    out: str | os.PathLike,
    rank: int | None = None,
    energy: float | None = None,
    sv_ratio: float | None = None,
    max_size: str | None = None,
    include: str | None = None,
    exclude: str | None = None,
    rest: str = "save",
    dtype: str = "fp32",
    hash: str = "sha256",
    device: str = "auto",
    engine: str = "local",
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done: None,
) -> Receipt | Plan:
    """Extract the adapter between two checkpoints: b@a is the best approximation of W_tuned - W_base of its rank, weight by weight.

    Linear layers and convolutions get factors (one of `rank`, `energy`, `sv_ratio`, `max_size`, as in `resize`; with `max_size`
    none gets more than 8 times the even rank), by a truncated SVD in float32. What has no low rank and differs (embeddings,
    norms, biases, heads of one side) is saved whole (`rest="save"`: modules_to_save and biases), left out (`"drop"`), or a reason
    to refuse (`"refuse"`). A weight whose two values differ by the rounding of one side's dtype alone is unchanged. `include`,
    `exclude`: regexes on modules. Both sides may be sharded and stored differently; names are those of the loaded model. The
    receipt has each module's relative error. Raises `Refused` before anything is written.
    """
    options = Options(Cut(rank, energy, sv_ratio, max_size), include, exclude, rest, dtype)
    plan = plan_extract(open_source(base), open_source(tuned), options)
    how = {"hash": hash, "resume": resume, "overwrite": overwrite, "progress": progress}
    return produced.carry_out(plan, out, engine=engine, device=device, dry_run=dry_run, **how)


def plan_extract(base: Folder, tuned: Folder, options: Options) -> Plan:
    """Everything an extraction will do, or `Refused` with all that cannot be done. Reads what gets no factors, to see if it
    differs."""
    produced.check_choices(("--dtype", options.dtype, tuple(dtypes.SHORT)), ("--rest", options.rest, REST))
    check_cut(options.cut)
    sides = open_checkpoint(base, 0), open_checkpoint(tuned, 1)
    for side in sides:
        check_not_quantised(side)
    job = _Job(sides, options)
    job.sort()
    refuse_all(job.errors)
    factors = job.factors
    if options.cut.max_size:
        limit = SHARES * even_rank(options.cut, factors)
        factors = [replace(difference, limit=limit) for difference in factors]
    bundles: list[Bundle] = [*factors, *job.whole]
    if not bundles:
        raise Refused(
            "nothing to extract",
            expected="weights that both have",
            where=f"{base.name}, {tuned.name}",
            do="check --include, --exclude",
        )
    settle: Callable[[list[dict]], list] | None = settled_by_size(options.cut, bundles) if options.cut.max_size else None
    settings = produced.plain_settings() | job.settings()
    modules = {difference.name: difference.name for difference in job.factors}
    kept = {"base_model_name_or_path": produced.hub_id(base), "task_type": job.task_type(), "fan_in_fan_out": job.transposed}
    output = produced.Output(
        [], bundles, modules, settings, f"the difference of {tuned.name} and {base.name}", settle=settle, kept=kept
    )
    told = {k: v for k, v in {**vars(options.cut), **vars(options)}.items() if v is not None and k != "cut"}
    headers = {(0, name): header.sha256 for name, header in sides[0].shards.items()}
    headers |= {(1, name): header.sha256 for name, header in sides[1].shards.items()}
    facts = {"left_out": job.left_out, "unchanged": sorted(job.unchanged)}
    return produced.output_plan("extract", told, (base, tuned), headers, [output], job.notes, facts, bases=2)


@dataclass
class _Job:
    """An extraction while it is planned: which parameters get factors, which are saved whole."""

    sides: tuple[Checkpoint, Checkpoint]
    options: Options
    errors: list[AdapterkitError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    factors: list["Difference"] = field(default_factory=list)
    whole: list[produced.Taken] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    saved: set[str] = field(default_factory=set)  # modules
    biases: bool = False
    tied: bool = False
    transposed: bool = False

    def __post_init__(self) -> None:
        self.names = tuple(Names(side, tuple(side.tensors), careful=True, notes=self.notes) for side in self.sides)
        chosen, spared = self.options.include, self.options.exclude
        self.included = matcher(chosen, "--include") if chosen else None
        self.excluded = matcher(spared, "--exclude") if spared else None

    def taken(self, module: str) -> bool:
        if self.included is not None and not self.included(module):
            return False
        return not (self.excluded is not None and self.excluded(module))

    def sort(self) -> None:
        """Decide for every parameter of the tuned model what becomes of it."""
        first, second = self.names
        rest: dict[str, list[str]] = {}
        for name in second.all():
            module = name.rpartition(".")[0]
            if not self.taken(module):
                self.left_out.append(name)
                continue
            try:
                old, new = first.parameter(name), second.parameter(name)
            except AdapterkitError as error:
                self.errors.append(error)
                continue
            assert new is not None
            if new.twin:
                continue  # its value is stored under another name
            if old is not None and self._has_factors(name, new) and old.shape == new.shape:
                self._difference(name, module, old, new)
            else:
                rest.setdefault(module, []).append(name)
        for name in first.all():
            if second.parameter(name) is None and self.taken(name.rpartition(".")[0]):
                found, do = f"{shown(name)} is in {self.sides[0].name} alone", "leave it out with --exclude"
                self.errors.append(Refused(found, expected="every parameter of the base in both", where=self.sides[1].name, do=do))
        for module, names in rest.items():
            self._rest(module, names)
        if self.biases:
            self.factors = [self._with_bias(difference) for difference in self.factors]

    def _with_bias(self, difference: "Difference") -> "Difference":
        """PEFT's bias="lora_only" means the biases of all layers that have factors, so these have factors even if they are zero."""
        name = f"{difference.name}.bias"
        parameter = self.names[1].parameter(name)
        if parameter is None:
            return difference
        key = f"{PREFIX}{difference.name}.base_layer.bias"
        if all(taken.key != key for taken in self.whole):
            self._save(name, key)
        return replace(difference, always=True)

    def _has_factors(self, name: str, parameter: Parameter) -> bool:
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(parameter.shape) < 2 or 0 in parameter.shape:
            return False
        layer = self.names[1].layer(module)
        if layer is None:  # a model that transformers does not know
            return len(parameter.shape) == 2 and not EMBEDDINGS.search(name)
        if parameter.tied or any(part in layer for part in ("Embedding", "Norm")):
            return False
        if len(parameter.shape) > 2 and (layer not in LAYERS or self.names[1].groups(module) != 1):
            return False
        self.transposed = self.transposed or layer == "Conv1D"
        return True

    def _difference(self, name: str, module: str, old: Parameter, new: Parameter) -> None:
        specs = tuple(
            {slot.key: side.tensors[slot.key] for slot in p.slots} for p, side in zip((old, new), self.sides, strict=True)
        )
        if any(spec.dtype not in dtypes.FLOATS for table in specs for spec in table.values()):
            self.errors.append(_not_floats(name, specs))
            return
        transposed = self.names[1].layer(module) == "Conv1D"
        shape = new.shape[::-1] if transposed else new.shape
        place = Place(
            f"{PREFIX}{module}.lora_A.weight",
            f"{PREFIX}{module}.lora_B.weight",
            tuple(shape[1:]),
            (1,) * (len(shape) - 2),
            shape[0],
            None,
        )
        dtype = dtypes.parse(self.options.dtype)
        self.factors.append(Difference(module, old, new, specs[0], specs[1], place, transposed, self.options.cut, dtype))

    def _rest(self, module: str, names: list[str]) -> None:
        """Parameters without factors: saved whole where one of their module differs."""
        changed = [name for name in names if self._differs(name)]
        if not changed:
            self.unchanged += names
            return
        if self.options.rest == "refuse":
            found = f"{', '.join(map(shown, changed))} differs and gets no factors"
            do = "give --rest save or --rest drop, or leave it out with --exclude"
            self.errors.append(Refused(found, expected="linear layers and convolutions alone", where=self.sides[1].name, do=do))
            return
        if self.options.rest == "drop":
            self.left_out += changed
            self.notes.append(f"{', '.join(changed)} differs and was left out (--rest drop)")
            return
        beside = any(difference.name == module for difference in self.factors)
        if beside and [name.rpartition(".")[2] for name in names] == ["bias"]:
            self.biases = True
            return
        if beside or any(len((self.names[1].parameter(name) or _NONE).slots) != 1 for name in names):
            found = f"{', '.join(map(shown, changed))} differs, in a layout that cannot be saved whole"
            self.errors.append(
                Refused(found, expected="stored as it is in the model", where=self.sides[1].name, do="leave it out with --exclude")
            )
            return
        self.saved.add(module)
        for name in names:
            self._save(name, PREFIX + name)

    def _save(self, name: str, key: str) -> None:
        parameter = self.names[1].parameter(name)
        assert parameter is not None
        self.tied = self.tied or bool(parameter.tied)
        spec = self.sides[1].tensors[parameter.slots[0].key]
        self.whole.append(produced.Taken(spec, key))

    def _differs(self, name: str) -> bool:
        """Whether a parameter's two values differ by more than one side's rounding."""
        old, new = (names.parameter(name) for names in self.names)
        if old is None or new is None or old.shape != new.shape:
            return True
        pairs = [(self.sides[0].tensors[a.key], self.sides[1].tensors[b.key]) for a, b in zip(old.slots, new.slots, strict=False)]
        if [slot.key for slot in old.slots] != [slot.key for slot in new.slots]:
            return True
        return not all(_equal(self.sides, a, b) for a, b in pairs)

    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {"modules_to_save": sorted(self.saved) or None, "bias": "lora_only" if self.biases else "none"}
        return found | ({"ensure_weight_tying": True} if self.tied else {})

    def task_type(self) -> str | None:
        names = " ".join(map(str, self.sides[1].config.get("architectures") or ()))
        known = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
        return next((task for word, task in known.items() if word in names), None)


_NONE = Parameter("", (), ())


def _not_floats(name: str, specs: tuple[dict[str, TensorSpec], ...]) -> Refused:
    found = sorted({spec.dtype for table in specs for spec in table.values()})
    expected = " ".join(dtypes.FLOATS)
    return Refused(f"{shown(name)} is {', '.join(found)}", expected=expected, where="weights", do="dequantise it first")


def _equal(sides: tuple[Checkpoint, Checkpoint], old: TensorSpec, new: TensorSpec) -> bool:
    """Whether two stored tensors hold the same values, or values of which one is the other's rounding."""
    if old.shape != new.shape:
        return False
    if old.dtype == new.dtype or not {old.dtype, new.dtype} <= set(dtypes.FLOATS):
        return old.dtype == new.dtype and all(a == b for a, b in _pieces(sides, old, new))
    types = dtypes.torch_dtype(old.dtype), dtypes.torch_dtype(new.dtype)
    pairs = [
        (torch.frombuffer(bytearray(a), dtype=types[0]), torch.frombuffer(bytearray(b), dtype=types[1]))
        for a, b in _pieces(sides, old, new)
    ]
    return all(torch.equal(a.to(types[1]), b) for a, b in pairs) or all(torch.equal(b.to(types[0]), a) for a, b in pairs)


def _pieces(sides: tuple[Checkpoint, Checkpoint], old: TensorSpec, new: TensorSpec):
    """The same elements of both, some at a time."""
    count = math.prod(old.shape)
    widths = [dtypes.BITS[spec.dtype] // 8 for spec in (old, new)]
    for at in range(0, count, PIECE):
        n = min(PIECE, count - at)
        yield tuple(
            side.folder.read(spec.file, spec.start + at * width, spec.start + (at + n) * width)
            for side, spec, width in zip(sides, (old, new), widths, strict=True)
        )


@dataclass(frozen=True)
class Difference:
    """One module's factors, from the difference of its weight on both sides."""

    name: str
    old: Parameter
    new: Parameter
    old_tensors: dict[str, TensorSpec] = field(hash=False)
    new_tensors: dict[str, TensorSpec] = field(hash=False)
    place: Place
    transposed: bool
    cut: Cut
    dtype: str
    limit: int | None = None  # of the rank
    always: bool = False  # write factors of a weight that did not change, too
    alpha = None  # scale 1

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (*self.old_tensors.values(), *self.new_tensors.values())

    @property
    def _shape(self) -> tuple[int, int]:
        return self.place.out, math.prod(self.place.a_tail)

    @property
    def most(self) -> tuple[Stored, ...]:
        return produced.bounds(self.place, self._most_rank(), self.dtype)

    def _most_rank(self) -> int:
        return self.cut.most(min(self.limit or min(self._shape), *self._shape))

    @property
    def memory(self) -> int:
        return 20 * math.prod(self._shape)

    def make(self, inputs: Inputs) -> Made:
        delta = self._delta(inputs)
        if delta is None or not bool(delta.any()):
            return self._unchanged()
        return ranked(self, [leading(delta, self._most_rank(), self.cut.energy)])

    def _unchanged(self) -> Made:
        if not self.always:
            return Made({}, {"unchanged": True})
        zero = Svd(torch.zeros(self._shape[0], 1), torch.zeros(1), torch.zeros(1, self._shape[1]))
        return ranked(self, [(zero, 0.0)])

    def _delta(self, inputs: Inputs) -> Tensor | None:
        """The difference as a matrix (out, in) in float32; None where one side is the other's rounding."""
        if self._same_bytes(inputs):
            return None
        old = read_parameter(self.old, self.old_tensors, inputs)
        new = read_parameter(self.new, self.new_tensors, inputs)
        if self._rounded(old, new):
            return None
        delta = new.sub_(old)
        return delta.T.contiguous() if self.transposed else delta.reshape(self._shape)

    def _same_bytes(self, inputs: Inputs) -> bool:
        """Whether both sides store the same, seen before anything is made float32."""
        if not all(len(side.slots) == 1 and side.slots[0].whole for side in (self.old, self.new)):
            return False
        a, b = self.old_tensors[self.old.slots[0].key], self.new_tensors[self.new.slots[0].key]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and inputs.bytes(a) == inputs.bytes(b)

    def _rounded(self, old: Tensor, new: Tensor) -> bool:
        types = [{dtypes.torch_dtype(spec.dtype) for spec in table.values()} for table in (self.old_tensors, self.new_tensors)]
        if types[0] == types[1] or any(len(found) > 1 for found in types):
            return False
        (first,), (second,) = types
        return torch.equal(old.to(second), new.to(second)) or torch.equal(new.to(first), old.to(first))
