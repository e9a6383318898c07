"""Load, create, change and save Arrow routers on a live model."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapterkit.core import records
from adapterkit.core.checkpoint.disk import storage_errors
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec, read_header
from adapterkit.core.checkpoint.reader import Sources as SourceFiles
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import (
    AdapterkitError,
    Damaged,
    Problems,
    Refused,
    did_you_mean,
    listed,
    shown,
)
from adapterkit.core.inputs.sources import open_source
from adapterkit.core.options import ABOVE_0, COUNT, UNWEIGHTED, Sources, StrPath, checked
from adapterkit.core.outputs.folder_files import as_json
from adapterkit.core.patterns import similar_names
from adapterkit.core.records import Json
from adapterkit.runtime.layers import kind_of
from adapterkit.runtime.layers.routed import Experts, RoutedPatch
from adapterkit.runtime.load import writing
from adapterkit.runtime.load.placing import factor_device
from adapterkit.runtime.state import Attached, State
from adapterkit.runtime.weights import unique
from adapterkit.verbs.combine.planning.arrow import CONFIG, FORMAT, WEIGHTS
from adapterkit.verbs.combine.records.arrow import arrow as write_arrow
from adapterkit.verbs.shared.lora_config import LoraConfig

SETTINGS = records.entries(  # of arrow.json
    {
        "experts": records.also(records.list_of(records.TEXT), "a list of names", len),
        "top_k": records.POSITIVE_INT,
        "temperature": records.also(records.FINITE, "a number above 0", lambda value: value > 0),
    }
)
ROLES = ("a", "b", "scale", "prototype")  # of the tensors of a module; `expert` is optional


@dataclass
class ArrowRouter(Attached):
    """A router on the model, and the data needed to save it and to add experts."""

    settings: Json = field(default_factory=dict)  # its arrow.json
    experts: list[str] = field(default_factory=list)  # names, in the order of the numbers
    dtype: torch.dtype = torch.float32  # of the stored factors
    general: tuple[StrPath, ...] = ()  # sources of the general adapters, if known

    def routed(self) -> Iterator[tuple[str, RoutedPatch]]:
        for site, patch in self.patches():
            assert isinstance(patch, RoutedPatch)
            yield site.path, patch


# -- onto the model --------------------------------------------------------------------------------


def load(
    state: State,
    source: StrPath,
    name: str,
    *,
    top_k: int | None = None,
    temperature: float | None = None,
) -> None:
    """Add a router from its folder; `Refused` with every mismatch before anything changes."""
    state.unused(name)
    folder = open_source(source)
    settings = read_settings(folder)
    if top_k is not None:
        settings["top_k"] = checked("top_k", COUNT, top_k)
    if temperature is not None:
        settings["temperature"] = checked("temperature", ABOVE_0, temperature)
    count = len(settings["experts"])
    if settings["top_k"] > count:
        raise Refused(
            f"top_k {settings['top_k']}",
            expected=f"1 to {count}, the experts",
            where="top_k",
            hint="give fewer",
            code="AK806",
        )
    names = unique(settings["experts"])
    _put(state, name, settings, names, read(folder, names))


def create(
    state: State,
    sources: Sources,
    name: str,
    *,
    general: Sources = (),
    top_k: int | None,
    temperature: float,
    compat: str | None,
    seed: int | None,
) -> None:
    """Create a router over adapters: folders, Hub ids, names of loaded ones."""
    state.unused(name)
    experts = checked("adapters", UNWEIGHTED, sources)
    generals = checked("general", UNWEIGHTED, general)
    options = {"top_k": top_k, "temperature": temperature, "compat": compat, "seed": seed}
    with stacked(state, experts, generals, options) as folder:
        settings = read_settings(folder)
        names = unique(
            [
                str(source) if is_loaded(state, source) else own
                for source, own in zip(experts, settings["experts"], strict=True)
            ]
        )
        router = _put(state, name, settings, names, read(folder, names))
    if not any(is_loaded(state, source) for source in generals):
        router.general = tuple(
            os.path.abspath(source) if os.path.exists(source) else source for source in generals
        )


def _put(
    state: State, name: str, settings: Json, experts: list[str], modules: Mapping[str, Experts]
) -> ArrowRouter:
    """Add a router that was read; `Refused` if it does not fit the model."""
    check_modules(state, modules)
    router = ArrowRouter(
        name,
        LoraConfig(targets=list(modules)),
        trainable=False,
        base=settings.get("base_model_name_or_path"),
        settings=settings,
        experts=experts,
        dtype=next(iter(modules.values())).a.dtype,
    )
    patches = {path: patch_at(state, router, path, own) for path, own in modules.items()}
    state.put(router, patches.items())
    return router


def patch_at(state: State, router: ArrowRouter, path: str, experts: Experts) -> RoutedPatch:
    dtype = torch.promote_types(experts.a.dtype, torch.float32)
    experts = experts.to(factor_device(state.modules[path]), dtype)
    top_k, temperature = router.settings["top_k"], router.settings["temperature"]
    return RoutedPatch(router.name, experts, top_k, temperature)


@contextmanager
def stacked(
    state: State, experts: Sequence[StrPath], general: Sequence[StrPath], options: Mapping[str, Any]
) -> Iterator[Folder]:
    """The temporary folder that `adapterkit arrow` writes from these sources; loaded adapters among
    them are saved to temporary folders first."""
    with tempfile.TemporaryDirectory(prefix="adapterkit-") as root:
        paths: list[StrPath] = []
        for number, source in enumerate([*experts, *general]):
            if is_loaded(state, source):
                folder = Path(root, str(number), str(source).replace(os.sep, "_"))
                writing.save(state, folder, str(source), every_process=True)
                source = folder
            paths.append(source)
        own, others = paths[: len(experts)], paths[len(experts) :]
        out = Path(root, "arrow")
        write_arrow(own, general=others, out=out, hash="none", **options)
        yield open_source(out)


def is_loaded(state: State, source: StrPath) -> bool:
    """Return whether a source names a loaded adapter; a folder of that name is `./name`."""
    return isinstance(source, str) and source in state.adapters


# -- one expert more or less -----------------------------------------------------------------------


def add_expert(
    state: State, source: StrPath, *, name: str, arrow: str, general: Sources | None = None
) -> None:
    """Add an expert; `adapterkit arrow` computes its prototype and the subtraction. `Refused`
    before anything changes."""
    router = find(state, arrow)
    check_new(router, name)
    generals = general_sources(router, general)
    compat = router.settings.get("compat")
    options = {
        "compat": compat,
        "seed": router.settings.get("seed") if compat else None,
        "dtype": str(router.dtype),
    }
    with stacked(state, [source], generals, options) as folder:
        settings = read_settings(folder)
        (stored_source, *stored_general) = settings["sources"]
        check_general(router, stored_general)
        modules = read(folder, [name])
    check_modules(state, modules)
    patches = dict(router.routed())
    joined, further = {}, {}  # computed before anything changes
    for path, experts in modules.items():
        if (patch := patches.get(path)) is None:
            further[path] = patch_at(state, router, path, experts)
        else:
            experts = experts.to(patch.down.device, patch.down.dtype)
            joined[path] = patch.experts.followed_by(experts)
    for path, experts in joined.items():
        patches[path].hold(experts)
    for path, patch in further.items():
        state.add(router, path, patch)
    sources = router.settings.get("sources", [])
    router.settings["sources"] = [
        *sources[: len(router.experts)],
        stored_source,
        *sources[len(router.experts) :],
    ]
    router.experts.append(name)
    state.select(state.active)  # at modules that are new to the router too


def remove_expert(state: State, name: str, *, arrow: str) -> None:
    """Remove an expert from a router."""
    router = find(state, arrow)
    if name not in router.experts or len(router.experts) == 1:
        only = name in router.experts
        raise Refused(
            f"{shown(name)} is the only expert" if only else f"no expert {shown(name)}",
            expected="a router of two or more experts" if only else listed(router.experts),
            where=shown(arrow),
            hint="delete the router" if only else did_you_mean([name], router.experts),
            code="AK806",
        )
    number = router.experts.index(name)
    router.experts.pop(number)
    sources = router.settings.get("sources", [])
    router.settings["sources"] = sources[:number] + sources[number + 1 :]
    router.settings["top_k"] = min(router.settings["top_k"], len(router.experts))
    for path, patch in list(router.routed()):
        patch.top_k = router.settings["top_k"]
        if name not in patch.names:
            continue
        rest = patch.experts.without(name)
        if rest is None:
            state.take(router, path)
        else:
            patch.hold(rest)


def find(state: State, name: str) -> ArrowRouter:
    """A router by its name; `Refused` for another adapter."""
    state.known([name])
    router = state.adapters[name]
    if not isinstance(router, ArrowRouter):
        routers = [n for n, adapter in state.adapters.items() if isinstance(adapter, ArrowRouter)]
        raise Refused(
            f"{shown(name)} is no router",
            expected=listed(routers) or "a router; there is none",
            where="arrow",
            hint="load_arrow and create_arrow_model make one",
            code="AK806",
        )
    return router


def check_new(router: ArrowRouter, name: str) -> None:
    if not isinstance(name, str) or not name or name in router.experts:
        raise Refused(
            f"name {name!r} of an expert",
            expected=f"a text other than {listed(router.experts)}",
            where="name",
            hint="give another name=, or remove that expert first",
            code="AK806",
        )


def general_sources(router: ArrowRouter, general: Sources | None) -> list[StrPath]:
    """The sources of the general adapters that are subtracted from each expert."""
    names = router.settings.get("general") or []
    sources = list(router.general) if general is None else checked("general", UNWEIGHTED, general)
    if len(sources) != len(names):
        raise Refused(
            f"{len(sources)} general adapters",
            expected=f"{len(names)}: {listed(names)}, which are subtracted from each expert"
            if names
            else "none: the router subtracts none",
            where="general",
            hint="give them as general=[...], or build the router again from all adapters",
            code="AK806",
        )
    return sources


def check_general(router: ArrowRouter, stored: Sequence[Mapping[str, object]]) -> None:
    """`Refused` for other general adapters than those of the router's existing experts."""
    known = router.settings.get("sources", [])[len(router.experts) :]
    wrong = [
        str(new["name"])
        for new, old in zip(stored, known, strict=True)
        if new["header"] != old["header"]
    ]
    if wrong:
        raise Refused(
            f"general adapters {listed(wrong)}",
            expected=f"{listed(router.settings['general'])}, unchanged and in this order",
            where="general",
            hint="give those that the router was built with",
            code="AK806",
        )


# -- files -----------------------------------------------------------------------------------------


def save(state: State, folder: StrPath, name: str) -> None:
    """Write a router as `adapterkit arrow` does, each file in one step."""
    router = find(state, name)
    tensors: dict[str, Tensor] = {}
    for path, patch in router.routed():
        experts = patch.experts
        tensors[f"{path}.a"] = writing.stored_value(experts.a).to(router.dtype)
        tensors[f"{path}.b"] = writing.stored_value(experts.b).to(router.dtype)
        tensors[f"{path}.scale"] = torch.tensor(experts.scales, dtype=torch.float32)
        tensors[f"{path}.prototype"] = writing.stored_value(experts.prototypes).float()
        if len(experts.names) < len(router.experts):
            numbers = [router.experts.index(expert) for expert in experts.names]
            tensors[f"{path}.expert"] = torch.tensor(numbers, dtype=torch.int32)
    settings = router.settings | {"experts": router.experts}
    if not writing.writes():
        return
    root = Path(folder)
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        writing.replace(root / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt"}))
        writing.replace(root / CONFIG, lambda path: path.write_bytes(as_json(settings)))


def read_settings(folder: Folder) -> Json:
    """arrow.json; `Refused` for another folder, `Damaged` for invalid settings."""
    missing = [name for name in (CONFIG, WEIGHTS) if name not in folder.files()]
    if missing:
        raise Refused(
            f"no {' and no '.join(missing)}",
            expected="a folder that `adapterkit arrow` wrote",
            where=folder.label,
            hint="create_arrow_model takes the adapters themselves",
            code="AK806",
        )
    settings = read_json(folder, CONFIG)
    if settings.get("arrow") != FORMAT:
        raise Refused(
            f"format {settings.get('arrow')!r}",
            expected=str(FORMAT),
            where=f"{folder.label}/{CONFIG}",
            hint="update adapterkit, or run `adapterkit arrow` again",
            code="AK806",
        )
    where, hint = f"{folder.label}/{CONFIG}", "run `adapterkit arrow` again"
    Problems(records.problems(SETTINGS, settings, where, hint=hint, kind=Damaged)).raise_all()
    return dict(settings)


def read(folder: Folder, names: list[str]) -> dict[str, Experts]:
    """The experts of a router's folder by module, under these names."""
    header = read_header(folder, WEIGHTS)
    modules: dict[str, dict[str, TensorSpec]] = {}
    for spec in header.tensors:
        path, _, role = spec.key.rpartition(".")
        modules.setdefault(path, {})[role] = spec
    errors = [error for path, specs in modules.items() for error in problems(path, specs)]
    if not modules:
        errors = [Damaged("no tensors", expected="experts", code="AK806")]
    locate(errors, folder)
    result = {}
    with SourceFiles((folder,), {}) as files:
        reader = LocalReader(files, torch.device("cpu"), dtype=None)
        for path, specs in modules.items():
            values = {role: reader.tensor(spec) for role, spec in specs.items()}
            count = len(values["a"])
            numbers = values["expert"].tolist() if "expert" in values else list(range(len(names)))
            if len(numbers) != count or not set(numbers) <= set(range(len(names))):
                errors.append(
                    Damaged(
                        f"experts {numbers} at {shown(path)} with {count} factors",
                        expected=f"one number for each, below {len(names)}",
                        code="AK806",
                    )
                )
                continue
            result[path] = Experts(
                tuple(names[number] for number in numbers),
                values["a"],
                values["b"],
                tuple(values["scale"].tolist()),
                values["prototype"],
            )
    locate(errors, folder)
    return result


def problems(path: str, specs: Mapping[str, TensorSpec]) -> Iterator[AdapterkitError]:
    """Find errors in the tensors of a module."""
    if set(specs) - {"expert"} != set(ROLES):
        yield Damaged(
            f"{shown(path)} with {listed(sorted(specs))}", expected=listed(ROLES), code="AK806"
        )
        return
    count, _, width = (*specs["a"].shape, 0, 0, 0)[:3]
    shapes = {role: spec.shape for role, spec in specs.items()}
    rank, out = (*shapes["a"][1:2], *shapes["b"][1:2], 0, 0)[:2]
    expected = {
        "a": (count, rank, width),
        "b": (count, out, rank),
        "scale": (count,),
        "prototype": (count, width),
        "expert": (count,),
    }
    wrong = [role for role, shape in shapes.items() if shape != expected[role]]
    if wrong or not count:
        yield Damaged(
            f"{shown(path)} with shapes {', '.join(f'{r} {shapes[r]}' for r in shapes)}",
            expected="a (E, r, in), b (E, out, r), scale (E), prototype (E, in), expert (E)",
            code="AK806",
        )


def locate(errors: Sequence[AdapterkitError], folder: Folder) -> None:
    """Raise these errors, if any, with the folder's tensors as their location."""
    for error in errors:
        error.where, error.hint = f"{folder.label}/{WEIGHTS}", "run `adapterkit arrow` again"
    Problems(list(errors)).raise_all()


def check_modules(state: State, modules: Mapping[str, Experts]) -> None:
    """`Refused` for modules that the model lacks or that differ in size."""
    errors = Problems(code="AK806")
    for path, experts in modules.items():
        host = state.modules.get(path)
        kind = None if host is None else kind_of(host)
        where, hint = "the model", "the experts were trained on another model"
        if host is None:
            problem = f"no module {shown(path)}"
            errors.add(
                problem,
                "the experts' modules",
                similar_names(path, list(state.modules)) or hint,
                where=where,
            )
        elif kind is None or not kind.is_matrix:
            problem = f"{shown(path)} is a {type(host).__name__}"
            errors.add(problem, "a linear layer", hint, where=where)
        else:
            (_, rank, width), out = experts.a.shape, experts.b.shape[1]
            (_, own_width), (own_out, _) = kind.shapes(host, rank)
            if (out, width) != (own_out, own_width):
                problem = f"{shown(path)} has the shape {(own_out, own_width)}"
                errors.add(problem, f"{(out, width)}, as its experts", hint, where=where)
    errors.raise_all()
