"""Read a recipe of mergekit as a merge, if every input is one base, alone or with an adapter.

It is read as mergekit 0.1.5 reads it. Weights and densities of tensors may differ by input, layer
(gradients) and name (filters); here they become those of modules. Settings with another meaning
here are refused by name.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from adapterkit.adapters.formats.files.configs import read_config
from adapterkit.core import dtypes, records
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import LocalFolder, refuse_shares
from adapterkit.core.errors import Problems, Refused, did_you_mean, listed, shown
from adapterkit.core.inputs.model_config import nested_values
from adapterkit.core.inputs.sources import open_adapter, open_base, open_model, open_weighted
from adapterkit.core.merge.job import COUNTS, LAYER
from adapterkit.core.merge.verb import Merge
from adapterkit.core.options import finite
from adapterkit.core.records import Json
from adapterkit.verbs.shared.joined_values import read_all

HINT = "see docs/coming-from.md"
# mergekit's methods of one rule: how they prune, and their defaults
SPARSE: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "ties": {"prune": "magnitude", "consensus": "sum", "normalize": True},
    "dare_ties": {"prune": "random", "consensus": "sum", "rescale": True},
    "dare_linear": {"prune": "random", "rescale": True},
    "breadcrumbs": {"prune": "outliers"},
    "breadcrumbs_ties": {"prune": "outliers", "consensus": "sum"},
    "della": {"prune": "ranks", "consensus": "sum", "normalize": True, "rescale": True},
    "della_linear": {"prune": "ranks", "rescale": True},
}
DTYPES = {dtypes.CONFIG_NAME[stored]: name for name, stored in dtypes.SHORT.items()}
OWN = {"outliers": ("gamma",), "ranks": ("epsilon",)}  # parameters of a way to prune
WHOLE = "works on full weights, not on the deltas of adapters"
OTHERS = {
    "slerp": f"{WHOLE}; nuslerp with a base_model goes along the arc between deltas",
    **dict.fromkeys(("karcher", "multislerp", "model_stock", "arcee_fusion", "nearswap"), WHOLE),
    "passthrough": "stacks layers of several models",
}
LONGEST = 900  # characters of a pattern
Values = dict[tuple[int, str], float]  # by the adapter's number, from 0, and the module


@dataclass(frozen=True)
class RecipeInput:
    """A model of a recipe."""

    model: str
    parameters: Json = field(default_factory=dict)
    layer_range: tuple[int, ...] = ()


@dataclass(frozen=True)
class RecipeSlice:
    """The one slice of a recipe that does not stack layers."""

    sources: tuple[RecipeInput, ...]
    parameters: Json = field(default_factory=dict)


@dataclass(frozen=True)
class RecipeDocument:
    """A recipe as written."""

    merge_method: str
    base_model: str | None = None
    models: tuple[RecipeInput, ...] = ()
    slices: tuple[RecipeSlice, ...] = ()
    modules: Any = None
    parameters: Json = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Any = None
    tokenizer: Any = None
    chat_template: Any = None


def merge_of(file: Path, **running: Any) -> Merge:
    """The merge that a recipe describes, with these options of running; `Refused` with every
    setting that is not supported."""
    folder = LocalFolder(file.absolute().parent)
    if file.name not in folder.files():
        raise Refused(
            "no such file",
            expected="a recipe",
            where=str(file),
            hint="check the path",
            code="AK113",
        )
    table = read_config(folder, file.name)
    refuse_shares(table, file.name)
    if "step" in table or "steps" in table:
        hint = "write each step as a table [[step]] of a .toml file: see docs/workflows.md"
        raise Refused(
            "steps in YAML", expected="a recipe", where=str(file), hint=hint, code="AK113"
        )
    errors = Problems()
    if running.get("out") is None:
        hint = "give --out DIR"
        errors.add("no --out", "the output of the recipe", hint, where="options", code="AK113")
    with errors.collected():
        recipe = _Recipe(records.read(RecipeDocument, table, file.name, hint=HINT), file.name)
    errors.raise_all()
    return Merge(**recipe.arguments(), **running)


class _Recipe:
    """A recipe with its inputs opened; `errors` collects every unsupported setting."""

    def __init__(self, document: RecipeDocument, where: str):
        self.document, self.method = document, document.merge_method
        self.errors = Problems(where=where, hint=HINT, code="AK113")
        self._check_document()
        self.inputs = document.models or tuple(s for one in document.slices for s in one.sources)
        self._split_references()
        self.errors.raise_all()
        model = open_model(self.base)
        self.config = open_base(self.base).config
        opener = partial(open_adapter, base=model, for_merge=True)
        self.adapters = read_all([folder for folder, _ in open_weighted(self.paths, opener)])
        self.modules = [self._modules_of(adapter) for adapter in self.adapters]
        self._check_layers()
        self.errors.raise_all()

    @property
    def layers(self) -> int:
        """The number of the base's layers; 0 if its config does not have it."""
        counts = {n for key in COUNTS for n in nested_values(self.config, key)}
        return counts.pop() if len(counts) == 1 else 0

    def _check_document(self) -> None:
        document = self.document
        if self.method not in (*SPARSE, "linear", "nuslerp", "sce"):
            known = ", ".join((*SPARSE, "linear", "nuslerp", "sce"))
            reason = OTHERS.get(self.method, "is not known here")
            hint = did_you_mean([self.method], known.split(", ")) or "use one of these"
            self.errors.add(f"merge_method {shown(self.method)} {reason}", known, hint)
        if not (document.models or document.slices or document.modules):
            hint = "list them under models"
            self.errors.add("models is empty", "one input or more, each BASE+ADAPTER", hint)
        elif len(document.slices) > 1 or document.modules:
            problem = "modules, or several slices: a model assembled from layers of others"
            self.errors.add(problem, "models, or one slice of all layers", "see mergekit for these")
        for name in ("tokenizer", "chat_template"):
            if getattr(document, name) is not None:
                self.errors.add(name, "the base's", f"remove {name}; the base's is copied")
        if document.tokenizer_source not in (None, "base", document.base_model):
            problem = f"tokenizer_source {shown(str(document.tokenizer_source))}"
            self.errors.add(problem, "base", "give tokenizer_source: base")
        for dtype in filter(None, (document.dtype, document.out_dtype)):
            if dtype not in DTYPES:
                self.errors.add(f"dtype {shown(dtype)}", ", ".join(DTYPES), "give one of these")

    def _split_references(self) -> None:
        """Set the base, the adapters' paths, and each input's adapter number or None."""
        if not self.inputs:  # which is refused
            return
        pairs = [one.model.partition("+")[::2] for one in self.inputs]
        bases = {base for base, lora in pairs if lora} | {self.document.base_model} - {None}
        self.base, self.paths, self.numbers = self.document.base_model or "", [], []
        if len({*bases}) > 1 or not bases:
            count = f"{len(bases)} bases: {listed(sorted(map(str, bases)))}"
            problem = count if bases else "no base is named"
            self.errors.add(problem, "one base, of all inputs", "write each as BASE+ADAPTER")
            return
        self.base = str(bases.pop())
        for base, lora in pairs:
            path = lora or ("" if base == self.base else base)
            if path in self.paths or (not path and None in self.numbers):
                self.errors.add(f"{shown(path or base)} twice", "each input once", "remove one")
            self.numbers.append(len(self.paths) if path else None)
            self.paths += [path] if path else []
        if not self.paths:
            self.errors.add("no adapter", "inputs BASE+ADAPTER", "name them so")

    def _modules_of(self, adapter: Adapter) -> list[str]:
        others = {
            "replaced parameters": adapter.replaced,
            "trained token rows": adapter.tokens,
            "target_parameters": adapter.config.get("target_parameters"),
        }
        for what in (name for name, found in others.items() if found):
            problem = f"{adapter.name} has {what}"
            self.errors.add(problem, "factors of modules alone", "merge it without a recipe")
        return list(dict.fromkeys(lora.module for lora in adapter.loras))

    def _check_layers(self) -> None:
        for one in self.inputs if self.document.slices else ():
            if one.layer_range != (0, self.layers):
                problem = f"layer_range {list(one.layer_range)} of {shown(one.model)}"
                expected = f"all layers: [0, {self.layers}]"
                self.errors.add(problem, expected, "see mergekit for stacks of layers")

    # -- parameters --------------------------------------------------------------------------------

    def _value(self, name: str, module: str, which: int | None = None) -> Any:
        """A parameter's value on a module, for an input or for all; None if it is not given."""
        slices = [one.parameters for one in self.document.slices]
        own = [] if which is None else [self.inputs[which].parameters]
        found = LAYER.match(module)
        t = 0.0
        if found:
            t = int(found[2]) / (self.layers - 1) if self.layers > 1 else 1.0
        for level in (*own, *slices, self.document.parameters):
            if name in level:
                value = _evaluated(level[name], f"{module}.weight", t)
                if value is not None:
                    return value
        return None

    def _number(self, name: str, module: str, which: int, default: float | None = None) -> float:
        value = self._value(name, module, which)
        number = default if value is None else finite(value)
        if number is None:
            problem = f"{name} of {shown(self.inputs[which].model)} on {shown(module)}"
            problem += " is missing" if value is None else f" = {shown(repr(value))}"
            self.errors.add(problem, "a number", "give it in the input's parameters")
        return 0.0 if number is None else number

    def _shared(self, name: str, default: Any, which: Sequence[int | None] = (None,)) -> Any:
        """A parameter with one value for all modules, of the type of its default."""
        there = (self._value(name, m, n) for n in which for own in self.modules for m in own)
        values = {repr(value) if isinstance(value, list | dict) else value for value in there}
        values = {default if value is None else value for value in values} or {default}
        fits = lambda v: isinstance(v, bool) if isinstance(default, bool) else finite(v) is not None
        if len(values) == 1 and fits(value := values.pop()):
            return value if isinstance(default, bool) else finite(value)
        shown_values = ", ".join(sorted(shown(repr(value)) for value in values)) or "another value"
        self.errors.add(f"{name}: {shown_values}", "one value for all tensors", "give one")
        return default

    def _check_names(self, shared: Sequence[str], own: Sequence[str] = ()) -> None:
        """Refuse parameters that the method does not have."""
        levels = [self.document, *self.document.slices]
        tables = [({*shared, *own}, one.parameters) for one in levels]
        tables += [({*own}, one.parameters) for one in self.inputs]
        for allowed, table in tables:
            for name in sorted({*map(str, table)} - allowed):
                expected = ", ".join(sorted(allowed)) or "none there"
                self.errors.add(f"parameter {shown(name)} of {self.method}", expected, "remove it")

    # -- methods -----------------------------------------------------------------------------------

    def arguments(self) -> Json:
        """The merge's arguments; `Refused` with every setting that is not supported."""
        make = getattr(self, f"_{self.method}", self._sparse)
        values, options = make()
        self.errors.raise_all()
        weights, rules = _rules(values, len(self.paths))
        dtype = self.document.out_dtype or self.document.dtype
        return {
            "base": self.base,
            "adapters": list(zip(self.paths, weights, strict=True)),
            "weight_for": rules,
            "tokenizer": "base",
            "tied": "fold",
            **({"dtype": DTYPES[dtype]} if dtype else {}),
            **options,
        }

    def _inputs_of_adapters(self) -> Iterator[tuple[int, int]]:
        """(position among the inputs, number of the adapter)."""
        yield from ((i, n) for i, n in enumerate(self.numbers) if n is not None)

    def _weights(self) -> Values:
        return {
            (n, module): self._number("weight", module, i)
            for i, n in self._inputs_of_adapters()
            for module in self.modules[n]
        }

    def _divided(self, which: Sequence[int], *, exact: bool) -> Values:
        """The weights, divided by the sum over all these inputs, whatever modules they have."""
        values: Values = {}
        for module in dict.fromkeys(name for own in self.modules for name in own):
            weights = {i: self._number("weight", module, i) for i in which}
            total = math.fsum(weights.values())
            if abs(total) < 1e-8:
                if exact:
                    self.errors.add(f"weights that add up to 0 on {shown(module)}", "a sum", HINT)
                total = 1.0
            values |= {
                (n, module): weights[i] / total
                for i, n in self._inputs_of_adapters()
                if module in self.modules[n]
            }
        return values

    def _linear(self) -> tuple[Values, Json]:
        self._check_names(("normalize",), ("weight",))
        inputs = range(len(self.inputs))
        if self.document.base_model and None not in self.numbers:
            problem = "base_model of linear, without a weight among the models"
            self.errors.add(problem, "its weight", "add it to models, or remove base_model")
        if self._shared("normalize", True):
            return self._divided(inputs, exact=True), {}
        for module in dict.fromkeys(name for own in self.modules for name in own):
            total = math.fsum(self._number("weight", module, i) for i in inputs)
            if abs(total - 1) > 1e-9:
                problem = f"normalize: false, and weights of {shown(module)} that add up to {total}"
                self.errors.add(problem, "1: else the base itself is scaled", "normalize them")
        return self._weights(), {}

    def _sparse(self) -> tuple[Values, Json]:
        how = SPARSE[self.method]
        prune, own = how.get("prune", "none"), OWN.get(how.get("prune", ""), ())
        shared = ("int8_mask", "normalize", "rescale", "lambda")
        self._check_names(shared, ("weight", "density", *own))
        self._shared("int8_mask", False)  # a mask of 8 bits has the same values
        rescale = self._shared("rescale", how.get("rescale", False))
        divided = self._shared("normalize", how.get("normalize", False))
        factor = self._shared("lambda", 1.0)
        inputs = [i for i, _ in self._inputs_of_adapters()]
        defaults = {"gamma": 0.01, "epsilon": 0.15}
        settings: Json = {name: self._shared(name, defaults[name], inputs) for name in own}
        values = self._weights()
        consensus = how.get("consensus", "none")
        if consensus == "none":  # then the weights may have all of it
            values = self._divided(inputs, exact=False) if divided else values
            values = {key: factor * value for key, value in values.items()}
        else:
            settings |= {"consensus": consensus, "factor": factor}
            settings["divide"] = "weights" if divided else "none"
        if prune == "none":
            return values, {}
        settings |= {"prune": prune, "rescale": "l1" if rescale else "none"}
        densities: Values = {
            (n, module): min(self._number("density", module, i, 1.0), 1.0)
            for i, n in self._inputs_of_adapters()
            for module in self.modules[n]
            if values[n, module]  # else it takes no part
        }
        if len({*densities.values()}) == 1:
            return values, {
                "method": "gta",
                "settings": settings,
                "density": next(iter(densities.values())),
            }
        common, rules = _rules(densities, len(self.paths))
        rules += [f"{n}:.*={one!r}" for n, one in enumerate(common, 1) if one != 1.0]
        return values, {"method": "gta", "settings": settings, "density_for": rules}

    def _sce(self) -> tuple[Values, Json]:
        self._check_names(("int8_mask", "select_topk"))
        self._shared("int8_mask", False)
        select = min(self._shared("select_topk", 1.0), 1.0)
        if select < 1:
            self._check_same_modules()
        # mergekit's least sum of mean squares; below it all deltas count alike
        return self._ones(), {"method": "sce", "settings": {"select": select, "floor": 1e-6}}

    def _ones(self) -> Values:
        return {(n, m): 1.0 for n, own in enumerate(self.modules) for m in own}

    def _check_same_modules(self) -> None:
        """Refuse adapters of different modules: mergekit counts deltas of 0 that are missing."""
        first, *others = (set(own) for own in self.modules)
        if different := sorted({name for own in others for name in own ^ first}):
            problem = f"only some of the adapters have {listed(different)}"
            self.errors.add(problem, f"the same modules in all, for {self.method}", HINT)

    def _nuslerp(self) -> tuple[Values, Json]:
        self._check_names(("nuslerp_row_wise", "nuslerp_flatten"), ("weight",))
        if self._shared("nuslerp_row_wise", False) or not self._shared("nuslerp_flatten", True):
            self.errors.add("an arc for each row or column", "nuslerp_flatten: true", "remove it")
        if not self.document.base_model or len(self.paths) != 2:
            problem = f"nuslerp of {len(self.paths)} adapters" + (
                "" if self.document.base_model else f", without base_model: it then {WHOLE}"
            )
            self.errors.add(problem, "two, and base_model", "give base_model")
            return {}, {}
        self._check_same_modules()
        values: Values = {}
        inputs = [i for i, _ in self._inputs_of_adapters()]
        for module in self.modules[0]:
            one, two = (self._number("weight", module, i) for i in inputs)
            t = two / (one + two) if abs(one + two) >= 1e-6 else 0.5
            if not 0 <= t <= 1:
                problem = f"weights {one:g} and {two:g} on {shown(module)}"
                self.errors.add(problem, "a point between the two", "give weights of one sign")
            values |= {(0, module): 1 - t, (1, module): t}
        return values, {"method": "slerp"}


def _evaluated(setting: Any, name: str, t: float) -> Any:
    """A setting's value for the tensor of that name, at t of the layers; None if no filter fits.
    Lists of numbers are interpolated, other lists are indexed."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, Sequence) or isinstance(setting, str):
        return setting
    if any(isinstance(one, Mapping) for one in setting):
        for one in setting:
            if not isinstance(one, Mapping) or "value" not in one:
                return one
            if one.get("filter") in (None, "*") or str(one["filter"]) in name:
                return _evaluated(one["value"], name, t)
        return None
    numbers = [finite(one) for one in setting]
    if not setting or None in numbers:
        return setting[int(t * (len(setting) - 1))] if setting else None
    scaled = t * (len(numbers) - 1)
    low = int(scaled)
    high, part = min(len(numbers) - 1, low + 1), scaled - low
    return (1 - part) * float(numbers[low] or 0) + part * float(numbers[high] or 0)


def _rules(values: Values, count: int) -> tuple[list[float], list[str]]:
    """The value of each adapter that has one for all modules, else 1, and rules for the others."""
    common, rules = [1.0] * count, []
    for number in range(count):
        own: dict[float, list[str]] = {}
        for (n, module), value in values.items():
            if n == number:
                own.setdefault(value, []).append(re.escape(module))
        if len(own) == 1:
            (common[number],) = own
            continue
        for value, names in own.items():
            while names:
                size, taken = 0, []
                while names and (not taken or size + len(names[0]) < LONGEST):
                    size += len(names[0]) + 1
                    taken.append(names.pop(0))
                rules.append(f"{number + 1}:{'|'.join(taken)}={value!r}")
    return common, rules
