"""The deltas that a format can store, and the options that help with the others."""

from collections.abc import Iterable

from adapterkit.adapters.formats.modules.kinds import FACTORS, MAGNITUDES, PARAMETER, SHAPE
from adapterkit.adapters.formats.modules.parts import magnitudes
from adapterkit.adapters.formats.modules.record import AdapterModule, Contents
from adapterkit.adapters.formats.schema import ADAPTER_LAYOUT, Format
from adapterkit.core.commands import EXTRACT, ONE_PART
from adapterkit.core.errors import AdapterkitError, Problems, listed

# kinds in PEFT's layout, unless a dialect lists its own
IN_ADAPTER: dict[str, tuple[str, ...]] = {
    FACTORS: ("a", "b", "magnitude", "bias"),
    "embedding": ("a", "b"),
    "experts": ("a", "b"),
    "loha": ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"),
    "lokr": ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"),
    "value": ("weight", "bias"),
}
OF_ONE_TYPE = ("loha", "lokr")  # kinds that are types of adapters in PEFT
# hints
FIT = "give --rank N to make LoRA factors of them"
FIT_ON_BASE = "give --base and --rank N to make LoRA factors of them"
LEAVE_OUT = "give --lossy to leave them out"
OTHER_FORMAT = "choose another format"
MATRIX = f"give the base, so that a router's matrix gets its module; or {OTHER_FORMAT}"


def roles_by_kind(format: Format) -> dict[str, tuple[str, ...]]:
    """The kinds of deltas that a format stores, and the tensors of each."""
    if format.layout == ADAPTER_LAYOUT and not format.kinds:
        return IN_ADAPTER
    return {kind: tuple(roles) for kind, roles in format.kinds.items()}


def kind_of(contents: Contents) -> str | None:
    """The kind of all modules if PEFT has it as a type of adapter; None otherwise."""
    kinds = {m.kind for m in contents.modules if m.kind != "value"}
    kind = next(iter(kinds), None)
    return kind if len(kinds) == 1 and kind in OF_ONE_TYPE else None


def word_of(module: AdapterModule, format: Format) -> str:
    """The format's word for a module's kind; embeddings and norms have words of their own."""
    if module.embedding:
        return "embedding"
    diff = module.parts.get("diff")
    is_vector = module.kind == "full" and diff is not None and len(diff.shape) == 1
    return "norm" if is_vector and "norm" in format.kinds else module.kind


def lacking(module: AdapterModule, format: Format, contents: Contents) -> list[str]:
    """The roles of a module that the format has no keys for, or its kind if the format lacks it."""
    if format.layout == ADAPTER_LAYOUT and not format.kinds:  # else a dialect that lists its own
        return _lacking_in_adapter(module, contents)
    kind = word_of(module, format)
    roles, only = format.kinds.get(kind), format.only.get(kind)
    if roles is None:
        return [kind]
    absent = [role for role in module.parts if role not in roles and role != SHAPE]
    if only is not None and not only.search(module.name):
        absent.append(f"{kind} outside of {only.pattern}")
    if format.alike:
        everywhere = contents.common_roles[module.component, module.kind]
        absent += [role for role in format.alike if role in module.parts and role not in everywhere]
    return absent


def _lacking_in_adapter(module: AdapterModule, contents: Contents) -> list[str]:
    """PEFT's limits: one type for all modules, DoRA for all or none, no cores."""
    if module.kind in OF_ONE_TYPE:
        return magnitudes(module.parts) if kind_of(contents) == module.kind else [module.kind]
    if module.kind != FACTORS:
        return [module.kind] if module.kind in ("oft", "full", "modulation") else []
    roles = [role for role in ("mid", "input_magnitude") if role in module.parts]
    loras = [m for m in contents.modules if m.kind == FACTORS]
    if "magnitude" in module.parts and any("magnitude" not in m.parts for m in loras):
        roles.append("magnitude")
    return roles


def can_be_plain(module: AdapterModule) -> bool:
    """True if standard LoRA factors of a given rank can replace the module's kind."""
    if module.kind == "full":
        return "diff" in module.parts and len(module.parts["diff"].shape) > 1
    return module.kind in (*OF_ONE_TYPE, "oft")


def is_fitted(module: AdapterModule, format: Format, contents: Contents) -> bool:
    """True if `--rank` turns the module into standard LoRA factors that the format stores."""
    absent = set(lacking(module, format, contents)) if module.kind == FACTORS else set()
    return can_be_plain(module) or (bool(absent) and absent <= {"mid", *MAGNITUDES})


def depends_on_base(module: AdapterModule) -> bool:
    """True if the delta depends on the base's weight."""
    return module.kind == "oft" or bool(magnitudes(module.parts))


def is_vector(module: AdapterModule) -> bool:
    """True for the difference of a norm or a bias, which `--lossy` can leave out."""
    return module.kind == "full" and all(len(part.shape) == 1 for part in module.parts.values())


def several_components(contents: Contents, format: Format) -> list[AdapterkitError]:
    """Refuse several components in a format for single models."""
    errors = Problems(where=contents.folders[0].label, hint=ONE_PART, code="AK503")
    if len(contents.components) > 1:
        errors.add(
            f"the adapter has components {', '.join(contents.components)}",
            f"one: {format.title} is for a single model",
        )
    return errors


def hint_for(
    modules: Iterable[AdapterModule],
    format: Format,
    contents: Contents,
    otherwise: str = OTHER_FORMAT,
) -> str:
    """The hint for modules that the format does not store: the options that help."""
    ways: dict[str, None] = {}
    for module in modules:
        if is_fitted(module, format, contents):
            ways[FIT_ON_BASE if depends_on_base(module) else FIT] = None
        else:
            own = MATRIX if module.kind == PARAMETER else otherwise
            ways[LEAVE_OUT if is_vector(module) else own] = None
    if FIT_ON_BASE in ways:  # which is more
        ways.pop(FIT, None)
    return "; ".join(ways)


def refused_by_name(format: Format, keys: Iterable[str], where: str) -> list[AdapterkitError]:
    """Refuse the kinds of deltas that no format stores, by their names."""
    keys, errors = list(keys), Problems(where=where, hint=EXTRACT, code="AK503")
    for name, regex in format.refused.items():
        if some := list(filter(regex.search, keys)):
            expected = f"kinds of deltas that can be converted: {', '.join(format.kinds)}"
            errors.add(f"{name}: {listed(some)}", expected)
    return errors
