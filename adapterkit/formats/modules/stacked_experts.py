"""Numbered modules, such as single experts, that a file holds as one tensor: stacked along a first
axis."""

from collections.abc import Mapping
from dataclasses import replace

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import Refused, shown
from adapterkit.formats.modules.kinds import EXPERTS, FACTORS
from adapterkit.formats.modules.record import AdapterModule
from adapterkit.formats.modules.tensors import Expression, joined, reshaped, zeros
from adapterkit.formats.same_delta import common_scale, padded_to, with_scale


def slices(spec: TensorSpec) -> list[TensorSpec]:
    """The entries of a stored tensor along its first axis, each as a tensor of its own."""
    size = spec.nbytes // spec.shape[0]
    return [
        replace(spec, shape=spec.shape[1:], start=start, stop=start + size)
        for start in range(spec.start, spec.stop, size)
    ]


def unstacked(roles: Mapping[str, TensorSpec]) -> list[dict[str, TensorSpec]] | None:
    """The tensors of each module of a stack, of which all may share one; None where they are no
    stacks of one height."""
    heights = {spec.shape[0] for spec in roles.values()}
    height = max(heights)
    if heights - {1, height} or any(len(spec.shape) < 3 for spec in roles.values()):
        return None
    parts = {role: slices(spec) for role, spec in roles.items()}
    return [{role: own[i % len(own)] for role, own in parts.items()} for i in range(height)]


def stack(
    modules: Mapping[int, AdapterModule],  # by their places
    height: int,
    name: str,  # of the stack, for messages
) -> AdapterModule:
    """One module of kind experts: the largest rank, the commonest scale, zeros where there is no
    module. `Refused` for what has no plain factors of one size."""
    members = dict(sorted(modules.items()))
    last = next(reversed(members.values()))
    is_plain = all(m.kind == FACTORS and set(m.parts) == {"a", "b"} for m in members.values())
    sizes = {(m.parts["b"].shape[0], *m.parts["a"].shape[1:]) for m in members.values() if is_plain}
    if len(sizes) != 1 or max(members) >= height:
        raise Refused(
            f"{len(members)} modules, the last of them {shown(last.path)}",
            expected=f"plain factors of one size, of {height} modules at most, for {shown(name)}",
            where=last.path,
            hint="give the base that the adapter was trained on",
        )
    rank, scale = max(m.rank for m in members.values()), common_scale(members.values())
    own = {i: padded_to(with_scale(m, scale), rank) for i, m in members.items()}
    parts: dict[str, Expression] = {}
    for role in ("a", "b"):
        part = next(iter(own.values())).parts[role]
        none = zeros((1, *part.shape), part.dtype)
        places = [
            reshaped(own[i].parts[role], (1, *part.shape)) if i in own else none
            for i in range(height)
        ]
        parts[role] = joined(places)
    return AdapterModule(last.component, last.name, EXPERTS, parts, scale * rank, rank)
