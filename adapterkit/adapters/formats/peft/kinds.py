"""LoHa and LoKr between PEFT's layout and neutral contents, with the settings by which PEFT 0.21
expects such tensors."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache

from adapterkit.adapters.formats.capabilities import FIT, FIT_ON_BASE, several_components
from adapterkit.adapters.formats.modules.kinds import COPY, TOKENS, VALUE
from adapterkit.adapters.formats.modules.names import kernel_of
from adapterkit.adapters.formats.modules.parts import magnitudes, tail_of
from adapterkit.adapters.formats.modules.record import LANGUAGE, AdapterModule, Contents
from adapterkit.adapters.formats.modules.tensors import StoredTensor, from_spec, reshaped, stored
from adapterkit.adapters.formats.schema import Format
from adapterkit.adapters.formats.task import ConvertedTensor
from adapterkit.adapters.formats.write import FormatFile
from adapterkit.adapters.kinds.common import AdaptedModule, read_kind
from adapterkit.adapters.kinds.loha import LoHa
from adapterkit.adapters.kinds.lokr import LoKr
from adapterkit.core import dtypes
from adapterkit.core.adapter.adapter_config import as_int, rank_settings
from adapterkit.core.adapter.keys import CONFIG, PREFIX, WEIGHTS, canonical_key
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.hashes import sha256_of_small_file
from adapterkit.core.errors import Problems, Refused, listed
from adapterkit.core.records import Json

KINDS = {"LOHA": LoHa, "LOKR": LoKr}
# the settings of a source that stay
KEPT = ("base_model_name_or_path", "revision", "task_type")
Shapes = Mapping[str, tuple[int, ...]]  # of a module's tensors by role: w1, w2_a, t2, ...
# role -> name of the tensor
TENSORS = {
    "loha": {name.removeprefix("hada_"): name for name in LoHa.keys},
    "lokr": {name.removeprefix("lokr_"): name for name in LoKr.keys},
}
COMMON = {
    "auto_mapping": None, "base_model_name_or_path": None, "exclude_modules": None,
    "inference_mode": True, "init_weights": True, "layers_pattern": None,
    "layers_to_transform": None, "module_dropout": 0.0, "modules_to_save": None,
    "rank_dropout": 0.0, "revision": None, "task_type": None,
}  # fmt: skip
LINEAR, KERNELS = (1,), (1, *(k * k for k in range(2, 12)), *range(2, 12))  # sizes of kernels


def read_kinds(format: Format, folder: Folder, peft_type: str, number: int = 0) -> Contents:
    """The contents of an adapter of that type. `Refused` with every unusable key and setting."""
    kind = KINDS[peft_type]
    adapter, tensors = read_kind(kind, folder, number)
    tensors.pop("")
    roles = {name: role for role, name in TENSORS[kind.name].items()}
    errors = Problems()
    modules = []
    for name, parts in tensors.items():
        with errors.collected():
            kind.from_module(AdaptedModule(adapter, name, parts, {}, None))
            config = adapter.config
            rank, alpha = adapter.rank_and_alpha(name, config["r"], config["alpha"])
            own = {roles[key]: stored(spec) for key, spec in parts.items()}
            modules.append(AdapterModule(LANGUAGE, name, kind.name, own, float(alpha), rank))
    errors.raise_all()
    modules += replaced_values(adapter)
    headers = headers_of(adapter, folder, number)
    return Contents(format.name, (folder,), tuple(modules), config=adapter.config, headers=headers)


def replaced_values(adapter: Adapter, copies: Collection[str] = ()) -> list[AdapterModule]:
    """The fully trained parameters, or those of these names copied from the base, and the trained
    rows."""
    modules = [
        AdapterModule(LANGUAGE, one.module, TOKENS, {"rows": from_spec(one.values)}, 1.0, 1)
        for one in adapter.tokens
    ]
    for name, spec in adapter.replaced.items():
        home, _, leaf = name.rpartition(".")
        kind = COPY if name in copies else VALUE
        modules.append(AdapterModule(LANGUAGE, home, kind, {leaf: from_spec(spec)}, 1.0, 1))
    return modules


def headers_of(adapter: Adapter, folder: Folder, number: int) -> dict[tuple[int, str], str]:
    """The hashes of the headers and configs read from its files."""
    return {
        (number, WEIGHTS): adapter.header_sha256,
        (number, CONFIG): sha256_of_small_file(folder, CONFIG),
    }


def write_kinds(
    contents: Contents, format: Format, kind: str, *, dtype: str | None = None
) -> FormatFile:
    """The adapter of these contents. `Refused` with everything that the type cannot store."""
    errors = Problems(where=contents.folders[0].label, code="AK503")
    own = [m for m in contents.modules if m.kind == kind]
    decomposed = [m.path for m in own if magnitudes(m.parts)]
    if decomposed:
        errors.add(
            f"{len(decomposed)} modules have magnitudes of {kind}: {listed(decomposed)}",
            f"none: PEFT has no DoRA of {kind}",
            FIT_ON_BASE,
        )
    errors += several_components(contents, format)
    errors.raise_all()
    tensors: list[ConvertedTensor] = []
    for module in contents.modules:
        for role, part in module.parts.items():
            if module.kind == kind:
                key, value = f"{PREFIX}{module.name}.{TENSORS[kind][role]}", part
                if role in ("t1", "t2") and len(part.shape) == 3:  # of a Conv1d, with two axes too
                    value = reshaped(part, (*part.shape, 1))
            else:
                assert isinstance(part, StoredTensor)
                key, value = canonical_key(part.spec.key), part
            tensors.append(ConvertedTensor(key, value, dtype or value.dtype, module.path))
    tensors.sort(key=lambda one: (dtypes.SERIAL.index(one.dtype), one.key))
    config = contents.config
    if config.get("peft_type") == kind.upper():
        settings = dict(config)
    else:
        shapes = {m.name: {r: p.shape for r, p in m.parts.items()} for m in own}
        kernels = {m.name: kernel_size(m, contents.architectures) for m in own}
        settings = kind_settings(kind, shapes, {m.name: m.scale for m in own}, kernels)
        settings |= {key: config[key] for key in KEPT if key in config}
    return FormatFile(format, tensors, {"format": "pt"}, contents.modules, settings=settings)


def kernel_size(module: AdapterModule, architectures: Sequence[str]) -> int | None:
    """The size of the kernel flattened into the inputs; None if unknown."""
    if tail_of(module.kind, module.parts) is not None:
        return 1
    kernel = kernel_of(architectures, module.component, module.name)
    return None if kernel is None else math.prod(kernel)


def kind_settings(
    kind: str,
    modules: Mapping[str, Shapes],
    scales: Mapping[str, float],
    kernels: Mapping[str, int | None],  # sizes of flattened kernels, 1 of linear layers
) -> Json:
    """adapter_config.json of a LoHa or LoKr. `Refused` if PEFT makes no such tensors with any
    settings, because it decomposes all modules in one way."""
    settings = {"peft_type": kind.upper(), **COMMON, "target_modules": sorted(modules)}
    cored = {name for name, shapes in modules.items() if "t1" in shapes or "t2" in shapes}
    settings["use_effective_conv2d"] = bool(cored)
    if kind == "lokr":
        settings |= _decomposition(modules, kernels)
    ranks = {name: _rank(shapes) for name, shapes in modules.items()}
    alphas = {name: as_int(ranks[name] * scales[name]) for name in modules}
    numbers = rank_settings(ranks, alphas)
    return settings | {"alpha" if k == "lora_alpha" else k: v for k, v in numbers.items()}


def _rank(shapes: Shapes) -> int:
    """The rank of the factors; for two full matrices, the least with which PEFT makes them full."""
    for role in ("w1_b", "w2_b"):
        if role in shapes:
            return shapes[role][0]
    return math.ceil(max(*shapes["w1"], *shapes["w2"][:2]) / 2)


def _decomposition(modules: Mapping[str, Shapes], kernels: Mapping[str, int | None]) -> Json:
    """decompose_factor and decompose_both with which PEFT makes matrices of these shapes."""
    both = any("w1_a" in shapes for shapes in modules.values())
    _unlike(modules, both).raise_all()
    sizes = {name: _sizes(shapes) for name, shapes in modules.items()}
    firsts = {first for pairs in sizes.values() for first, _ in pairs}
    for likely in LINEAR, KERNELS:
        sets = {n: likely if (k := kernels[n]) is None else (k,) for n in modules}
        for factor in (-1, *range(1, 2 * max(firsts) + 1)):
            if all(_fits(pairs, factor, sets[name]) for name, pairs in sizes.items()):
                settings = {"decompose_both": both, "decompose_factor": factor}
                return settings | {"rank_dropout_scale": False}
    raise Refused(
        f"LoKr of {len(modules)} modules that need different factors: {listed(list(sizes))}",
        expected="one decompose_factor for all modules, as PEFT has it",
        where="--to",
        hint=FIT,
        code="AK301",
    )


def _unlike(modules: Mapping[str, Shapes], both: bool) -> Problems:
    """Refuse matrices that PEFT would store full instead of as factors, or the other way round, and
    products that it computes differently."""
    unlike = {
        "a full w1 next to others of low rank": lambda one: (
            both and "w1" in one and _rank(one) < max(one["w1"]) / 2
        ),
        "a w1 of low rank that PEFT would store in full": lambda one: (
            "w1_a" in one and _rank(one) >= max(first for first, _ in _sizes(one)) / 2
        ),
        "a full w2 that PEFT would factorize": lambda one: (
            "w2" in one and _rank(one) < max(one["w2"][:2]) / 2
        ),
        "a full w2 on a Conv1d, where PEFT's product is no Kronecker product": lambda one: (
            len(one.get("w2", ())) == 3
        ),
    }
    errors = Problems(where="--to", hint=FIT, code="AK301")
    for what, is_unlike in unlike.items():
        if names := [name for name, shapes in modules.items() if is_unlike(shapes)]:
            problem = f"LoKr with {what}, in {len(names)} modules: {listed(names)}"
            errors.add(problem, "shapes that PEFT makes")
    return errors


def _sizes(shapes: Shapes) -> tuple[tuple[int, int], tuple[int, int]]:
    """The two factors of the outputs and of the inputs; a flattened kernel is in the inputs."""
    cored = "t2" in shapes
    one = shapes["w1"] if "w1" in shapes else (shapes["w1_a"][0], shapes["w1_b"][1])
    if "w2" in shapes:
        two = shapes["w2"][:2]
    else:
        two = (shapes["w2_a"][1 if cored else 0], shapes["w2_b"][1])
    return (one[0], two[0]), (one[1], two[1])


def _fits(
    pairs: tuple[tuple[int, int], tuple[int, int]], factor: int, kernels: Iterable[int]
) -> bool:
    """True if PEFT decomposes a module so, with one of these kernels in the second factor of the
    inputs."""
    (out1, out2), (in1, in2) = pairs
    if factorization(out1 * out2, factor) != (out1, out2):
        return False
    return any(
        factorization(in1 * in2 // kernel, factor) == (in1, in2 // kernel)
        for kernel in kernels
        if in2 % kernel == 0
    )


@cache
def factorization(size: int, factor: int) -> tuple[int, int]:
    """The two numbers into which PEFT's LoKr decomposes a size: `factor` and the rest if it
    divides, else the divisors next to each other up to `factor`; -1: to the square root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    first, second = 1, size
    for number in range(2, min(limit, math.isqrt(size)) + 1):
        if size % number == 0:
            first, second = number, size // number
    return first, second
