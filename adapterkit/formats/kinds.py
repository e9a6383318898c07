"""What each kind of delta needs: its roles, its rank, its scale."""

from collections.abc import Collection, Mapping

from adapterkit.formats.record import EXPERTS, FACTORS, RANK_AXES
from adapterkit.formats.tensors import Expression

# sets of roles of which each kind has one, each role a tensor
REQUIRED: dict[str, tuple[frozenset[str], ...]] = {
    FACTORS: (frozenset(("a", "b")),),
    "embedding": (frozenset(("a", "b")),),
    EXPERTS: (frozenset(("a", "b")),),
    "loha": (frozenset(("w1_a", "w1_b", "w2_a", "w2_b")),),
    "lokr": tuple(
        frozenset((*one, *two))
        for one in (("w1",), ("w1_a", "w1_b"))
        for two in (("w2",), ("w2_a", "w2_b"))
    ),
    "oft": (frozenset(("blocks",)),),
    "full": (frozenset(("diff",)), frozenset(("diff_b",))),
    "value": (frozenset(("weight",)), frozenset(("bias",))),
}
# the role with the rank, on its first axis but for experts; without it the scale is 1
RANK = {
    FACTORS: ("a",),
    "embedding": ("a",),
    EXPERTS: ("a",),
    "loha": ("w1_b",),
    "lokr": ("w1_b", "w2_b"),
    "oft": (),
    "full": (),
    "value": (),
}


def is_complete(kind: str, roles: Collection[str]) -> bool:
    """Whether these roles make a delta of the kind."""
    return any(needed <= set(roles) for needed in REQUIRED[kind])


def rank_of(kind: str, parts: Mapping[str, Expression]) -> int | None:
    """The rank by which alpha is divided; None where the delta has no scale."""
    axis = RANK_AXES.get(kind, {}).get("a", 0)
    return next((parts[role].shape[axis] for role in RANK[kind] if role in parts), None)
