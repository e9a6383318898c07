"""Plan the difference of two checkpoints: which parameters get factors, which are saved in full."""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from adapterkit.core import dtypes
from adapterkit.core.adapter import adapter_config
from adapterkit.core.adapter.adapter_config import NO_MODULES, rank_settings
from adapterkit.core.adapter.factors import Place
from adapterkit.core.adapter.keys import value_key
from adapterkit.core.adapter.selection import Selection
from adapterkit.core.adapter.targets import TargetMatcher
from adapterkit.core.checkpoint.fingerprint import fingerprint
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.errors import Problems, Refused, Unrecoverable, listed, shown
from adapterkit.core.inputs.base_door import kind_of
from adapterkit.core.inputs.model_config import nested_values
from adapterkit.core.inputs.sources import if_given, open_adapter, open_model, open_statistics
from adapterkit.core.merge.plan import plan_merge
from adapterkit.core.merge.value_comparison import equal_values
from adapterkit.core.merge.verb import MergeOptions
from adapterkit.core.outputs.folder_files import as_json
from adapterkit.core.plan import Plan, Task
from adapterkit.core.records import Json
from adapterkit.core.weights.detect import check_not_quantized
from adapterkit.core.weights.names import Names
from adapterkit.core.weights.parameters import Parameter, StoredParameter
from adapterkit.verbs.combine.planning.factor_targets import FactorTargets
from adapterkit.verbs.combine.records.extract import Extract
from adapterkit.verbs.combine.tasks.difference import (
    DifferenceFactors,
    WholeParameter,
    finalize_extraction,
    prefixes,
)
from adapterkit.verbs.combine.tasks.truncate import in_output_norms, within_shares
from adapterkit.verbs.shared import adapter_output
from adapterkit.verbs.shared.adapter_output import Output
from adapterkit.verbs.shared.options import TruncationOptions


@dataclass(frozen=True)
class ExtractedAdapter(Output):
    """An adapter with targets that are parameters: stacks of experts, routers."""

    all_modules: frozenset[str] = frozenset()  # of the model
    tuned: str = ""  # the name of the fine-tune, for messages

    def config(self, metrics: dict[str, dict], grown: int = 0) -> bytes:
        """adapter_config.json for the ranks in the metrics; `Unrecoverable` if the adapter is
        empty."""
        ranks = {
            target: metrics[name]["rank"]
            for name, target in self.modules.items()
            if "rank" in metrics[name]
        }
        if not ranks and not any("taken" in metric for metric in metrics.values()):
            raise Unrecoverable(
                "no weight differs from the base",
                expected="a fine-tune of the base",
                where=self.tuned,
                hint="check the two paths: BASE is the original, TUNED was made of it",
                code="AK408",
            )
        parameters = sorted(ranks.keys() & self.parameters)
        modules = self.target_modules(ranks.keys() - self.parameters) if ranks else NO_MODULES
        config = (self.base_settings or {}) | self.settings | {"target_modules": modules}
        config |= {"target_parameters": parameters} if parameters else {}
        # PEFT matches a pattern with the parameter's name, merge with the module's where it is its
        # weight
        by_pattern = {
            re.sub(r"\.weight$", r"(\\.weight)?", target): rank for target, rank in ranks.items()
        }
        return as_json(config | rank_settings(by_pattern))

    def target_modules(self, modules: Collection[str]) -> list[str] | str:
        """target_modules that match only these modules: a name in a list matches every module whose
        path ends with it."""
        is_meant = TargetMatcher(sorted(modules), "target_modules")
        if any(map(is_meant, self.all_modules.difference(modules))):
            return "|".join(re.escape(module) for module in sorted(modules))
        return sorted(modules)


@dataclass
class Extraction:
    """Every parameter of a fine-tune, the second side, sorted: with factors, saved in full,
    unchanged, or not selected. Those without factors are read and compared."""

    sides: tuple[Checkpoint, Checkpoint]
    options: Extract
    selection: Selection
    prefix: str = ""  # of a pipeline's part, before the names of modules that are selected
    errors: Problems = field(default_factory=Problems)
    notes: list[str] = field(default_factory=list)
    factors: list[DifferenceFactors] = field(default_factory=list)
    values: list[WholeParameter] = field(default_factory=list)
    # modules saved in full, and parameters that no such module represents
    saved: set[str] = field(default_factory=set)
    has_biases: bool = False  # of layers with factors
    skipped: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # though they differ
    unchanged: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        new = Names(self.sides[1], build_model=True, notes=self.notes)
        cls = type(new.model.model).__name__ if new.model is not None else None
        wanted = tuple(new.all()) if cls else ()
        old = Names(self.sides[0], wanted, trained_class=cls, build_model=True, notes=self.notes)
        self.names = old, new
        self.targets = FactorTargets(new)
        for name in (*new.all(), *old.all()):
            self.selection.known.add(self._selectable_name(name))
        self.truncation = self.options.only(TruncationOptions)
        self.dtype = dtypes.parse(self.options.dtype)

    def is_selected(self, parameter: str) -> bool:
        """Return whether --include and --exclude select a parameter, by its module's name, or its
        own if it belongs to the model itself."""
        return self.selection(self._selectable_name(parameter))

    def _selectable_name(self, parameter: str) -> str:
        return self.prefix + (parameter.rpartition(".")[0] or parameter)

    @property
    def fan_in_fan_out(self) -> bool:
        """PEFT's flag for layers whose weight is (in, out)."""
        return any(self.names[1].transposed(difference.module) for difference in self.factors)

    def settings(self) -> Json:
        """Settings of the config besides targets and ranks."""
        stacks = any(difference.place.experts is not None for difference in self.factors)
        return {
            "modules_to_save": sorted(self.saved) or None,
            "bias": "lora_only" if self.has_biases else "none",
            **({"peft_version": adapter_config.PEFT_LAYOUT} if stacks else {}),
        }

    def sort(self) -> None:
        """Sort all parameters; problems join the errors."""
        names = self.names
        without_factors: dict[str, list[str]] = {}  # by module
        clashes: list[str] = []
        done: set[str] = set()
        for name in names[1].all():
            module = name.rpartition(".")[0]
            if not self.is_selected(name):
                self.skipped.append(name)
                continue
            old = new = None
            with self.errors.collected():
                old, new = names[0].parameter(name), names[1].parameter(name)
            if new is None:
                continue
            if old is not None and old.shape != new.shape and not self._is_resized(old, new):
                clashes.append(f"{shown(name)} {old.shape} and {new.shape}")
                continue
            shared = set(_tied(old, new)) & done
            if shared:
                self._check_copy(name, min(shared))
                continue
            done.add(name)
            target = self.targets.of(name, new)
            if old is not None and target is not None and old.shape == new.shape:
                self._add_factors(name, target, old, new)
            else:
                without_factors.setdefault(module, []).append(name)
        self._check_sides(clashes)
        for module, members in without_factors.items():
            self._sort_module(module, members)
        if self.dropped:
            count = len(self.dropped)
            text = f"{count} parameters that differ are dropped (--rest drop)"
            self.notes.append(f"{text}: {listed(self.dropped)}")
            self.skipped += self.dropped
        if self.has_biases:
            self._save_biases()
        self._set_keys()

    def _check_sides(self, clashes: list[str]) -> None:
        """Refuse parameters that only the base has, and these clashes of shapes."""
        names = self.names
        lone = [
            name
            for name in names[0].all()
            if names[1].parameter(name) is None and self.is_selected(name)
        ]
        for name in lone:
            self._refuse(
                f"{shown(name)} is in {self.sides[0].name} alone",
                "every parameter of the base in both",
                "exclude it with --exclude",
            )
        for clash in clashes:
            self._refuse(
                f"shapes that differ: {clash}",
                "two models of one size",
                "check the two paths, or exclude them with --exclude",
            )

    def _set_keys(self) -> None:
        """Give all tasks keys as deep as they can become: as if every difference had factors."""
        wrappers, depths = Counter(difference.module for difference in self.factors), Counter()
        for number, difference in enumerate(self.factors):
            self.factors[number] = difference.with_keys(wrappers, depths[difference.module])
            depths[difference.module] += 1
        for number, value in enumerate(self.values):
            key = value_key(value.parameter, wrappers)
            self.values[number] = replace(value, name=key, key=key)

    def _is_resized(self, old: Parameter, new: Parameter) -> bool:
        """True if two shapes differ only by the vocabulary."""
        rank = len(new.shape)
        if rank not in (1, 2) or len(old.shape) != rank or old.shape[1:] != new.shape[1:]:
            return False
        if self.targets.is_embedding_or_head(new.name):
            return True
        return all(
            parameter.shape[0] in nested_values(side.config, "vocab_size")
            for parameter, side in zip((old, new), self.sides, strict=True)
        )

    def _check_copy(self, name: str, other: str) -> None:
        """Refuse two names of one parameter that are stored with two values."""
        new, names = self.sides[1], self.names[1]
        copies = [p for n in (name, other) if (p := names.parameter(n)) is not None]
        if [slot.key for slot in copies[0].slots] == [slot.key for slot in copies[1].slots]:
            return
        if not equal_values((new, new), *(StoredParameter.of(p, new.tensors) for p in copies)):
            self._refuse(
                f"{shown(name)} and {shown(other)} are tied, and stored with two values",
                "one value",
                "set tie_word_embeddings to false in its config if they are two, or exclude one "
                "with --exclude",
            )

    def _add_factors(self, name: str, target: str, old: Parameter, new: Parameter) -> None:
        before, after = self._stored(old, 0), self._stored(new, 1)
        stored = before.dtypes | after.dtypes
        if not stored <= set(dtypes.FLOATS):
            problem = f"{shown(name)} is {', '.join(sorted(stored))}"
            hint = "dequantize it first"
            self.errors.add(problem, " ".join(dtypes.FLOATS), hint, where="weights", code="AK408")
            return
        module, shape, experts = name.rpartition(".")[0], new.shape, None
        if target == name and len(shape) == 3:
            experts, *shape = shape
            transposed = self.names[1].transposed_experts(module)
        else:
            transposed = self.names[1].transposed(module)
        shape = tuple(shape[::-1] if transposed else shape)
        place = Place.of_weight(module, shape, experts=experts)
        task_name = module if name == f"{module}.weight" else name
        sides = before, after, transposed, target
        self.factors.append(
            DifferenceFactors(
                task_name, place, self.dtype, module, *sides, truncation=self.truncation
            )
        )

    def _sort_module(self, module: str, names: list[str]) -> None:
        """Sort a module's parameters without factors: saved in full if one of them differs."""
        changed = [name for name in names if self._differs(name)]
        if not changed:
            self.unchanged += names
            return
        if self.options.rest == "refuse":
            self._refuse(
                f"{', '.join(map(shown, changed))} differs and gets no factors",
                "linear layers and convolutions only",
                "give --rest save or --rest drop, or exclude it with --exclude",
            )
            return
        if self.options.rest == "drop":
            self.dropped += changed
            return
        has_factors = any(difference.module == module for difference in self.factors)
        if has_factors and f"{module}.bias" in changed:
            self.has_biases = True  # saved with those of the other layers
            changed.remove(f"{module}.bias")
        if changed and self._can_be_copied(module, names):
            self.saved.add(module)
            changed = names
        else:
            self.saved.update(changed)
        for name in changed:
            self._save(name)

    def _can_be_copied(self, module: str, names: list[str]) -> bool:
        """True if a trained copy can replace a module with these parameters: none is tied, and no
        enclosing module has factors."""
        old, new = self.names
        if any(_tied(old.parameter(name), new.parameter(name)) for name in names):
            return False
        around = prefixes(module)
        if any(difference.module in around for difference in self.factors):
            return False
        return self.targets.can_be_copied(module, names)

    def _save_biases(self) -> None:
        """Save the biases of all layers with factors, changed or not: PEFT's bias="lora_only"."""
        done = {value.parameter for value in self.values}
        for module in dict.fromkeys(difference.module for difference in self.factors):
            name = f"{module}.bias"
            if self.names[1].parameter(name) is not None and name not in done:
                self._save(name, only_with_factors=not self._differs(name))

    def _save(self, name: str, *, only_with_factors: bool = False) -> None:
        parameter = self.names[1].parameter(name)
        assert parameter is not None
        value = self._stored(parameter, 1)
        self.values.append(WholeParameter(name, name, value, name, only_with_factors))

    def _differs(self, name: str) -> bool:
        """True if a parameter's two values differ by more than one side's rounding."""
        old, new = (names.parameter(name) for names in self.names)
        if old is None or new is None:
            return True
        return not equal_values(self.sides, self._stored(old, 0), self._stored(new, 1))

    def _stored(self, parameter: Parameter, side: int) -> StoredParameter:
        return StoredParameter.of(parameter, self.sides[side].tensors)

    def _refuse(self, problem: str, expected: str, hint: str) -> None:
        self.errors.add(problem, expected, hint, where=self.sides[1].name, code="AK408")


def _tied(old: Parameter | None, new: Parameter | None) -> tuple[str, ...]:
    """The names that share a parameter on both sides."""
    if old is None or new is None:
        return ()
    return tuple(name for name in new.tied if name in old.tied)


def plan_extract(options: Extract) -> Plan:
    """The plan of an extraction; `Refused` with all problems. Reads and compares parameters without
    factors."""
    base, tuned = kind_of(open_model(options.base)), kind_of(open_model(options.tuned))
    if type(base) is type(tuned) and (own := base.own("extract")):
        return own(base, tuned, options)
    return plan_model_extraction(base.read(), tuned.read(1), options)


def plan_model_extraction(
    base: Checkpoint,
    tuned: Checkpoint,
    options: Extract,
    part: str = "",
    selection: Selection | None = None,
) -> Plan:
    """The extraction between two models, or between this component of two pipelines, whose
    components share a `selection`."""
    stats, sides = if_given(open_statistics, options.stats), (base, tuned)
    for side in sides:
        check_not_quantized(side)
    truncation = options.only(TruncationOptions)
    own = Selection(options.include, options.exclude)
    extraction = Extraction(sides, options, selection or own, part and f"{part}.")
    if selection is None:
        extraction.errors += own.refusals("a module of the two models")
    extraction.sort()
    extraction.errors.raise_all()
    factors = within_shares(extraction.factors, truncation)
    read = [*sides]
    if options.rank and factors:
        from adapterkit.verbs.combine.planning.large_ranks import note_large_rank

        why = "the smaller side of the weight"
        extraction.notes += note_large_rank(options.rank, factors, why)
    if stats is not None:
        read.append(open_checkpoint(stats, 2))
        single = {one.name for one in factors if one.target != one.module}
        factors = in_output_norms(factors, read[-1], single, extraction.notes)
    tasks: list[Task] = [*factors, *extraction.values]
    if not tasks:
        raise Refused(
            "nothing to extract",
            expected="weights that both have",
            where=f"{base.name}, {tuned.name}",
            hint="check --include, --exclude",
            code="AK408",
        )
    targets = {difference.name: difference.target for difference in factors}
    parameters = frozenset(
        difference.target for difference in factors if difference.target != difference.module
    )
    task_type = adapter_config.task_type(sides[1].config, extraction.saved)
    base_settings = {
        "base_model_name_or_path": adapter_config.hub_id(base.folder),
        "task_type": task_type,
        "auto_mapping": None if task_type else extraction.targets.auto_mapping,
        # PEFT cannot wrap parameters of it, and need not
        "fan_in_fan_out": extraction.fan_in_fan_out and not parameters,
    }
    settings = adapter_config.plain_settings() | extraction.settings()
    summary = f"the difference of {tuned.name} and {base.name}"
    made_for = fingerprint(sides[0])
    finalize = partial(finalize_extraction, truncation, made_for=made_for)
    more: dict[str, Any] = {
        "base_settings": base_settings,
        "base_fingerprint": made_for,
        "parameters": parameters,
        "all_modules": frozenset(extraction.targets.modules),
        "tuned": tuned.name,
    }
    output = ExtractedAdapter([], tasks, targets, settings, summary, finalize=finalize, **more)
    decisions = {"left_out": extraction.skipped, "unchanged": sorted(extraction.unchanged)}
    return adapter_output.plan_adapters(
        "extract", options.recipe_options(), read, [output], extraction.notes, decisions
    )


def plan_merge_back(plan: Plan, folder: Path) -> Plan:
    """The plan of a merge of an extracted adapter into its base."""
    base = kind_of(plan.folders[0])
    opener, planner = base.own("open adapters"), base.own("merge of folders") or plan_merge
    adapters = opener(base, [folder]) if opener else [(open_adapter(folder), 1.0)]
    return planner(base, adapters, MergeOptions())
