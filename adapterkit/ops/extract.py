"""extract: the adapter that leads from a base to a fine-tune of it, from the two checkpoints' difference."""

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from typing import Any

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.adapter import CONFIG, EMBEDDINGS, PREFIX, wrapped
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.errors import AdapterkitError, Refused, Unrecoverable, refuse_all, shown
from adapterkit.factors import Place
from adapterkit.kernels.lowrank import Svd
from adapterkit.kernels.truncated import leading
from adapterkit.ops import produced
from adapterkit.ops.job import Options as MergeOptions
from adapterkit.ops.job import nested
from adapterkit.ops.merge import plan_merge
from adapterkit.ops.packaging import as_json
from adapterkit.ops.ranking import Cut, check_cut, even_rank, ranked, settled_by_size
from adapterkit.ops.sources import open_adapter, open_model
from adapterkit.options import StrPath, checked
from adapterkit.patterns import matcher
from adapterkit.plan import Inputs, Plan, Progress, Receipt, Task, TaskResult
from adapterkit.weights.bypassed import ATTENTION, classes_of, is_bypassed
from adapterkit.weights.detect import check_not_quantized
from adapterkit.weights.names import Names
from adapterkit.weights.parameters import Parameter, StoredParameter

PIECE = 4 << 20  # elements compared at a time
BLOCK = 1 << 20  # elements made float32 at a time
SHARES = 8  # with --max-size no module gets more than this many times the rank that all could have alike: bounds the work
LAYERS = ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d")  # what gets factors as a module
PARAMETRIZED = "ParametrizationList"  # torch's: cannot be replaced by a copy
NO_MODULES = "dummy-target-modules"  # PEFT's word for an adapter without factors: an empty list is an error there
EXPERTS = re.compile("expert", re.IGNORECASE)
# Modules that PEFT takes for experts and routers of transformers 4, wherever they stand, where transformers 5 stacks experts: it
# would target the stacks in their place. Their weights, targeted as parameters, it leaves alone.
RENAMED = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
PEFT_LAYOUT = (
    "0.19.0"  # the first PEFT that reads stacks of square experts as they are written here
)


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
    memory: str | int | None = None,
    engine: str = "local",
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done: None,
) -> Receipt | Plan:
    """Extract the adapter between two checkpoints: b@a is the best approximation of W_tuned - W_base of its rank, weight by weight.

    Linear layers, convolutions, routers and stacks of experts get factors (one of `rank`, `energy`, `sv_ratio`, `max_size`, as in
    `resize`; with `max_size` none gets more than 8 times the even rank), by a truncated SVD in float32. A stack has one rank, the
    largest that one of its experts needs; stacks, routers and other matrices that are no layer's stand in the config as
    target_parameters. What has no low rank and differs (embeddings, norms, biases, heads of one side) is saved whole
    (`rest="save"`), left out (`"drop"`), or a reason to refuse (`"refuse"`). A weight whose two values differ by the rounding of
    one side's dtype alone is unchanged. `include`, `exclude`: regexes on modules. Both sides may be sharded and stored differently;
    names are those of the loaded model. The receipt has each weight's relative error. Raises `Refused` before anything is written:
    also for shapes that differ, the vocabulary's apart. What was written is read back, and a merge of it planned, before it gets
    its name.

    Saved whole means: a module without children in modules_to_save; a layer's bias with `bias="lora_only"`; and a single parameter
    that no module can stand for (ViT's cls_token, Mamba's A_log and D, a tied embedding) under its own key, its name beside the
    modules of modules_to_save. PEFT loads such a value into the model itself, as it does biases: `disable_adapter` leaves it there.
    """
    options = Options(Cut(rank, energy, sv_ratio, max_size), include, exclude, rest, dtype)
    source = open_model(base)
    plan = plan_extract(source, open_model(tuned), options)
    check = lambda folder: plan_merge(source, [(open_adapter(folder), 1.0)], MergeOptions())
    how = {
        "hash": hash,
        "resume": resume,
        "overwrite": overwrite,
        "check": check,
        "progress": progress,
    }
    return produced.carry_out(
        plan, out, engine=engine, device=device, memory=memory, dry_run=dry_run, **how
    )


def plan_extract(base: Folder, tuned: Folder, options: Options) -> Plan:
    """Everything an extraction will do, or `Refused` with all that cannot be done. Reads what gets no factors, to see if it
    differs."""
    check_cut(options.cut)
    sides = open_checkpoint(base, 0), open_checkpoint(tuned, 1)
    for side in sides:
        check_not_quantized(side)
    job = _Job(sides, options)
    job.sort()
    refuse_all(job.errors)
    factors = job.factors
    if options.cut.max_size:
        limit = SHARES * even_rank(options.cut, factors)
        factors = [replace(difference, limit=limit) for difference in factors]
    tasks: list[Task] = [*factors, *job.whole]
    if not tasks:
        raise Refused(
            "nothing to extract",
            expected="weights that both have",
            where=f"{base.name}, {tuned.name}",
            hint="check --include, --exclude",
        )
    targets = {difference.name: difference.target for difference in factors}
    parameters = frozenset(
        difference.target for difference in factors if difference.target != difference.module
    )
    task_type = produced.task_type(sides[1].config, job.saved)
    kept = {
        "base_model_name_or_path": produced.hub_id(base),
        "task_type": task_type,
        "auto_mapping": None if task_type else job.model_class(),
        "fan_in_fan_out": job.transposed
        and not parameters,  # PEFT has no wrapper of parameters for it, and needs it for none
    }
    settings = produced.plain_settings() | job.settings()
    summary = f"the difference of {tuned.name} and {base.name}"
    finalize = partial(_settled, options.cut)
    more: dict[str, Any] = {
        "kept": kept,
        "parameters": parameters,
        "others": frozenset(job.modules),
    }
    output = _Output([], tasks, targets, settings, summary, finalize=finalize, **more)
    told = {
        k: v
        for k, v in {**vars(options.cut), **vars(options)}.items()
        if v is not None and k != "cut"
    }
    headers = {(0, name): header.sha256 for name, header in sides[0].shards.items()}
    headers |= {(1, name): header.sha256 for name, header in sides[1].shards.items()}
    metrics = {"left_out": job.left_out, "unchanged": sorted(job.unchanged)}
    return produced.output_plan(
        "extract", told, (base, tuned), headers, [output], job.notes, metrics, models=(0, 1)
    )


@dataclass(frozen=True)
class _Output(produced.Output):
    """An adapter some of whose targets are parameters: stacks of experts, routers."""

    others: frozenset[str] = frozenset()  # all modules of the model

    def config(self, metrics: dict[str, dict], grown: int = 0) -> bytes:
        found = {
            target: metrics[name]["rank"]
            for name, target in self.modules.items()
            if "rank" in metrics[name]
        }
        if not found and not any("taken" in metric for metric in metrics.values()):
            raise Unrecoverable(
                "no weight differs",
                expected="a fine-tune",
                where=self.inside(CONFIG),
                hint="check the two paths",
            )
        parameters = sorted(found.keys() & self.parameters)
        config = (
            (self.kept or {})
            | self.settings
            | {"target_modules": self._modules(found.keys() - self.parameters)}
        )
        if not found:
            config["target_modules"] = NO_MODULES
        config |= {"target_parameters": parameters} if parameters else {}
        # a pattern is held against the parameter's name, by merge against the module's where it is its weight
        patterned = {
            re.sub(r"\.weight$", r"(\\.weight)?", target): rank for target, rank in found.items()
        }
        return as_json(config | produced.ranks(patterned))

    def _modules(self, wanted: Collection[str]) -> list[str] | str:
        """target_modules that mean these alone: a name in a list means all modules whose path ends with it."""
        if any(end in wanted for other in self.others.difference(wanted) for end in _ends(other)):
            return "|".join(re.escape(module) for module in sorted(wanted))
        return sorted(wanted)


def _ends(path: str) -> Iterator[str]:
    """What follows each dot of a path."""
    at = path.find(".")
    while at >= 0:
        yield path[at + 1 :]
        at = path.find(".", at + 1)


def _around(path: str) -> list[str]:
    """A dotted path's own beginnings, itself included."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _settled(
    cut: Cut, tasks: Sequence[Task]
) -> Callable[[list[dict]], list[Callable[[TaskResult], TaskResult]]] | None:
    """What becomes of each task once all are made: its share of the size, and keys that go by which modules have factors.

    A module with factors is wrapped, and what lies in it is `base_layer` to PEFT; a module's parameters are wrapped in its order,
    so the last one is outermost.
    """
    by_size = settled_by_size(cut, tasks) if cut.max_size else None
    homes = Counter(task.module for task in tasks if isinstance(task, Difference))
    if all(_has_one_place(task, homes) for task in tasks):
        return by_size

    def finalize(metrics: list[dict]) -> list[Callable[[TaskResult], TaskResult]]:
        changes = by_size(metrics) if by_size else [lambda made: made] * len(tasks)
        wrappers = Counter(
            b.module
            for b, f in zip(tasks, metrics, strict=True)
            if isinstance(b, Difference) and "rank" in f
        )
        above: Counter[str] = Counter()
        settled = []
        for task, metric, change in reversed(list(zip(tasks, metrics, changes, strict=True))):
            if isinstance(task, Difference) and "rank" in metric:
                keys = _factor_keys(task.module, {**wrappers, task.module: above[task.module]})
                change = _renamed(
                    change, dict(zip((task.place.a_key, task.place.b_key), keys, strict=True))
                )
                above[task.module] += 1
            elif isinstance(task, Whole):
                key = PREFIX + wrapped(task.parameter, wrappers)
                lone = task.only_beside_factors and not wrappers[task.parameter.rpartition(".")[0]]
                change = _nothing if lone else _renamed(change, {task.key: key})
            settled.append(change)
        return settled[::-1]

    return finalize


def _has_one_place(task: Task, homes: Mapping[str, int]) -> bool:
    """Whether a task's keys do not depend on which of the modules `homes` have factors."""
    if isinstance(task, Difference):
        return homes[task.module] == 1 and not any(
            path in homes for path in _around(task.module)[:-1]
        )
    return not (isinstance(task, Whole) and any(path in homes for path in _around(task.parameter)))


def _nothing(made: TaskResult) -> TaskResult:
    return TaskResult({}, {})


def _renamed(
    change: Callable[[TaskResult], TaskResult], keys: dict[str, str]
) -> Callable[[TaskResult], TaskResult]:
    def renamed(made: TaskResult) -> TaskResult:
        made = change(made)
        return TaskResult({keys[key]: tensor for key, tensor in made.tensors.items()}, made.metrics)

    return renamed


def _factor_keys(module: str, wrappers: Mapping[str, int]) -> tuple[str, str]:
    """Keys of a module's factors; its own entry counts the wrappers that lie around these."""
    return PREFIX + wrapped(f"{module}.lora_A.weight", wrappers), PREFIX + wrapped(
        f"{module}.lora_B.weight", wrappers
    )


@dataclass
class _Job:
    """An extraction while it is planned: which parameters get factors, which are saved whole."""

    sides: tuple[Checkpoint, Checkpoint]
    options: Options
    errors: list[AdapterkitError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    factors: list["Difference"] = field(default_factory=list)
    whole: list["Whole"] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    saved: set[str] = field(
        default_factory=set
    )  # modules, and parameters that none of them stands for
    biases: bool = False
    transposed: bool = False
    experts: bool = False

    def __post_init__(self) -> None:
        second = Names(self.sides[1], build_model=True, notes=self.notes)
        cls = type(second.model.model).__name__ if second.model is not None else None
        wanted = tuple(second.all()) if cls else ()
        self.names = (
            Names(self.sides[0], wanted, trained_class=cls, build_model=True, notes=self.notes),
            second,
        )
        self.modules = self._all_modules()
        self.backwards = sorted(module[::-1] for module in self.modules)
        self.parameters_backwards = sorted(name[::-1] for name in second.all())
        chosen, spared = self.options.include, self.options.exclude
        self.included = matcher(chosen, "--include") if chosen else None
        self.excluded = matcher(spared, "--exclude") if spared else None

    def _all_modules(self) -> list[str]:
        model = self.names[1].model
        if model is None:
            return sorted({path for name in self.names[1].all() for path in _around(name)[:-1]})
        return [name for name, _ in model.model.named_modules() if name]

    def model_class(self) -> dict[str, str] | None:
        """The tuned model's class, as PEFT's auto_mapping has it."""
        if self.names[1].model is None:
            return None
        cls = type(self.names[1].model.model)
        return {"base_model_class": cls.__name__, "parent_library": cls.__module__}

    def taken(self, module: str) -> bool:
        if self.included is not None and not self.included(module):
            return False
        return not (self.excluded is not None and self.excluded(module))

    def sort(self) -> None:
        """Decide for every parameter of the tuned model what becomes of it."""
        first, second = self.names
        rest: dict[str, list[str]] = {}
        clashes: list[str] = []
        done: set[str] = set()
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
            if old is not None and old.shape != new.shape and not self._is_vocabulary(old, new):
                clashes.append(f"{shown(name)} {old.shape} and {new.shape}")
                continue
            shared = set(_tied(old, new)) & done
            if shared:
                self._check_copy(name, min(shared))
                continue
            done.add(name)
            target = self._target(name, new)
            if old is not None and target is not None and old.shape == new.shape:
                self._difference(name, target, old, new)
            else:
                rest.setdefault(module, []).append(name)
        lone = [
            name
            for name in first.all()
            if second.parameter(name) is None and self.taken(name.rpartition(".")[0])
        ]
        if lone:
            found, hint = (
                f"{', '.join(map(shown, lone))} in {self.sides[0].name} alone",
                "leave it out with --exclude",
            )
            self.errors.append(
                Refused(
                    found,
                    expected="every parameter of the base in both",
                    where=self.sides[1].name,
                    hint=hint,
                )
            )
        if clashes:
            found, hint = (
                f"shapes that differ: {'; '.join(clashes)}",
                "check the two paths, or leave them out with --exclude",
            )
            self.errors.append(
                Refused(
                    found, expected="two models of one size", where=self.sides[1].name, hint=hint
                )
            )
        for module, names in rest.items():
            self._rest(module, names)
        if self.biases:
            self._save_biases()
        wrappers, before = Counter(difference.module for difference in self.factors), Counter()
        for i, difference in enumerate(self.factors):
            self.factors[i] = difference.inside(wrappers, before[difference.module])
            before[difference.module] += 1
        self.whole = [
            replace(whole, key=PREFIX + wrapped(whole.parameter, wrappers)) for whole in self.whole
        ]

    def _is_vocabulary(self, old: Parameter, new: Parameter) -> bool:
        """Whether two shapes differ by the vocabulary alone."""
        if len(new.shape) not in (1, 2) or old.shape[1:] != new.shape[1:]:
            return False
        sizes = zip((old, new), self.sides, strict=True)
        return all(
            parameter.shape[0] in nested(side.config, "vocab_size") for parameter, side in sizes
        ) or self._is_end(new.name)

    def _is_end(self, name: str) -> bool:
        """Whether a parameter is the input embedding's or the head's."""
        model = self.names[1].model
        if model is None:
            return bool(EMBEDDINGS.search(name))
        ends = model.model.get_input_embeddings(), model.model.get_output_embeddings()
        return any(
            end is not None and model.model.get_submodule(name.rpartition(".")[0]) is end
            for end in ends
        )

    def _check_copy(self, name: str, other: str) -> None:
        """Two names of one parameter: where both are stored, they must hold one value."""
        copies = [
            parameter
            for n in (name, other)
            if (parameter := self.names[1].parameter(n)) is not None
        ]
        if [slot.key for slot in copies[0].slots] == [slot.key for slot in copies[1].slots]:
            return
        if not _equal(
            (self.sides[1], self.sides[1]),
            *(_held(parameter, self.sides[1]) for parameter in copies),
        ):
            found = f"{shown(name)} and {shown(other)} are tied, and stored with two values"
            hint = "set tie_word_embeddings to false in its config if they are two, or leave one out with --exclude"
            self.errors.append(
                Refused(found, expected="one value", where=self.sides[1].name, hint=hint)
            )

    def _save_biases(self) -> None:
        """PEFT's bias="lora_only" means the biases of all layers that have factors, changed or not."""
        for module in dict.fromkeys(difference.module for difference in self.factors):
            name = f"{module}.bias"
            if self.names[1].parameter(name) is not None and all(
                whole.parameter != name for whole in self.whole
            ):
                self._save(name, only_beside_factors=not self._differs(name))

    def _target(self, name: str, parameter: Parameter) -> str | None:
        """By which name PEFT can put factors on a parameter: its module's, its own, or none."""
        module, _, leaf = name.rpartition(".")
        axes, kinds = len(parameter.shape), self._kinds(module)
        if axes < 2 or 0 in parameter.shape:
            return None
        if not kinds:  # a model that transformers does not know
            return (
                module if leaf == "weight" and axes == 2 and not EMBEDDINGS.search(name) else None
            )
        if parameter.tied or any(part in kind for kind in kinds for part in ("Embedding", "Norm")):
            return None
        if ATTENTION in kinds:
            return None
        if any(kind in LAYERS for kind in kinds):
            if (
                leaf != "weight"
                or (axes > 2 and self.names[1].groups(module) != 1)
                or is_bypassed(self.names[1], module)
            ):
                return None
            own = (
                kinds[self._forward(module)] not in LAYERS
            )  # Llama 4's router is a Linear that gives a tuple
            return (
                name
                if axes == 2 and (own or (self.stacked and module.rpartition(".")[2] in RENAMED))
                else module
            )
        if not self._is_most_of(module, name):
            return None
        if EXPERTS.search(f"{module} {' '.join(kinds)}"):
            return name if axes == 2 or (axes == 3 and parameter.shape[0] > 1) else None
        return name if axes == 2 and 1 not in parameter.shape else None

    def _is_most_of(self, module: str, name: str) -> bool:
        """Whether PEFT can wrap the module for the sake of a parameter. Its wrapper is called with the first argument by position
        and has none of the module's attributes, which is the worse the more there is in the module."""
        model = self.names[1].model
        assert model is not None
        held = model.model.get_submodule(module)
        own = dict(held.named_parameters(recurse=False))
        within = sum(parameter.numel() for parameter in held.parameters()) - sum(
            parameter.numel() for parameter in own.values()
        )
        alone = not _others_end(self.parameters_backwards, "." + name)
        return (
            name.rpartition(".")[2] in own
            and alone
            and within <= sum(parameter.numel() for parameter in own.values())
        )

    def _kinds(self, module: str) -> list[str]:
        """The names of a module's class and of those that it is derived from; none where the model was not built."""
        return [cls.__name__ for cls in classes_of(self.names[1], module)]

    def _forward(self, module: str) -> int:
        """Which of these classes says what the module does."""
        return next(
            i for i, cls in enumerate(classes_of(self.names[1], module)) if "forward" in vars(cls)
        )

    @cached_property
    def stacked(self) -> bool:
        """Whether the loader stacks experts that are stored one by one."""
        converters = self.names[1].model.converters if self.names[1].model is not None else []
        return any(
            EXPERTS.search(pattern)
            for converter in converters
            for pattern in converter.source_patterns
        )

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
            transposed = bool(
                getattr(self.names[1].model.model.get_submodule(module), "is_transposed", False)
            )
            self.experts = True
        shape = tuple(shape[::-1] if transposed else shape)
        place = Place("", "", shape[1:], (1,) * (len(shape) - 2), shape[0], experts)
        dtype = dtypes.parse(self.options.dtype)
        called = module if name == f"{module}.weight" else name
        self.factors.append(
            Difference(
                called, module, before, after, place, transposed, self.options.cut, dtype, target
            )
        )

    def _rest(self, module: str, names: list[str]) -> None:
        """Parameters without factors: saved whole where one of their module differs."""
        changed = [name for name in names if self._differs(name)]
        if not changed:
            self.unchanged += names
            return
        if self.options.rest == "refuse":
            found = f"{', '.join(map(shown, changed))} differs and gets no factors"
            hint = "give --rest save or --rest drop, or leave it out with --exclude"
            self.errors.append(
                Refused(
                    found,
                    expected="linear layers and convolutions alone",
                    where=self.sides[1].name,
                    hint=hint,
                )
            )
            return
        if self.options.rest == "drop":
            self.left_out += changed
            self.notes.append(f"{', '.join(changed)} differs and was left out (--rest drop)")
            return
        if (
            any(difference.module == module for difference in self.factors)
            and f"{module}.bias" in changed
        ):
            self.biases = True  # with those of the other layers
            changed.remove(f"{module}.bias")
        if changed and self._stands_alone(module, names):
            self.saved.add(module)
            changed = names
        else:
            self.saved.update(changed)
        for name in changed:
            self._save(name)

    def _stands_alone(self, module: str, names: list[str]) -> bool:
        """Whether PEFT can put a trained copy in a module's place: these are all that it holds, none is tied, nothing around it has
        factors, and no other module's name ends with its name."""
        first, second = self.names
        if any(_tied(first.parameter(name), second.parameter(name)) for name in names):
            return False
        if not module or any(difference.module in _around(module) for difference in self.factors):
            return False
        if PARAMETRIZED in self._kinds(module) or _others_end(self.backwards, module):
            return False
        model = second.model
        if model is None:
            return all(name in names for name in second.all() if name.startswith(f"{module}."))
        return {f"{module}.{key}" for key in model.model.get_submodule(module).state_dict()} == set(
            names
        )

    def _save(self, name: str, *, only_beside_factors: bool = False) -> None:
        parameter = self.names[1].parameter(name)
        assert parameter is not None
        self.whole.append(Whole(name, _held(parameter, self.sides[1]), "", only_beside_factors))

    def _differs(self, name: str) -> bool:
        """Whether a parameter's two values differ by more than one side's rounding."""
        old, new = (names.parameter(name) for names in self.names)
        if old is None or new is None or old.shape != new.shape:
            return True
        return not _equal(self.sides, _held(old, self.sides[0]), _held(new, self.sides[1]))

    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "modules_to_save": sorted(self.saved) or None,
            "bias": "lora_only" if self.biases else "none",
        }
        return found | ({"peft_version": PEFT_LAYOUT} if self.experts else {})


def _tied(old: Parameter | None, new: Parameter | None) -> tuple[str, ...]:
    """The names that share a parameter on both sides."""
    return (
        () if old is None or new is None else tuple(name for name in new.tied if name in old.tied)
    )


def _others_end(backwards: list[str], end: str) -> bool:
    """Whether a name ends with another one; of all names, each read backwards, in order."""
    at = bisect_right(backwards, end[::-1])
    return at < len(backwards) and backwards[at].startswith(end[::-1])


def _held(parameter: Parameter, side: Checkpoint) -> StoredParameter:
    return StoredParameter.of(parameter, side.tensors)


def _not_floats(name: str, found: set[str]) -> Refused:
    expected = " ".join(dtypes.FLOATS)
    return Refused(
        f"{shown(name)} is {', '.join(sorted(found))}",
        expected=expected,
        where="weights",
        hint="dequantize it first",
    )


def _equal(
    sides: tuple[Checkpoint, Checkpoint], old: StoredParameter, new: StoredParameter
) -> bool:
    """Whether two parameters hold the same values, or values of which one is the other's rounding."""
    if not old.dtypes | new.dtypes <= set(dtypes.FLOATS) and old.dtypes != new.dtypes:
        return False
    if not _is_whole(old) or not _is_whole(new):
        return _same_values(
            *(_native(held, _OnDisk(side)) for held, side in zip((old, new), sides, strict=True))
        )
    a, b = old.specs[0], new.specs[0]
    if a.dtype == b.dtype:
        return all(x == y for x, y in _pieces(sides, a, b))
    types = dtypes.torch_dtype(a.dtype), dtypes.torch_dtype(b.dtype)
    values = [
        (
            torch.frombuffer(bytearray(x), dtype=types[0]),
            torch.frombuffer(bytearray(y), dtype=types[1]),
        )
        for x, y in _pieces(sides, a, b)
    ]
    return any(all(_rounds_to(*pair[::step]) for pair in values) for step in (1, -1))


def _same_values(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) if a.dtype == b.dtype else _rounds_to(a, b) or _rounds_to(b, a)


def _rounds_to(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.to(b.dtype), b)


def _is_whole(held: StoredParameter) -> bool:
    """Whether a parameter is a stored tensor as it is."""
    slots = held.parameter.slots
    return len(slots) == 1 and slots[0].whole and held.specs[0].shape == held.shape


@dataclass(frozen=True)
class _OnDisk:
    """Tensors of a checkpoint, in their own dtype."""

    side: Checkpoint

    def stored(self, spec: TensorSpec) -> Tensor:
        data = bytearray(self.side.folder.read(spec.file, spec.start, spec.stop))
        dtype = dtypes.torch_dtype(spec.dtype)
        return (
            torch.frombuffer(data, dtype=dtype).view(spec.shape)
            if data
            else torch.empty(spec.shape, dtype=dtype)
        )


@dataclass(frozen=True)
class _As:
    """Reads tensors as one dtype."""

    inputs: Any
    dtype: torch.dtype

    def tensor(self, spec: TensorSpec) -> Tensor:
        return self.inputs.stored(spec).to(self.dtype)


def _native(held: StoredParameter, inputs: Any) -> Tensor:
    """A parameter in the widest of the dtypes that it is stored in; `inputs` has `stored`."""
    return held.read(_As(inputs, _widest(held)))


def _widest(held: StoredParameter) -> torch.dtype:
    return reduce(torch.promote_types, map(dtypes.torch_dtype, sorted(held.dtypes)))


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
    old: StoredParameter
    new: StoredParameter
    place: Place
    transposed: bool
    cut: Cut
    dtype: str
    target: str  # what PEFT's config calls it
    limit: int | None = None  # of the rank
    alpha = None  # scale 1

    def inside(self, wrappers: Mapping[str, int], depth: int) -> "Difference":
        """The same with keys as deep as they can become, `depth` among those of its module."""
        a_key, b_key = _factor_keys(self.module, {**wrappers, self.module: depth})
        return replace(self, place=replace(self.place, a_key=a_key, b_key=b_key))

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (*self.old.tensors.values(), *self.new.tensors.values())

    @property
    def _shape(self) -> tuple[int, int]:
        return self.place.out, math.prod(self.place.a_tail)

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return produced.bounds(self.place, self._most_rank(), self.dtype)

    def _most_rank(self) -> int:
        return self.cut.most(min(self.limit or min(self._shape), *self._shape))

    @property
    def memory(self) -> int:
        """The difference of one matrix, the vectors of its decomposition or a product of its short side, and the factors."""
        short = min(self._shape)
        factors = sum(4 * math.prod(stored.shape) for stored in self.max_outputs)
        return (
            8 * math.prod(self._shape)
            + 32 * min(short * short, math.prod(self._shape))
            + 2 * factors
            + 32 * BLOCK
        )

    def compute(self, inputs: Inputs) -> TaskResult:
        found = [self._leading(old, new, inputs) for old, new in self._matrices()]
        zero = (
            Svd(torch.zeros(self._shape[0], 1), torch.zeros(1), torch.zeros(1, self._shape[1])),
            0.0,
        )
        if all(one is None for one in found):
            return TaskResult({}, {"unchanged": True})
        return ranked(self, [one or zero for one in found])

    def _matrices(self) -> Iterator[tuple[StoredParameter, StoredParameter]]:
        """Both sides of each matrix."""
        if self.place.experts is None:
            yield self.old, self.new
        for i in range(self.place.experts or 0):
            yield self.old.expert(i), self.new.expert(i)

    def _leading(
        self, old: StoredParameter, new: StoredParameter, inputs: Inputs
    ) -> tuple[Svd, float] | None:
        delta = _difference(old, new, inputs)
        if delta is None or not bool(delta.any()):
            return None
        delta = delta.T if self.transposed else delta.reshape(self._shape)
        return leading(delta, self._most_rank(), self.cut.energy, self.cut.sv_ratio)


@dataclass(frozen=True)
class Whole:
    """One parameter's value as it is, put together where it is stored in parts or as a part of something else."""

    parameter: str
    held: StoredParameter
    key: str
    only_beside_factors: bool = False  # written if its layer has factors alone

    @property
    def name(self) -> str:
        return self.key

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return self.held.reads

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return (Stored(self.key, dtypes.name_of(_widest(self.held)), self.held.shape),)

    @property
    def memory(self) -> int:
        return 2 * sum(spec.nbytes for spec in self.reads)

    def compute(self, inputs: Inputs) -> TaskResult:
        if _is_whole(self.held):
            return produced.Taken(self.held.specs[0], self.key).compute(inputs)
        return TaskResult({self.key: _native(self.held, inputs).contiguous()}, {"taken": True})


def _difference(old: StoredParameter, new: StoredParameter, inputs: Inputs) -> Tensor | None:
    """new - old in float32, a block of rows at a time; None where both store the same, or one is the other's rounding."""
    blocks = new.row_ranges(BLOCK)
    blocks = blocks if len(old.row_ranges(BLOCK)) == len(blocks) else [(0, new.shape[0])]
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


Pieces = list[tuple[int, StoredParameter, StoredParameter]]


def _same_bytes(old: StoredParameter, new: StoredParameter, pieces: Pieces, inputs: Inputs) -> bool:
    """Whether both sides store the same, seen before anything is made float32."""
    if not old.same_storage(new):
        return False
    pairs = (
        (a, b)
        for _, before, after in pieces
        for a, b in zip(before.specs, after.specs, strict=True)
    )
    return all(inputs.bytes(a) == inputs.bytes(b) for a, b in pairs)


def _rounded(old: StoredParameter, new: StoredParameter, pieces: Pieces, inputs: Inputs) -> bool:
    """Whether all of one side is the other's rounding."""
    if old.dtypes == new.dtypes or len(old.dtypes) > 1 or len(new.dtypes) > 1:
        return False
    (first,), (second,) = (
        {dtypes.torch_dtype(name) for name in side.dtypes} for side in (old, new)
    )
    down = up = True
    for _, before, after in pieces:
        a, b = before.read(inputs), after.read(inputs)
        down = down and torch.equal(a.to(second), b.to(second))
        up = up and torch.equal(b.to(first), a.to(first))
        if not down and not up:
            return False
    return True
