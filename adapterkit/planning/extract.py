"""The difference of two checkpoints, parameter by parameter: which get factors, which are saved whole."""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from adapterkit import dtypes
from adapterkit.adapters.factors import Place
from adapterkit.adapters.keys import CONFIG, PREFIX, wrapped
from adapterkit.adapters.record import EMBEDDINGS
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Refused, Unrecoverable, shown
from adapterkit.patterns import matcher
from adapterkit.plan import Change, Finalize, Task, TaskResult, unchanged
from adapterkit.planning import adapter_config, adapter_output
from adapterkit.planning.folder_files import as_json
from adapterkit.planning.merge.job import nested
from adapterkit.tasks.difference import (
    DifferenceFactors,
    WholeParameter,
    equal_parameters,
    factor_keys,
    stored_parameter,
)
from adapterkit.tasks.truncated import Truncation, finalize_by_size
from adapterkit.weights.bypassed import ATTENTION, classes_of, is_bypassed
from adapterkit.weights.names import Names
from adapterkit.weights.parameters import Parameter

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
    """The options of the command; fields have their names."""

    truncation: Truncation
    include: str | None = None
    exclude: str | None = None
    rest: str = "save"
    dtype: str = "fp32"


@dataclass(frozen=True)
class ExtractedAdapter(adapter_output.Output):
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
        return as_json(config | adapter_config.ranks(patterned))

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


def finalize_extraction(truncation: Truncation, tasks: Sequence[Task]) -> Finalize | None:
    """Give each module its share of the size, and keys that depend on which modules have factors.

    A module with factors is wrapped, and what lies in it is `base_layer` to PEFT; a module's parameters are wrapped in its order,
    so the last one is outermost.
    """
    by_size = finalize_by_size(truncation, tasks) if truncation.max_size else None
    homes = Counter(task.module for task in tasks if isinstance(task, DifferenceFactors))
    if all(_has_one_place(task, homes) for task in tasks):
        return by_size
    return partial(_finalize_keys, by_size, tasks)


def _finalize_keys(
    by_size: Finalize | None, tasks: Sequence[Task], metrics: list[dict]
) -> list[Change]:
    changes = by_size(metrics) if by_size else [unchanged] * len(tasks)
    wrappers = Counter(
        task.module
        for task, metric in zip(tasks, metrics, strict=True)
        if isinstance(task, DifferenceFactors) and "rank" in metric
    )
    above: Counter[str] = Counter()
    last_first = []
    for task, metric, change in reversed(list(zip(tasks, metrics, changes, strict=True))):
        if isinstance(task, DifferenceFactors) and "rank" in metric:
            keys = factor_keys(task.module, {**wrappers, task.module: above[task.module]})
            renamed = dict(zip((task.place.a_key, task.place.b_key), keys, strict=True))
            change = partial(_rename, change, renamed)
            above[task.module] += 1
        elif isinstance(task, WholeParameter):
            key = PREFIX + wrapped(task.parameter, wrappers)
            lone = task.only_beside_factors and not wrappers[task.parameter.rpartition(".")[0]]
            change = _drop if lone else partial(_rename, change, {task.key: key})
        last_first.append(change)
    return last_first[::-1]


def _has_one_place(task: Task, homes: Mapping[str, int]) -> bool:
    """Whether a task's keys do not depend on which of the modules `homes` have factors."""
    if isinstance(task, DifferenceFactors):
        return homes[task.module] == 1 and not any(
            path in homes for path in _around(task.module)[:-1]
        )
    return not (
        isinstance(task, WholeParameter) and any(path in homes for path in _around(task.parameter))
    )


def _drop(result: TaskResult) -> TaskResult:
    return TaskResult({}, {})


def _rename(change: Change, keys: dict[str, str], result: TaskResult) -> TaskResult:
    result = change(result)
    tensors = {keys[key]: tensor for key, tensor in result.tensors.items()}
    return TaskResult(tensors, result.metrics)


@dataclass
class Extraction:
    """An extraction while it is planned: which parameters get factors, which are saved whole."""

    sides: tuple[Checkpoint, Checkpoint]
    options: Options
    errors: list[AdapterkitError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    factors: list["DifferenceFactors"] = field(default_factory=list)
    whole: list["WholeParameter"] = field(default_factory=list)
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
            self.factors[i] = difference.with_keys(wrappers, before[difference.module])
            before[difference.module] += 1
        keys = [PREFIX + wrapped(whole.parameter, wrappers) for whole in self.whole]
        self.whole = [
            replace(whole, name=key, key=key) for whole, key in zip(self.whole, keys, strict=True)
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
        if not equal_parameters(
            (self.sides[1], self.sides[1]),
            *(stored_parameter(parameter, self.sides[1]) for parameter in copies),
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
        before, after = (
            stored_parameter(p, side) for p, side in zip((old, new), self.sides, strict=True)
        )
        if not before.dtypes | after.dtypes <= set(dtypes.FLOATS):
            self.errors.append(_not_floats(name, before.dtypes | after.dtypes))
            return
        module, shape, experts = name.rpartition(".")[0], new.shape, None
        transposed = self.names[1].transposed(module)
        self.transposed = self.transposed or transposed
        if target == name and len(shape) == 3:
            experts, *shape = shape
            # as PEFT decides it; the difference's factors are of this orientation
            transposed = self.names[1].transposed_experts(module)
            self.experts = True
        shape = tuple(shape[::-1] if transposed else shape)
        place = Place("", "", shape[1:], (1,) * (len(shape) - 2), shape[0], experts)
        dtype = dtypes.parse(self.options.dtype)
        called = module if name == f"{module}.weight" else name
        self.factors.append(
            DifferenceFactors(
                called,
                place,
                dtype,
                module,
                before,
                after,
                transposed,
                target,
                truncation=self.options.truncation,
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
        self.whole.append(
            WholeParameter(
                name, name, stored_parameter(parameter, self.sides[1]), name, only_beside_factors
            )
        )

    def _differs(self, name: str) -> bool:
        """Whether a parameter's two values differ by more than one side's rounding."""
        old, new = (names.parameter(name) for names in self.names)
        if old is None or new is None or old.shape != new.shape:
            return True
        return not equal_parameters(
            self.sides, stored_parameter(old, self.sides[0]), stored_parameter(new, self.sides[1])
        )

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


def _not_floats(name: str, found: set[str]) -> Refused:
    expected = " ".join(dtypes.FLOATS)
    return Refused(
        f"{shown(name)} is {', '.join(sorted(found))}",
        expected=expected,
        where="weights",
        hint="dequantize it first",
    )
