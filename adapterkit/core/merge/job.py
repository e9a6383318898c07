"""The state of a merge while it is planned: options, inputs, and the changes of each parameter."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from adapterkit.core.adapter.factors import Factors
from adapterkit.core.adapter.record import Adapter, Lora
from adapterkit.core.checkpoint.fingerprint import fingerprint
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import same_bytes
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.commands import CHECK_BASE
from adapterkit.core.errors import Problems, Refused, listed, shown
from adapterkit.core.inputs.earlier_merges import MergedAdapter
from adapterkit.core.inputs.model_config import vocabulary_sizes
from adapterkit.core.merge.verb import MergeOptions
from adapterkit.core.patterns import MODULES
from adapterkit.core.records import Json
from adapterkit.core.registry import load
from adapterkit.core.weights.decoded import decoded_view, quantized_weights
from adapterkit.core.weights.names import Names, mentions_weight
from adapterkit.core.weights.parameters import Parameter
from adapterkit.doors import MERGES

if TYPE_CHECKING:
    from adapterkit.adapters.formats.merged_deltas import PlacedDelta
    from adapterkit.adapters.kinds.merging import PlacedFunctions
    from adapterkit.core.adapter.selection import Selection
    from adapterkit.core.inputs.weights_file import WeightsFile
    from adapterkit.verbs.combine.module_methods import ModuleMethods, ModuleWeights, WeightOf

OTHER_LISTS = re.compile(r"^architectures$|_token_ids?$")  # not one value for each layer
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
LAYER = re.compile(r"^((?:.*\.)?(?:layers|layer|h|blocks)\.)(\d+)(\..*)", re.DOTALL)


def replicated(base: Checkpoint, adapters: list[Adapter], errors: Problems) -> Checkpoint:
    """The base with its layers repeated in the order of the adapters' layer_replication. If the
    order does not fit, the base is returned unchanged and the problem joins the errors."""
    replicating = [a for a in adapters if a.config.get("layer_replication")]
    if len({json.dumps(a.config.get("layer_replication")) for a in adapters}) > 1:
        errors.add(
            "different layer_replication in the adapters",
            "the same in all",
            "merge those that agree",
            where=replicating[0].where,
            code="AK305",
        )
        return base
    ranges = replicating[0].config["layer_replication"]
    order = [i for start, end in ranges for i in range(start, end)]
    try:
        prefix, count = _layer_stack(base, order)
    except Refused as error:
        errors.append(error)
        return base
    tensors: dict[str, TensorSpec] = {}
    copies: dict[int, list[int]] = {}
    for new, old in enumerate(order):
        copies.setdefault(old, []).append(new)
    for key, spec in base.tensors.items():
        match = LAYER.match(key)
        if match is None or match[1] != prefix:
            tensors[key] = spec
            continue
        for new in copies.get(int(match[2]), ()):
            tensors[f"{prefix}{new}{match[3]}"] = spec
    config = stacked(base.config, count, order)
    return replace(base, tensors=tensors, config=config)


def _layer_stack(base: Checkpoint, order: list[int]) -> tuple[str, int]:
    """Prefix and number of the layers that can be replicated. `Refused` if the model has several
    stacks of layers, or lacks a layer of the order."""
    counts = {base.config[c] for c in COUNTS if isinstance(base.config.get(c), int)}
    text = base.config.get("text_config")
    counts |= {text[c] for c in COUNTS if isinstance(text, dict) and isinstance(text.get(c), int)}
    layers: dict[str, set[int]] = {}
    for key in base.tensors:
        match = LAYER.match(key)
        if match:
            layers.setdefault(match[1], set()).add(int(match[2]))
    stacks = [
        (prefix, len(numbers))
        for prefix, numbers in layers.items()
        if len(numbers) in counts and numbers == set(range(len(numbers)))
    ]
    if len(stacks) != 1:
        raise Refused(
            f"{len(stacks)} stacks of layers that could be replicated: "
            f"{', '.join(shown(prefix) for prefix, _ in stacks)}",
            expected="one stack with the config's number of layers",
            where=base.name,
            hint="this model's layers cannot be replicated",
            code="AK406",
        )
    bad = sorted({i for i in order if i >= stacks[0][1]})
    if bad or not order:
        raise Refused(
            f"layers {listed(bad)} of a base with {stacks[0][1]} layers",
            expected="layers of the base",
            where="layer_replication",
            hint="use the base that the adapter was trained on",
            code="AK406",
        )
    return stacks[0]


def stacked(config: Json, count: int, order: list[int]) -> Json:
    """A config with the new number of layers, and every per-layer list repeated in the same
    order."""

    def setting(key: str, value: object) -> Any:
        if key in COUNTS and value == count:
            return len(order)
        if isinstance(value, list) and len(value) == count and not OTHER_LISTS.search(key):
            return [value[i] for i in order]
        if isinstance(value, dict) and key.endswith("_config"):
            return {k: setting(k, v) for k, v in value.items()}
        return value

    return {k: setting(k, v) for k, v in config.items()}


def nothing_selected(adapters: Iterable[str], options: MergeOptions) -> Refused:
    """The refusal of a merge in which no module of these adapters is selected."""
    problem, advice = "no module is selected", MODULES
    if not options.include and not options.exclude:
        problem, advice = "every weight is 0", "give a weight other than 0"
    return Refused(
        f"nothing to merge: {problem}",
        expected="at least one module",
        where=", ".join(dict.fromkeys(adapters)),
        hint=advice,
        code="AK105",
    )


@dataclass
class Change:
    """The change of one parameter: a new value to start from, rows replaced, then additions."""

    parameter: Parameter
    value: TensorSpec | None = None
    additions: list[Factors] = field(default_factory=list)
    vectors: list[tuple[TensorSpec, float]] = field(default_factory=list)  # biases of b, scales
    # deltas that are not factors, each with its weight
    deltas: list[tuple["PlacedDelta | PlacedFunctions", float]] = field(default_factory=list)
    rows: list[tuple[TensorSpec, tuple[int, ...]]] = field(default_factory=list)
    # weights of adapters by number, if a method combines them: they are not in the scales
    weights: dict[int, float] = field(default_factory=dict)
    adapters: list[str] = field(default_factory=list)
    value_from: int = 0  # number of the adapter that has `value`

    @property
    def has_edits(self) -> bool:
        """True if there are changes besides a new value."""
        return bool(self.additions or self.vectors or self.deltas or self.rows)


class MergeState:
    """One merge while it is planned: its inputs, and the adapters' changes of the base's
    parameters. Problems are collected in `errors`."""

    def __init__(
        self,
        base: Checkpoint,
        adapters: list[Adapter],
        weights: list[float],
        options: MergeOptions,
        part: str = "",
        weight_of: "WeightOf | None" = None,
        file: "WeightsFile | None" = None,
        selection: "Selection | None" = None,
    ):
        self.adapters, self.weights, self.options = adapters, weights, options
        self.part = part  # the base's component in a pipeline, whose merges share a `selection`
        self._prefix = f"{part}." if part else ""  # of modules' names in --include and --exclude
        self.errors = Problems(where="adapters")
        self.notes: list[str] = []
        # numbers of adapters followed by their initial factors, which are subtracted
        self.with_initial: frozenset[int] = frozenset()
        self.merged_before: list[MergedAdapter] = []
        self.skipped: list[str] = []
        self.changes: dict[str, Change] = {}
        self.new: dict[str, Change] = {}  # parameters that the base does not store: heads
        self.original, self.headers = base, base.shards  # headers of the output's files
        self.base = view = decoded_view(base)
        if any(adapter.config.get("layer_replication") for adapter in adapters):
            self.base = replicated(view, adapters, self.errors)
        self.quantized = [] if view is base else quantized_weights(self.base.tensors)
        self.config: Json = json.loads(json.dumps(self.base.config))
        self.selection = self._selection(selection)
        self.names = self._names()
        self.file = file
        # set if an adapter may have several weights; `weight_of` replaces them in a pipeline
        self.module_weights: ModuleWeights | None = None
        has_several = options.weight_for or options.lbw or file or options.method
        if weight_of is None and has_several:
            self.module_weights = load(MERGES["weights"])(base, weights, options, file)
        self._weight_of = self.module_weights.of if self.module_weights else weight_of
        self.methods = None if options.method is None else self._methods(options.method)

    def _methods(self, name: str) -> "ModuleMethods | None":
        """The method for each module; None for the plain sum."""
        method = load(MERGES["method"])(name, self.options)
        methods = load(MERGES["methods"])(method, len(self.weights), self.options.density_for)
        return methods if name != "linear" else None

    def weight(self, adapter: Adapter, module: str) -> float:
        """The weight of an adapter on a module."""
        if self._weight_of is None:
            return self.weights[adapter.number - 1]
        return self._weight_of(adapter.number, module)

    def changes_module(self, adapter: Adapter, module: str) -> bool:
        """Return whether a module is selected, and the adapter's weight there is not switched off.
        With a file of weights only the selection counts, because each parameter has its own
        weight."""
        if self.file is not None or self._weight_of is None:
            return self.is_selected(module)
        is_off = self.weight(adapter, module) == 0.0 != self.weights[adapter.number - 1]
        return not is_off and self.is_selected(module)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the base as it is stored."""
        return fingerprint(self.original)

    def _selection(self, shared: "Selection | None") -> "Selection | None":
        """The selection by --include and --exclude, that of all components or an own one, with the
        names of these adapters; None without the options."""
        include, exclude = self.options.include, self.options.exclude
        if not include and not exclude:
            return None
        from adapterkit.core.adapter.selection import Selection, selectable_names

        selection = shared or Selection(include, exclude)
        for adapter in self.adapters:
            names = selectable_names(adapter).union(one.target for one in adapter.others)
            selection.known |= {self._prefix + name for name in names}
        return selection

    def _names(self) -> Names:
        wanted: dict[str, None] = {}
        build_model = False
        vocabulary = vocabulary_sizes(self.base.config)
        for adapter in self.adapters:
            has_parameters = bool(adapter.config.get("target_parameters"))
            for lora in adapter.loras:
                if lora.kind == "embedding" or (vocabulary & {lora.b.shape[0], lora.a.shape[-1]}):
                    build_model = True
                if len(lora.a.shape) > 2 or has_parameters:
                    build_model = True
                if mentions_weight(self.base.config, lora.module):
                    build_model = True
                if self.is_selected(lora.module) and not has_parameters:
                    wanted[f"{lora.module}.weight"] = None
            for other in adapter.others:
                stored = self.base.tensors.get(name := f"{other.target}.weight")
                may_be_tied = stored is not None and vocabulary.intersection(stored.shape[:1])
                if may_be_tied or mentions_weight(self.base.config, other.target):
                    build_model = True
                wanted |= {name: None} if self.is_selected(other.target) else {}
            replaced = adapter.replaced
            if adapter.tokens or any(len(spec.shape) > 1 for spec in replaced.values()):
                build_model = True
            wanted |= {name: None for name in replaced if self.is_selected_value(name)}
            modules = (tokens.module for tokens in adapter.tokens)
            wanted |= {f"{module}.weight": None for module in modules if self.is_selected(module)}
        trained = self.adapters[0].trained_class
        is_text = not self.original.in_safetensors
        return Names(self.base, tuple(wanted), *trained, build_model, self.notes, text_only=is_text)

    @cached_property
    def leaves(self) -> dict[str, list[str]]:
        """The last parts of the names of a module's stored tensors, by module."""
        leaves: dict[str, list[str]] = {}
        for key in self.base.tensors:
            module, _, leaf = key.rpartition(".")
            leaves.setdefault(module, []).append(leaf)
        return leaves

    def is_selected(self, *names: str) -> bool:
        """Return whether --include and --exclude select a module by any of its names. In a
        pipeline, the names are prefixed with the component's."""
        selects = self.selection
        return selects is None or selects(*(self._prefix + name for name in names))

    def is_selected_value(self, parameter: str) -> bool:
        """Return whether a replaced parameter is selected, by its module's name or its own."""
        return self.is_selected(parameter.rpartition(".")[0], parameter)

    def skip(self, adapter: Adapter, name: str) -> None:
        """Note a module or parameter of the adapter that is not selected."""
        if self.module_weights is not None:
            self.module_weights.rules.skipped.add(name)
        self.skipped.append(f"{adapter.name}: {self._prefix}{name}")

    def change(self, parameter: Parameter) -> Change:
        """The change of this parameter, created if it has none."""
        return self.changes.setdefault(parameter.name, Change(parameter))

    def adapter(self, number: int) -> Adapter:
        """The adapter with this number among the inputs; the base is number 0."""
        return self.adapters[number - 1]

    def in_folder(self, spec: TensorSpec) -> tuple[Folder, TensorSpec]:
        """A tensor of an adapter with the adapter's folder."""
        return self.adapter(spec.folder).folder, spec

    def same_bytes(self, one: TensorSpec | None, other: TensorSpec | None) -> bool:
        """Read two tensors of adapters, and return whether dtype, shape and bytes are equal."""
        if one is None or other is None or one == other:
            return one == other
        return same_bytes(self.in_folder(one), self.in_folder(other))

    def is_zero(self, lora: Lora) -> bool:
        """Read two factors, and return whether one has only zeros."""
        both = map(self.in_folder, (lora.a, lora.b))
        return any(f.read(x.file, x.start, x.stop) == bytes(x.nbytes) for f, x in both)

    def unknown_error(self, adapter: Adapter, key: str, name: str) -> Refused:
        """The refusal of an adapter's tensor for a parameter that the base does not have."""
        reason = f" ({self.notes[-1].splitlines()[0]})" if self.notes else ""
        return Refused(
            f"{shown(key)}: the base has no {shown(name)}",
            expected="only parameters of the base",
            where=adapter.label,
            hint=CHECK_BASE + reason + self.base.otherwise,
            code="AK401",
        )

    def shape_error(
        self, adapter: Adapter, key: str, shape: object, expected: tuple[int, ...]
    ) -> Refused:
        """The refusal of an adapter's tensor, or tensors, of a shape that does not fit."""
        return Refused(
            f"{shown(key)}: shape {shape}",
            expected=f"one that fits the base's {expected}",
            where=adapter.label,
            hint=CHECK_BASE,
            code="AK401",
        )
