"""extract: the adapter that leads from a base to a fine-tune of it, from the two checkpoints' difference."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
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
from adapterkit.ops.packaging import as_json
from adapterkit.ops.ranking import Cut, check_cut, even_rank, ranked, settled_by_size
from adapterkit.ops.sources import open_source
from adapterkit.options import StrPath, checked
from adapterkit.patterns import matcher
from adapterkit.plan import Bundle, Inputs, Made, Plan, Progress, Receipt
from adapterkit.weights.names import Names, Parameter
from adapterkit.weights.parts import Held
from adapterkit.weights.quantised import check_not_quantised

PIECE = 4 << 20  # elements compared at a time
BLOCK = 1 << 20  # elements made float32 at a time
SHARES = 8  # with --max-size no module gets more than this many times the rank that all could have alike: bounds the work
LAYERS = ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d")  # what gets factors as a module
EXPERTS = re.compile("expert", re.IGNORECASE)
# Modules that PEFT takes for experts and routers of transformers 4, wherever they stand, where transformers 5 stacks experts: it
# would target the stacks in their place. Their weights, targeted as parameters, it leaves alone.
RENAMED = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
PEFT_LAYOUT = "0.19.0"  # the first PEFT that reads stacks of square experts as they are written here


@dataclass(frozen=True)
class Options:
    """What an extraction can be told. Fields are the command's options."""

    cut: Cut
    include: str | None = None
    exclude: str | None = None
    rest: str = "save"
    dtype: str = "fp32"


@checked()
def extract(
    base: StrPath,
    tuned: StrPath,
    *,
    out: StrPath,
    rank: int | None = None,
    energy: float | None = None,
    sv_ratio: float | None = None,
    max_size: str | int | None = None,
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

    Linear layers, convolutions, routers and stacks of experts get factors (one of `rank`, `energy`, `sv_ratio`, `max_size`, as in
    `resize`; with `max_size` none gets more than 8 times the even rank), by a truncated SVD in float32. A stack has one rank, the
    largest that one of its experts needs; stacks and routers stand in the config as target_parameters. What has no low rank and
    differs (embeddings, norms, biases, heads of one side) is saved whole (`rest="save"`: modules_to_save and biases), left out
    (`"drop"`), or a reason to refuse (`"refuse"`). A weight whose two values differ by the rounding of one side's dtype alone is
    unchanged. `include`, `exclude`: regexes on modules. Both sides may be sharded and stored differently; names are those of the
    loaded model. The receipt has each weight's relative error. Raises `Refused` before anything is written.
    """
    options = Options(Cut(rank, energy, sv_ratio, max_size), include, exclude, rest, dtype)
    plan = plan_extract(open_source(base), open_source(tuned), options)
    how = {"hash": hash, "resume": resume, "overwrite": overwrite, "progress": progress}
    return produced.carry_out(plan, out, engine=engine, device=device, dry_run=dry_run, **how)


def plan_extract(base: Folder, tuned: Folder, options: Options) -> Plan:
    """Everything an extraction will do, or `Refused` with all that cannot be done. Reads what gets no factors, to see if it
    differs."""
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
    settings = produced.plain_settings() | job.settings()
    kept = {
        "base_model_name_or_path": produced.hub_id(base),
        "task_type": produced.task_type(sides[1].config, job.saved),
        "fan_in_fan_out": job.transposed,
    }
    targets = {difference.name: difference.target for difference in factors}
    parameters = frozenset(difference.target for difference in factors if difference.target != difference.module)
    summary = f"the difference of {tuned.name} and {base.name}"
    settle = partial(_settled, options.cut)
    output = _Output([], bundles, targets, settings, summary, settle=settle, kept=kept, parameters=parameters)
    told = {k: v for k, v in {**vars(options.cut), **vars(options)}.items() if v is not None and k != "cut"}
    headers = {(0, name): header.sha256 for name, header in sides[0].shards.items()}
    headers |= {(1, name): header.sha256 for name, header in sides[1].shards.items()}
    facts = {"left_out": job.left_out, "unchanged": sorted(job.unchanged)}
    return produced.output_plan("extract", told, (base, tuned), headers, [output], job.notes, facts, models=(0, 1))


@dataclass(frozen=True)
class _Output(produced.Output):
    """An adapter some of whose targets are parameters: stacks of experts, routers."""

    parameters: frozenset[str] = frozenset()

    def config(self, facts: dict[str, dict], grown: int = 0) -> bytes:
        found = {target: facts[name]["rank"] for name, target in self.modules.items() if "rank" in facts[name]}
        config = (self.kept or {}) | self.settings | {"target_modules": sorted(found.keys() - self.parameters)}
        parameters = sorted(found.keys() & self.parameters)
        config |= {"target_parameters": parameters} if parameters else {}
        # a pattern is held against the parameter's name, by merge against the module's where it is its weight
        patterned = {re.sub(r"\.weight$", r"(\\.weight)?", target): rank for target, rank in found.items()}
        return as_json(config | produced.ranks(patterned))


def _settled(cut: Cut, bundles: Sequence[Bundle]) -> Callable[[list[dict]], list[Callable[[Made], Made]]] | None:
    """What becomes of each bundle once all are made: its share of the size, and keys that say which parameters of its module have
    factors beside it."""
    by_size = settled_by_size(cut, bundles) if cut.max_size else None
    modules = [bundle.module if isinstance(bundle, Difference) else "" for bundle in bundles]
    together = {module for module in modules if module and modules.count(module) > 1}
    if not together:
        return by_size

    def settle(facts: list[dict]) -> list[Callable[[Made], Made]]:
        changes = by_size(facts) if by_size else [lambda made: made] * len(bundles)
        above, found = dict.fromkeys(together, 0), []  # PEFT wraps in the module's order, so the last one is outermost
        for bundle, module, fact, change in reversed(list(zip(bundles, modules, facts, changes, strict=True))):
            if isinstance(bundle, Difference) and module in together and "rank" in fact:
                keys = bundle.place.a_key, bundle.place.b_key
                change = _renamed(change, dict(zip(keys, _nested(module, above[module]), strict=True)))
                above[module] += 1
            found.append(change)
        return found[::-1]

    return settle


def _renamed(change: Callable[[Made], Made], keys: dict[str, str]) -> Callable[[Made], Made]:
    def renamed(made: Made) -> Made:
        made = change(made)
        return Made({keys[key]: tensor for key, tensor in made.tensors.items()}, made.facts)

    return renamed


def _nested(module: str, depth: int) -> tuple[str, str]:
    """Keys of a module's factors in the wrapper around which `depth` others lie."""
    path = f"{PREFIX}{module}" + ".base_layer" * depth
    return f"{path}.lora_A.weight", f"{path}.lora_B.weight"


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
    experts: bool = False

    def __post_init__(self) -> None:
        self.names = tuple(Names(side, careful=True, notes=self.notes) for side in self.sides)
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
            target = self._target(name, new)
            if old is not None and target is not None and old.shape == new.shape:
                self._difference(name, target, old, new)
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
        name = f"{difference.module}.bias"
        parameter = self.names[1].parameter(name)
        if parameter is None:
            return difference
        key = f"{PREFIX}{difference.module}.base_layer.bias"
        if all(taken.key != key for taken in self.whole):
            self._save(name, key)
        return replace(difference, always=True)

    def _target(self, name: str, parameter: Parameter) -> str | None:
        """By which name PEFT can put factors on a parameter: its module's, its own, or none."""
        module, _, leaf = name.rpartition(".")
        axes, kinds = len(parameter.shape), self._kinds(module)
        if axes < 2 or 0 in parameter.shape:
            return None
        if not kinds:  # a model that transformers does not know
            return module if leaf == "weight" and axes == 2 and not EMBEDDINGS.search(name) else None
        if parameter.tied or any(part in kind for kind in kinds for part in ("Embedding", "Norm")):
            return None
        if any(kind in LAYERS for kind in kinds):
            if leaf != "weight" or (axes > 2 and self.names[1].groups(module) != 1):
                return None
            own = kinds[self._forward(module)] not in LAYERS  # Llama 4's router is a Linear that gives a tuple
            return name if axes == 2 and (own or (self.stacked and module.rpartition(".")[2] in RENAMED)) else module
        if EXPERTS.search(f"{module} {' '.join(kinds)}"):
            return name if axes == 2 or (axes == 3 and parameter.shape[0] > 1) else None
        return name if leaf == "weight" and axes == 2 else None

    def _kinds(self, module: str) -> list[str]:
        """The names of a module's class and of those that it is derived from; none where the model was not built."""
        return [cls.__name__ for cls in self._classes(module)]

    def _forward(self, module: str) -> int:
        """Which of these classes says what the module does."""
        return next(i for i, cls in enumerate(self._classes(module)) if "forward" in vars(cls))

    def _classes(self, module: str) -> tuple[type, ...]:
        if self.names[1].layer(module) is None or self.names[1].model is None:
            return ()
        return type(self.names[1].model.model.get_submodule(module)).__mro__

    @cached_property
    def stacked(self) -> bool:
        """Whether the loader stacks experts that are stored one by one."""
        converters = self.names[1].model.converters if self.names[1].model is not None else []
        return any(EXPERTS.search(pattern) for converter in converters for pattern in converter.source_patterns)

    def _difference(self, name: str, target: str, old: Parameter, new: Parameter) -> None:
        before, after = (_held(p, side) for p, side in zip((old, new), self.sides, strict=True))
        if not before.dtypes | after.dtypes <= set(dtypes.FLOATS):
            self.errors.append(_not_floats(name, before.dtypes | after.dtypes))
            return
        module, shape, experts = name.rpartition(".")[0], new.shape, None
        transposed = "Conv1D" in self._kinds(module)
        self.transposed = self.transposed or transposed
        if target == name and len(shape) == 3:
            experts, *shape = shape
            assert self.names[1].model is not None
            # as PEFT decides it; the difference's factors are of this orientation
            transposed = bool(getattr(self.names[1].model.model.get_submodule(module), "is_transposed", False))
            self.experts = True
        shape = tuple(shape[::-1] if transposed else shape)
        # deep enough for all that may come beside it; which do is known once they are made
        a_key, b_key = _nested(module, sum(difference.module == module for difference in self.factors))
        place = Place(a_key, b_key, shape[1:], (1,) * (len(shape) - 2), shape[0], experts)
        dtype = dtypes.parse(self.options.dtype)
        called = module if name == f"{module}.weight" else name
        self.factors.append(Difference(called, module, before, after, place, transposed, self.options.cut, dtype, target))

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
        beside = any(difference.module == module for difference in self.factors)
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
        # PEFT looks for the values under each of their names
        self.whole += [produced.Taken(spec, one) for one in sorted((key, *(PREFIX + twin for twin in parameter.tied)))]

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
        found |= {"ensure_weight_tying": True} if self.tied else {}
        return found | ({"peft_version": PEFT_LAYOUT} if self.experts else {})


_NONE = Parameter("", (), ())


def _held(parameter: Parameter, side: Checkpoint) -> Held:
    return Held(parameter, {slot.key: side.tensors[slot.key] for slot in parameter.slots})


def _not_floats(name: str, found: set[str]) -> Refused:
    expected = " ".join(dtypes.FLOATS)
    return Refused(f"{shown(name)} is {', '.join(sorted(found))}", expected=expected, where="weights", do="dequantise it first")


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
    """Factors of one weight's difference between both sides; of a stack of experts, of each matrix of it."""

    name: str
    module: str
    old: Held
    new: Held
    place: Place
    transposed: bool
    cut: Cut
    dtype: str
    target: str  # what PEFT's config calls it
    limit: int | None = None  # of the rank
    always: bool = False  # write factors of a weight that did not change, too
    alpha = None  # scale 1

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (*self.old.tensors.values(), *self.new.tensors.values())

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
        """The difference of one matrix, the vectors of its decomposition or a product of its short side, and the factors."""
        short = min(self._shape)
        factors = sum(4 * math.prod(stored.shape) for stored in self.most)
        return 8 * math.prod(self._shape) + 32 * min(short * short, math.prod(self._shape)) + 2 * factors + 32 * BLOCK

    def make(self, inputs: Inputs) -> Made:
        found = [self._leading(old, new, inputs) for old, new in self._matrices()]
        zero = Svd(torch.zeros(self._shape[0], 1), torch.zeros(1), torch.zeros(1, self._shape[1])), 0.0
        if not self.always and all(one is None for one in found):
            return Made({}, {"unchanged": True})
        return ranked(self, [one or zero for one in found])

    def _matrices(self) -> Iterator[tuple[Held, Held]]:
        """Both sides of each matrix."""
        if self.place.experts is None:
            yield self.old, self.new
        for i in range(self.place.experts or 0):
            yield self.old.expert(i), self.new.expert(i)

    def _leading(self, old: Held, new: Held, inputs: Inputs) -> tuple[Svd, float] | None:
        delta = _difference(old, new, inputs)
        if delta is None or not bool(delta.any()):
            return None
        delta = delta.T if self.transposed else delta.reshape(self._shape)
        return leading(delta, self._most_rank(), self.cut.energy, self.cut.sv_ratio)


def _difference(old: Held, new: Held, inputs: Inputs) -> Tensor | None:
    """new - old in float32, a block of rows at a time; None where both store the same, or one is the other's rounding."""
    blocks = new.blocks(BLOCK)
    blocks = blocks if len(old.blocks(BLOCK)) == len(blocks) else [(0, new.shape[0])]
    pieces = [(first, old.rows(first, last), new.rows(first, last)) for first, last in blocks]
    if _same_bytes(old, new, pieces, inputs) or _rounded(old, new, pieces, inputs):
        return None
    delta: Tensor | None = None
    for first, before, after in pieces:
        part = after.read(inputs).sub_(before.read(inputs))
        if len(pieces) == 1:
            return part
        delta = part.new_empty(new.shape) if delta is None else delta
        delta[first : first + len(part)] = part
    return delta


Pieces = list[tuple[int, Held, Held]]


def _same_bytes(old: Held, new: Held, pieces: Pieces, inputs: Inputs) -> bool:
    """Whether both sides store the same, seen before anything is made float32."""
    if not old.lies_like(new):
        return False
    pairs = ((a, b) for _, before, after in pieces for a, b in zip(before.specs, after.specs, strict=True))
    return all(inputs.bytes(a) == inputs.bytes(b) for a, b in pairs)


def _rounded(old: Held, new: Held, pieces: Pieces, inputs: Inputs) -> bool:
    """Whether all of one side is the other's rounding."""
    if old.dtypes == new.dtypes or len(old.dtypes) > 1 or len(new.dtypes) > 1:
        return False
    (first,), (second,) = ({dtypes.torch_dtype(name) for name in side.dtypes} for side in (old, new))
    down = up = True
    for _, before, after in pieces:
        a, b = before.read(inputs), after.read(inputs)
        down = down and torch.equal(a.to(second), b.to(second))
        up = up and torch.equal(b.to(first), a.to(first))
        if not down and not up:
            return False
    return True
