"""LoHa and LoKr in PEFT's layout as neutral contents, and back."""

import math
from collections.abc import Sequence

from adapterkit.adapters.formats.capabilities import FIT_ON_BASE
from adapterkit.adapters.formats.modules.names import kernel_of
from adapterkit.adapters.formats.modules.parts import magnitudes, tail_of
from adapterkit.adapters.formats.modules.record import LANGUAGE, AdapterModule, Contents
from adapterkit.adapters.formats.modules.tensors import StoredTensor, reshaped, stored
from adapterkit.adapters.formats.schema import Format
from adapterkit.adapters.formats.write import FormatFile, WrittenTensor
from adapterkit.adapters.kinds.common import AdaptedModule, read_kind
from adapterkit.adapters.kinds.layout import TENSORS, kind_key, kind_settings
from adapterkit.adapters.kinds.loha import LoHa
from adapterkit.adapters.kinds.lokr import LoKr
from adapterkit.core import dtypes
from adapterkit.core.adapter.keys import CONFIG, WEIGHTS, canonical_key
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.hashes import sha256_of_small_file
from adapterkit.core.errors import Problems, listed

KINDS = {"LOHA": LoHa, "LOKR": LoKr}
# of a source's settings, what stays
KEPT = ("base_model_name_or_path", "revision", "task_type")


def read_kinds(format: Format, folder: Folder, peft_type: str, number: int = 0) -> Contents:
    """The contents of an adapter of that type. `Refused` with every key and setting that cannot be
    used."""
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


def replaced_values(adapter: Adapter) -> list[AdapterModule]:
    """The parameters that were trained whole."""
    modules = []
    for name, spec in adapter.replaced.items():
        home, _, leaf = name.rpartition(".")
        modules.append(AdapterModule(LANGUAGE, home, "value", {leaf: stored(spec)}, 1.0, 1))
    return modules


def headers_of(adapter: Adapter, folder: Folder, number: int) -> dict[tuple[int, str], str]:
    """The hashes of what was read of its files."""
    return {
        (number, WEIGHTS): adapter.header_sha256,
        (number, CONFIG): sha256_of_small_file(folder, CONFIG),
    }


def write_kinds(
    contents: Contents, format: Format, kind: str, *, dtype: str | None = None
) -> FormatFile:
    """The adapter of these contents. `Refused` with all that the type cannot hold."""
    errors = Problems(where=contents.folders[0].label, code="AK503")
    own = [m for m in contents.modules if m.kind == kind]
    decomposed = [m.path for m in own if magnitudes(m.parts)]
    if decomposed:
        errors.add(
            f"{len(decomposed)} modules have magnitudes of {kind}: {listed(decomposed)}",
            f"none: PEFT has no DoRA of {kind}",
            FIT_ON_BASE,
        )
    if len(contents.components) > 1:
        errors.add(
            f"the adapter has components {', '.join(contents.components)}",
            f"one: {format.title} is for a single model",
            "give --prefix-only COMPONENT, one after the other",
        )
    Problems(errors).raise_all()
    tensors: list[WrittenTensor] = []
    for module in contents.modules:
        for role, part in module.parts.items():
            if module.kind == kind:
                key, value = kind_key(module.name, kind, role), part
                if role in ("t1", "t2") and len(part.shape) == 3:  # of a Conv1d, with two axes too
                    value = reshaped(part, (*part.shape, 1))
            else:
                assert isinstance(part, StoredTensor)
                key, value = canonical_key(part.spec.key), part
            tensors.append(WrittenTensor(key, value, dtype or value.dtype, module.path))
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
    """The size of the kernel that is flattened in the inputs; None where nothing tells."""
    if tail_of(module.kind, module.parts) is not None:
        return 1
    kernel = kernel_of(architectures, module.component, module.name)
    return None if kernel is None else math.prod(kernel)
