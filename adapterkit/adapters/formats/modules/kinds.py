"""The kinds of deltas: the tensors of each, by their roles."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

FACTORS = "lora"  # plain low-rank factors
EXPERTS = "experts"  # factors for each matrix of a stack
PLAIN = (FACTORS, EXPERTS)
# in PEFT's layout: parameters trained whole, copies of the base's, rows of embeddings, and factors
# of parameters that the file does not identify
VALUE, COPY, TOKENS, PARAMETER = "value", "copy", "tokens", "parameter"
LIMITED = "oft"  # its alpha is no scale, but the limit of a norm
ALPHA = "alpha"  # a role that no part of a module has: the scale times the rank
SHAPE = "shape"  # of a weight that an adapter widens
MAGNITUDES = ("magnitude", "input_magnitude")
SIZED = (FACTORS, "loha", "lokr")  # kinds whose factors have the weight's rows and inputs
CORES = ("mid", "t1", "t2")  # between two factors: parts cannot be separated by rank
# roles that may be vectors or numbers
VECTORS = (*MAGNITUDES, ALPHA, SHAPE, "bias", "rescale", "diff", "diff_b", "weight")


@dataclass(frozen=True)
class DeltaKind:
    """The roles of one kind."""

    required: tuple[tuple[str, ...], ...]  # sets of roles, of which a module has one
    optional: tuple[str, ...] = ()
    # roles with the rank by which alpha is divided, and its axis; none: the delta has no scale
    rank: Mapping[str, int] = field(default_factory=dict)
    scaled: tuple[str, ...] = ()  # can take a factor of the delta: the first that there is
    rows: tuple[str, ...] = ()  # have the module's outputs on the first axis; LoKr's by its sizes
    products: tuple[tuple[str, str], ...] = ()  # the columns of one are the rows of the other

    @property
    def roles(self) -> set[str]:
        """All roles, required and optional."""
        return {role for roles in (*self.required, self.optional) for role in roles}


KINDS = {
    FACTORS: DeltaKind(
        (("a", "b"),),
        ("mid", *MAGNITUDES, "bias", SHAPE, ALPHA),
        rank={"a": 0, "b": 1},
        scaled=("b",),
        rows=("b", "magnitude", "bias"),
        products=(("b", "a"),),
    ),
    "embedding": DeltaKind((("a", "b"),), (ALPHA,)),  # a format's word for such factors
    EXPERTS: DeltaKind((("a", "b"),), (ALPHA,), rank={"a": 1, "b": 2}, scaled=("b",)),
    "loha": DeltaKind(
        (("w1_a", "w1_b", "w2_a", "w2_b"),),
        ("t1", "t2", *MAGNITUDES, ALPHA),
        rank={"w1_b": 0},
        scaled=("w1_a",),
        rows=("w1_a", "w2_a", "magnitude"),
        products=(("w1_a", "w1_b"), ("w2_a", "w2_b")),
    ),
    "lokr": DeltaKind(
        (
            ("w1", "w2"),
            ("w1", "w2_a", "w2_b"),
            ("w1_a", "w1_b", "w2"),
            ("w1_a", "w1_b", "w2_a", "w2_b"),
        ),
        ("t2", *MAGNITUDES, ALPHA),
        rank={"w1_b": 0, "w2_b": 0},
        scaled=("w1", "w1_a"),
    ),
    "oft": DeltaKind((("blocks",),), ("rescale", ALPHA)),
    "full": DeltaKind((("diff",), ("diff_b",)), rows=("diff", "diff_b")),
    "norm": DeltaKind((("diff",),), ("diff_b",)),  # a format's word for the difference of a vector
    "modulation": DeltaKind((("table",),)),  # added to a block's own table of shifts and scales
    VALUE: DeltaKind((("weight",), ("bias",)), rows=("weight", "bias")),
    COPY: DeltaKind((("weight",),)),
    TOKENS: DeltaKind((("rows",),)),
    PARAMETER: DeltaKind((("a", "b"),), ("magnitude", "bias")),
}


def axes_at_least(role: str) -> int:
    """The least number of axes of a role's tensor."""
    return 0 if role in VECTORS else 2


def is_complete(kind: str, roles: Collection[str]) -> bool:
    """True if these roles make a delta of the kind."""
    return any(set(needed) <= set(roles) for needed in KINDS[kind].required)
