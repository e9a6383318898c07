"""resize: change an adapter's rank, and convert other types to standard LoRA. The result is the
best approximation of each delta, by its singular values."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.kinds.dora_deltas import BaseWeights, dora_problems
from adapterkit.adapters.kinds.planning import kind_of, read_deltas
from adapterkit.core import dtypes
from adapterkit.core.adapter.factors import Place
from adapterkit.core.adapter.keys import CONFIG
from adapterkit.core.adapter.peft import read_adapter
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.commands import PLAIN
from adapterkit.core.errors import Problems
from adapterkit.core.inputs.adapter_door import together
from adapterkit.core.inputs.base_door import read_checkpoint
from adapterkit.core.inputs.sources import if_given, open_model, open_statistics, open_unconverted
from adapterkit.core.merge.sites import join, levels_of, names_of, targets_of
from adapterkit.core.plan import Plan, Task
from adapterkit.core.records import Json
from adapterkit.verbs.combine.records.resize import Resize
from adapterkit.verbs.combine.tasks.truncate import (
    ConvertedFactors,
    FittedFactors,
    TruncatedFactors,
    finalize_by_size,
    in_output_norms,
    within_shares,
)
from adapterkit.verbs.shared import adapter_output
from adapterkit.verbs.shared.options import TruncationOptions

if TYPE_CHECKING:
    from adapterkit.adapters.kinds.common import Delta, Kind


def plan_resize(options: Resize) -> Plan:
    """The plan of a resize; `Refused` with all problems."""
    stored = open_unconverted(options.adapter)
    config = read_json(stored, CONFIG) if CONFIG in stored.files() else {}  # it is refused later
    kind, notes = kind_of(stored, config), []
    inputs = together([stored], options.out, as_is=kind is not None)
    (source,) = inputs.folders
    base, stats = if_given(open_model, options.base), if_given(open_statistics, options.stats)
    config = read_json(source, CONFIG) if CONFIG in source.files() else {}
    is_plain = kind is None and not config.get("use_dora")
    if options.drop_intruders is not None and not is_plain:
        problem = f"--drop-intruders with {'DoRA' if kind is None else kind.name}"
        Problems(where=source.name, code="AK102").fail(problem, "plain LoRA", PLAIN)
    is_read = options.drop_intruders or config.get("target_parameters")
    if base is not None and is_plain and not is_read:
        notes.append(f"{base.name} was not needed: the adapter's deltas are in its factors")
        base = None
    job = _ResizePlanner(options, None if base is None else read_checkpoint(base, 1), notes)
    if kind is not None:
        job.convert(kind, source)
    else:
        job.resize(read_adapter(source, 0))
    job.errors.raise_all()
    adapter_output.check_factors(job.ranked, source.name)
    statistics = None if stats is None else open_checkpoint(stats, 1 if base is None else 2)
    return inputs.written(job.plan(statistics))


@dataclass
class _ResizePlanner:
    """A resize in planning: the tasks of factors, and the adapter that determines the output's
    config."""

    options: Resize
    base: Checkpoint | None
    notes: list[str]
    errors: Problems = field(default_factory=Problems)
    ranked: list[FittedFactors] = field(default_factory=list)
    targets: Json = field(default_factory=dict)  # for the output's config
    adapter: Adapter | None = None
    init: Any = True  # the output's init_lora_weights
    alpha: float | None = None  # its lora_alpha; None: each module's rank

    def __post_init__(self) -> None:
        self.truncation = self.options.only(TruncationOptions)
        self.dtype = dtypes.parse(self.options.dtype)

    def resize(self, adapter: Adapter) -> None:
        """Add a LoRA by its factors, or a DoRA whose base is given by its weights."""
        self.adapter, self.init = adapter, adapter.config.get("init_lora_weights", True)
        if self.options.alpha == "keep":
            self.alpha = adapter.config["lora_alpha"]
            if adapter.config.get("lora_bias"):
                expected = "--alpha rank: PEFT scales biases of b by alpha / rank too"
                problem = "--alpha keep with lora_bias"
                self.errors.add(problem, expected, "remove --alpha", where="options", code="AK102")
        named = self.base if adapter.config.get("target_parameters") else None
        sites = join([adapter], self.errors, names_of(named, [adapter], self.notes))
        self.targets = targets_of(sites)
        joined = {name: next(iter(site.members.values())) for name, site in sites.items()}
        if self.options.drop_intruders is not None:
            from adapterkit.verbs.combine.tasks.intruders import reduced

            assert self.base is not None
            if adapter.base_change:
                from adapterkit.verbs.shared.joined_values import delta_problems

                self.errors += delta_problems(adapter)  # an intruder may be an initial factor
            modules = [factors.module for factors in joined.values()]
            weights = BaseWeights(self.base, adapter, modules, self.notes)
            its = weights, joined, self.dtype, self.options.drop_intruders, self.errors
            self.ranked += reduced(*its, truncation=self.truncation, alpha=self.alpha)
            return
        if self.base is None or not adapter.config.get("use_dora"):
            if adapter.config.get("use_dora"):
                self.notes.append(
                    "DoRA without --base: the magnitudes stay, and scale·b@a is approximated, not "
                    "the delta, which also depends on them and on the norms of W + scale·b@a (with "
                    "--base the delta itself is fitted, as standard LoRA)"
                )
            levels = levels_of(sites.values())
            how = {"truncation": self.truncation, "alpha": self.alpha}
            for name, site in sites.items():
                place, factors = site.place(levels), joined[name]
                self.ranked.append(TruncatedFactors(name, place, self.dtype, factors, **how))
            return
        self.errors += dora_problems(adapter)
        weights = BaseWeights(
            self.base, adapter, [lora.module for lora in adapter.loras], self.notes
        )
        for name, factors in joined.items():
            with self.errors.collected():
                delta, embedding = weights.dora(factors), factors.kind == "embedding"
                self._add(name, delta, delta.weight.weight_shape[1:], embedding, factors.module)
        plain = tuple(replace(lora, magnitude=None) for lora in adapter.loras)
        self.adapter = replace(adapter, loras=plain, config=adapter.config | {"use_dora": False})

    def convert(self, kind: "type[Kind]", source: Folder) -> None:
        """Add an adapter of another type, as a LoRA."""
        if self.options.alpha == "keep":
            problem = f"--alpha keep with an adapter of type {kind.name}"
            expected = "--alpha rank: the adapter has no lora_alpha"
            Problems(where="options", code="AK102").fail(problem, expected, "remove --alpha")
        self.adapter, modules = read_deltas(kind, source, self.base, self.notes, self.errors)
        for one in modules:
            self._add(one.module, one.delta, one.trailing_shape, one.embedding, one.module)
        self.targets = {"modules": {one.module: one.module for one in modules}}

    def _add(
        self,
        name: str,
        delta: "Delta",
        trailing_shape: tuple[int, ...],
        embedding: bool,
        module: str,
    ) -> None:
        kind = "embedding" if embedding else "module"
        place = Place.of_weight(module, (delta.shape[0], *trailing_shape), kind)
        how = {"truncation": self.truncation, "alpha": self.alpha}
        self.ranked.append(ConvertedFactors(name, place, self.dtype, delta, **how))

    def plan(self, stats: Checkpoint | None) -> Plan:
        """The plan; `Refused` if statistics are missing."""
        adapter, options = self.adapter, self.options
        assert adapter is not None
        ranked, finalize, targets = self.ranked, None, self.targets["modules"]
        if stats is not None:
            parameters = self.targets.get("parameters", frozenset())
            names = [name for name, target in targets.items() if target in parameters]
            ranked = in_output_norms(ranked, stats, names, self.notes)
        others = adapter_output.copy_all_but_factors(adapter, self.dtype)
        if self.truncation.max_size:
            ranked = within_shares(ranked, self.truncation)
            made_for = adapter.base_fingerprint
            finalize = partial(finalize_by_size, self.truncation, made_for=made_for)
        settings = adapter_output.settings_of(adapter) | {"init_lora_weights": self.init}
        tasks: list[Task] = [*ranked, *others]
        modules = {task.name: targets[task.name] for task in ranked}
        more = self.targets | {"modules": modules, "settings": settings, "finalize": finalize}
        more["alpha"] = self.alpha
        ranks = {task.factors.rank for task in ranked if isinstance(task, TruncatedFactors)}
        if options.rank and ranks and (most := max(ranks)) <= options.rank:
            self.notes.append(
                f"--rank {options.rank} lowers no rank: the largest is {most} already"
            )
        output = adapter_output.Output([adapter], tasks, summary="resized", **more)
        decisions = {"adapters": [{"name": adapter.name, "modules": len(ranked)}]}
        inputs = [adapter, *(one for one in (self.base, stats) if one is not None)]
        return adapter_output.plan_adapters(
            "resize", options.recipe_options(), inputs, [output], self.notes, decisions
        )
