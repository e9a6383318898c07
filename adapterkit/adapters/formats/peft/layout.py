"""PEFT's layout to neutral contents and back; `core/adapter/` has its names and settings."""

from collections import Counter
from dataclasses import replace

from adapterkit.adapters.formats.base_model import NamedBase
from adapterkit.adapters.formats.capabilities import (
    FIT_ON_BASE,
    hint_for,
    kind_of,
    several_components,
)
from adapterkit.adapters.formats.library import formats
from adapterkit.adapters.formats.modules.kinds import (
    COPY,
    EXPERTS,
    FACTORS,
    PARAMETER,
    TOKENS,
    VALUE,
)
from adapterkit.adapters.formats.modules.parts import magnitude_in_file, misfits
from adapterkit.adapters.formats.modules.record import LANGUAGE, AdapterModule, Contents, Modules
from adapterkit.adapters.formats.modules.tensors import (
    DecodedTensor,
    Expression,
    StoredTensor,
    flat,
    from_spec,
    zeros,
)
from adapterkit.adapters.formats.modules.wide_inputs import with_widths
from adapterkit.adapters.formats.peft.eight_bits import decoded, notes_on
from adapterkit.adapters.formats.peft.expert_order import (
    in_order_of_peft,
    order_of,
    order_problem,
    with_given,
)
from adapterkit.adapters.formats.peft.experts import (
    factors_by_module,
    read_stacks,
    stacked_keys,
    stacked_parts,
)
from adapterkit.adapters.formats.peft.kinds import (
    KINDS,
    headers_of,
    read_kinds,
    replaced_values,
    write_kinds,
)
from adapterkit.adapters.formats.schema import Format
from adapterkit.adapters.formats.task import ConvertedTensor
from adapterkit.adapters.formats.write import FormatFile
from adapterkit.core import dtypes
from adapterkit.core.adapter.adapter_config import (
    NO_MODULES,
    PEFT_LAYOUT,
    base_id,
    declared_settings,
)
from adapterkit.core.adapter.config import INCOMPLETE, check_live_config
from adapterkit.core.adapter.keys import CONFIG, canonical_key, part_keys, value_key
from adapterkit.core.adapter.keys import TOKENS as WRAPPER
from adapterkit.core.adapter.peft import read_adapter
from adapterkit.core.adapter.record import Adapter, Lora
from adapterkit.core.checkpoint.fingerprint import METADATA, metadata_with
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.errors import AdapterkitError, Problems, listed, shown
from adapterkit.core.records import Json

# the settings of a source that also apply to other factors
KEPT = (
    "base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "auto_mapping", "bias",
    "modules_to_save",
)  # fmt: skip
# settings of the modules with factors, their ranks and scales
TARGETS = (
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform",
    "layers_pattern", "layer_replication", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
    "use_rslora",
)  # fmt: skip
SHAPED = {PARAMETER: FACTORS}  # kinds whose parts have the shapes of another's
VARIANTS = (*INCOMPLETE, "monteclora_config")  # settings that a plain LoRA does without
# the formats' words -> PEFT's settings
FACTS = {"base": "base_model_name_or_path", "invocation": "alora_invocation_tokens"}


def read_layout(
    format: Format,
    folder: Folder,
    number: int = 0,
    model: NamedBase | None = None,
    expert_layout: str | None = None,
) -> Contents:
    """The contents of an adapter in PEFT's layout. `model`: its base, if known; `expert_layout`:
    the order of its stacks if its config has none. `Refused` with every unusable key and setting.
    """
    peft_type = read_json(folder, CONFIG).get("peft_type") if CONFIG in folder.files() else None
    if peft_type in KINDS:
        return read_kinds(format, folder, peft_type, number)
    stored, axis = decoded, None
    if format.adapter.stacks == "axis":
        from adapterkit.adapters.formats.peft.axis_stacks import AxisStacks

        axis = AxisStacks(None if model is None else model.experts)
        stored = axis.stored
    check = lambda config, where: check_live_config(config | dict.fromkeys(INCOMPLETE), where)
    adapter = read_adapter(folder, number, check, as_stored=stored)
    config, targets = adapter.config, adapter.config.get("target_parameters")
    if targets or expert_layout or order_of(config) is not None:
        adapter = replace(adapter, config=with_given(config, expert_layout))
        if order_of(adapter.config) is None and (error := order_problem(adapter)) is not None:
            raise error
        config = in_order_of_peft(adapter.config, folder)
    modules: list[AdapterModule] = []
    nested = targets or any(lora.depth for lora in adapter.loras)
    by_module = factors_by_module(adapter) if nested else {}
    for lora in adapter.loras:
        if axis is not None and (own := axis.module(adapter, lora)) is not None:
            modules.append(own)
        elif lora.module not in by_module:
            modules.append(_module(adapter, lora, FACTORS))
        elif lora is by_module[lora.module][0]:
            own = by_module[lora.module]
            known = read_stacks(adapter, lora.module, own, format.adapter, model)
            if known is None:
                known = [_module(adapter, one, PARAMETER) for one in own]
            modules += known
    if any(map(config.get, VARIANTS)):
        from adapterkit.adapters.formats.peft.variants import completed

        modules, config = completed(modules, config, adapter.where)
    Problems(
        error
        for module in modules
        for error in misfits(
            shown(module.path), SHAPED.get(module.kind, module.kind), module.parts, folder.label
        )
    ).raise_all()
    if axis is not None:
        modules = axis.ordered(modules, folder.label)
    return Contents(
        format.name,
        (folder,),
        (*modules, *replaced_values(adapter, copies=adapter.copies)),
        metadata={METADATA: adapter.base_fingerprint} if adapter.base_fingerprint else {},
        config=config,
        facts={"base": base_id(adapter), "invocation": config.get("alora_invocation_tokens")},
        headers=headers_of(adapter, folder, number),
        notes=notes_on(adapter.tensors),
    )


def _module(adapter: Adapter, lora: Lora, kind: str) -> AdapterModule:
    name, config = adapter.pattern_name(lora), adapter.config
    rank, alpha = adapter.rank_and_alpha(name, config["r"], config["lora_alpha"])
    if config.get("use_rslora"):
        alpha = adapter.scale(rank, alpha) * rank
    parts: dict[str, Expression] = {"a": from_spec(lora.a), "b": from_spec(lora.b)}
    if lora.magnitude is not None:
        parts["magnitude"] = flat(from_spec(lora.magnitude))
    if lora.bias is not None:
        parts["bias"] = from_spec(lora.bias)
    embedding = lora.kind == "embedding"
    return AdapterModule(
        LANGUAGE, lora.module, kind, parts, float(alpha), rank, embedding, lora.depth
    )


def write_layout(
    contents: Contents,
    format: Format,
    *,
    dtype: str | None = None,
    model: NamedBase | None = None,
    rebuilt: bool = False,
    values: bool = False,
) -> FormatFile:
    """The adapter of these contents in PEFT's layout. `model`: its base, if known; `rebuilt`: its
    modules are not the source's; `values`: fully trained ones are the base's own. `Refused` with
    everything that the layout cannot store."""
    modules = with_widths(contents.modules, format, contents.architectures)
    contents = replace(contents, modules=modules)
    kind = kind_of(contents)
    if kind is not None:
        return write_kinds(contents, format, kind, dtype=dtype)
    Problems(_problems(contents, format, values=values)).raise_all()
    loras = [m for m in contents.modules if m.kind in (FACTORS, PARAMETER)]
    experts = [m for m in contents.modules if m.kind == EXPERTS]
    is_flat = format.adapter.stacks == "rows"
    by_module = Counter(m.name.rpartition(".")[0] for m in experts if is_flat)
    levels = Counter(m.name for m in loras) | by_module
    stack_keys = stacked_keys(experts, by_module) if is_flat else {}
    has_bias = any("bias" in m.parts for m in loras)
    tensors: list[ConvertedTensor] = []
    for module in contents.modules:
        if module.kind == EXPERTS and not is_flat:
            keys, parts = part_keys(module.name), module.parts
        elif module.kind == EXPERTS:
            keys = stack_keys[module.name]
            parts = stacked_parts(module, format.adapter, model)
        elif module.kind not in (FACTORS, PARAMETER):
            for role, part in module.parts.items():
                key = value_key(f"{module.name}.{role}")
                if contents.config.get("peft_type") and isinstance(
                    part, StoredTensor | DecodedTensor
                ):
                    key = _canonical(part.spec.key)
                tensors.append(ConvertedTensor(key, part, part.dtype, module.path))
            continue
        else:
            kind = "embedding" if module.embedding else "module"
            keys = part_keys(module.name, kind, levels, module.depth)
            parts = dict(module.parts)
            if has_bias and "bias" not in parts:
                parts["bias"] = zeros((module.out,), parts["b"].dtype)
            if "magnitude" in parts:
                parts["magnitude"] = magnitude_in_file(module, "magnitude", column=False)
        tensors += [
            ConvertedTensor(keys[role], part, dtype or part.dtype, module.path)
            for role, part in parts.items()
        ]
    tensors.sort(key=lambda one: (dtypes.SERIAL.index(one.dtype), one.key))
    settings = _settings(contents, format, loras, experts, rebuilt)
    metadata = metadata_with(contents.metadata.get(METADATA))
    return FormatFile(format, tensors, metadata, contents.modules, settings=settings)


def _canonical(key: str) -> str:
    """A key of a trained value or of rows as in a LoRA's file, where the wrappers differ."""
    path, _, leaf = canonical_key(key).replace(".ln_tuning_layers.", ".").rpartition(".")
    is_bare = leaf == "trainable_tokens_delta" and not path.endswith(WRAPPER)
    return f"{path}{WRAPPER * is_bare}.{leaf}"


def _problems(contents: Contents, format: Format, *, values: bool) -> list[AdapterkitError]:
    """Refuse contents that the layout cannot store."""
    errors = Problems(code="AK503")
    where = contents.folders[0].label
    is_own = bool(contents.config.get("peft_type"))
    known = (FACTORS, EXPERTS, *((PARAMETER, VALUE, COPY, TOKENS) if is_own else ()))
    known = (*known, VALUE) if values else known
    roles = ("mid", "input_magnitude")
    others = [
        m for m in contents.modules if m.kind not in known or any(role in m.parts for role in roles)
    ]
    if others:
        errors.add(
            f"{format.title} cannot store {len(others)} modules of other kinds: "
            f"{listed([m.path for m in others])}",
            "low-rank factors",
            hint_for(others, format, contents),
            where=where,
        )
    loras = [m for m in contents.modules if m.kind in (FACTORS, PARAMETER, EXPERTS)]
    plain = [m.path for m in loras if "magnitude" not in m.parts]
    if plain and len(plain) < len(loras):
        errors.add(
            f"the adapter has magnitudes, but none for {listed(plain)}",
            "magnitudes of all modules or none (use_dora)",
            FIT_ON_BASE,
            where=where,
        )
    return errors + several_components(contents, format)


def _settings(
    contents: Contents, format: Format, loras: Modules, experts: Modules, rebuilt: bool
) -> Json:
    """adapter_config.json: the source's own if it has one, with the ranks and scales."""
    own = contents.config if formats()[contents.format].layout == format.layout else {}
    if own and not rebuilt:
        return dict(own)
    ranked = [*loras, *experts]
    kept = {k: contents.config[k] for k in KEPT if k in contents.config}
    facts = contents.facts
    kept |= {key: facts[word] for word, key in FACTS.items() if facts.get(word) is not None}
    kept |= {k: v for k, v in own.items() if k not in TARGETS}
    is_flat = format.adapter.stacks == "rows"
    names = sorted({m.name for m in (loras if is_flat else ranked)})
    if format.adapter.targets == "ends":
        names = sorted({name.rpartition(".")[2] for name in names})
    settings: Json = {
        "target_modules": names if ranked else NO_MODULES,
        "use_dora": any("magnitude" in m.parts for m in loras),
        "lora_bias": any("bias" in m.parts for m in loras),
    }
    if experts and is_flat:
        settings |= {"target_parameters": sorted(m.name for m in experts), "lora_dropout": 0.0}
        settings |= {"peft_version": PEFT_LAYOUT}
    saved = sorted({m.name for m in contents.modules if m.kind == VALUE})
    if saved and not own:
        settings["modules_to_save"] = saved
    settings |= format.adapter.settings
    ranks, alphas = {m.name: m.rank for m in ranked}, {m.name: m.alpha for m in ranked}
    defaults = {"base_model_name_or_path": None, "task_type": None}
    return defaults | declared_settings(ranks, alphas, **kept | settings)
