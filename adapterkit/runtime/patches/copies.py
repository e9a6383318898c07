"""Fully trained values: copies of modules (modules_to_save), biases, and stored weights that differ
from the base's. They act instead of the base's values, which never change."""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.core.adapter.keys import PREFIX
from adapterkit.core.weights.layers import reads_value
from adapterkit.runtime.site import CHILD, Inside, Patch, Site, Values, nothing, set_forward

OUT_PROJ = "out_proj"  # torch's MultiheadAttention reads this child's values itself


class CopyPatch(Patch):
    """A trained copy of a module, which runs in its place (modules_to_save).

    Its values have the dtypes of the module's own. Copies of tied modules are not tied, unless
    `tie` is set."""

    role, replaces = "copy", True

    def __init__(self, adapter: str, module: nn.Module):
        super().__init__()
        self.adapter, self.module = adapter, module
        for each in module.modules():
            # a state dict of the base has nothing for them
            vars(each)["_load_from_state_dict"] = nothing

    def run(self, site: Site | Inside, *args: object, **kwargs: object) -> Any:
        # not by a call: the hooks of the module itself run around its site
        return self.module.forward(*args, **kwargs)

    def own_value(self, name: str) -> Tensor | None:
        return getattr(self.module, name, None)

    def clash(self, other: Patch) -> str | None:
        return None if other.role.startswith("delta") else "a trained copy of the module"

    def merge(self, values: dict[str, Tensor], weight: float) -> None:
        for name, value in self.values():
            values[name] = widened(value)

    def unmergeable(self, site: Site, weight: float) -> str | None:
        host = site.host
        plain = {name for name, _ in host.named_parameters(remove_duplicate=False)}
        plain |= {name for name, _ in host.named_buffers(remove_duplicate=False)}
        if all(name in plain for name, _ in self.values()):
            return None
        return "its values are packed"

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Its parameters and buffers by name, as the module's state dict has them."""
        yield from self.module.state_dict(keep_vars=True).items()

    def stored(self, path: str) -> dict[str, Tensor]:
        return {f"{PREFIX}{path}.{name}": value for name, value in self.values()}


class ValuePatch(Patch):
    """A value that replaces one parameter of the host: a trained bias, or the weight that the
    adapter's base had.

    `leaf`: the parameter's name in the host; the value's name ends with it, because optimizers
    exclude biases from decay by name. PEFT trains the base's own biases, so its `disable_adapter`
    does not restore them."""

    replaces = True

    def __init__(
        self,
        adapter: str,
        leaf: str,
        value: nn.Parameter,
        *,
        trained: bool = True,
        saved: bool = True,  # False: another patch of the adapter with this value is
    ):
        super().__init__()
        self.adapter, self.leaf, self.saved = adapter, leaf, saved
        self.role = f"weight.{leaf}"
        self.name = "bias" if leaf.endswith("bias") else "weight"
        self.register_parameter(self.name, value)
        if not trained:
            self.fix(self.name)

    @property
    def value(self) -> nn.Parameter:
        return self.get_parameter(self.name)

    def change(self, values: Values, weight: float) -> None:
        values[self.leaf] = self.value

    def clash(self, other: Patch) -> str | None:
        if not isinstance(other, ValuePatch) or other.leaf != self.leaf:
            return None
        # weights of one base are in the files of all adapters that were trained on it
        same = self.value.shape == other.value.shape and torch.equal(self.value, other.value)
        return None if same else f"a {self.leaf} of their own"

    def covers(self, other: Patch) -> bool:
        if other.replaces or not self.leaf.endswith("bias"):
            return not other.replaces
        return getattr(other, "bias", None) is not None

    def merge(self, values: dict[str, Tensor], weight: float) -> None:
        values[self.leaf] = widened(self.value)

    def stored(self, path: str) -> dict[str, Tensor]:
        name = f"{path}.{self.leaf}" if path else self.leaf
        return {f"{PREFIX}{name}": self.value} if self.saved else {}


class MirrorPatch(ValuePatch):
    """A value of a trained copy, read by code around the module; the `CopyPatch` saves and merges
    it."""

    def __init__(self, adapter: str, leaf: str, value: nn.Parameter):
        super().__init__(adapter, leaf, value, saved=False)

    def merge(self, values: dict[str, Tensor], weight: float) -> None:
        return


def widened(value: Tensor) -> Tensor:
    """A new tensor; floats in float32 or wider."""
    if not value.is_floating_point():
        return value.clone()
    return value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)


def bare_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a module, without the adapters on it and inside it.

    Objects in the memo are shared. Hooks inside stay the same objects."""
    hosts = [host for host in module.modules() if isinstance(host._modules.get(CHILD), Site)]
    for host in hosts:
        site = host._modules[CHILD]
        assert isinstance(site, Site)
        memo[id(site)] = None
        memo.update((id(vars(host)[slot]), None) for slot in site.forward_slots())
    for each in module.modules():
        for hooks in (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks):
            memo.update((id(hook), hook) for hook in hooks.values())
    twin = copy.deepcopy(module, memo)
    for host in hosts:
        site, its_twin = host._modules[CHILD], memo[id(host)]
        assert isinstance(site, Site)
        its_twin._modules = {name: m for name, m in its_twin._modules.items() if name != CHILD}
        set_forward(its_twin, site.forward_slots(), copy.deepcopy(site.own_forward, memo))
    return twin


def mirrors(
    modules: Mapping[str, nn.Module], patches: Iterable[tuple[str, Patch]]
) -> list[tuple[str, MirrorPatch]]:
    """Patches for the values of copies that code around their modules reads."""
    return [
        (host, MirrorPatch(patch.adapter, leaf, value))
        for path, patch in patches
        if isinstance(patch, CopyPatch)
        for name, value in patch.module.named_parameters()
        for host, leaf in [reader(modules, f"{path}.{name}")]
        if not host.startswith(path)
    ]


def outermost(name: str, entries: Iterable[str]) -> str | None:
    """The outermost module around a parameter that an entry of modules_to_save matches as in PEFT:
    by the end of the name, also within a component."""
    parts = name.split(".")
    paths = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((path for path in paths if any(map(path.endswith, entries))), None)


def entries_for_peft(
    entries: Iterable[str], paths: Collection[str], modules: Iterable[str]
) -> list[str]:
    """Names that match only these modules in PEFT, which matches any end of a name: the entries if
    they do, otherwise the paths."""
    entries = list(entries)
    meant = {path for path in modules if any(map(path.endswith, entries))}
    return entries if meant == set(paths) else sorted(paths)


def reader(modules: Mapping[str, nn.Module], name: str) -> tuple[str, str]:
    """The outermost module whose forward reads a parameter, usually its own, and the parameter's
    name in it."""
    parts = name.split(".")
    owner = type(modules[name.rpartition(".")[0]]).__mro__
    for i in range(len(parts) - 1):
        host, inside = ".".join(parts[:i]), parts[i:]
        # generate asks a whole model's forward for its arguments
        if host in modules and not (host == "" and hasattr(modules[host], "config")):
            attributes = tuple(patch for patch in inside if not patch.isdecimal())
            around = type(modules[host]).__mro__
            if len(attributes) > 1 and reads_value(around, attributes, owner):
                return host, ".".join(inside)
    return ".".join(parts[:-1]), parts[-1]


def value_patches(
    modules: Mapping[str, nn.Module],
    adapter: str,
    values: Mapping[str, Tensor],  # by the parameters' names; of a shared one the last counts
    *,
    trained: bool,
    copied: Iterable[str] = (),  # modules that copies replace
) -> list[tuple[str, ValuePatch]]:
    """Patches for values that replace parameters: one for each use of a shared parameter."""
    by_id: dict[int, nn.Parameter] = {}
    by_name: dict[str, nn.Parameter] = {}
    for name, value in values.items():
        key = id(parameter_of(modules, name))
        other = by_id.get(key)
        if other is None or not torch.equal(other, value):
            other = nn.Parameter(value, requires_grad=False)
        by_id.setdefault(key, other)
        by_name[name] = other
    patches = []
    first = {id(module): path for path, module in reversed(list(modules.items()))}
    for path, module in modules.items():
        if first[id(module)] != path:
            continue  # another name of the same module
        for leaf, parameter in module._parameters.items():
            name = f"{path}.{leaf}".removeprefix(".")
            value = by_name.get(name, by_id.get(id(parameter)))
            if value is None or any(name.startswith(f"{copy}.") for copy in copied):
                continue
            host, leaf = reader(modules, name)
            patch = ValuePatch(adapter, leaf, value, trained=trained, saved=name in values)
            patches.append((host, patch))
    return patches


def parameter_of(modules: Mapping[str, nn.Module], name: str) -> nn.Parameter | None:
    """The model's parameter of that name, or None."""
    path, _, leaf = name.rpartition(".")
    return modules[path]._parameters.get(leaf) if path in modules else None


def known_parameter(modules: Mapping[str, nn.Module], name: str) -> nn.Parameter:
    """A parameter that the model is known to have."""
    parameter = parameter_of(modules, name)
    assert parameter is not None
    return parameter


def biases(modules: Mapping[str, nn.Module], paths: Iterable[str] | None) -> list[str]:
    """Names of the biases of all modules, or of those at the paths."""
    names = [
        f"{path}.bias".removeprefix(".")
        for path, module in modules.items()
        if module._parameters.get("bias") is not None
    ]
    if paths is None:
        return names
    chosen = set(paths)
    for path in list(chosen):
        if isinstance(modules[path], nn.MultiheadAttention):
            chosen.add(f"{path}.{OUT_PROJ}")
    return [name for name in names if name.rpartition(".")[0] in chosen]
