"""VeRA: shared random projections, and two trained vectors per module (arXiv:2310.11454)."""

from dataclasses import dataclass
from typing import ClassVar

from adapterkit.adapters.kinds.common import AdaptedModule, ProductDelta, read_float64
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.commands import EXTRACT
from adapterkit.core.errors import AdapterkitError, Problems
from adapterkit.core.records import FLAG, POSITIVE_INT
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels.lowrank.algebra import Product


@dataclass(frozen=True)
class Vera(ProductDelta):
    """delta = diag(lambda_b) B[:out] @ diag(lambda_d) A[:, :in]; only the base determines `in`."""

    a: TensorSpec  # (r, in of the widest module)
    b: TensorSpec  # (out of the tallest, r)
    lambda_b: TensorSpec  # (out,)
    lambda_d: TensorSpec  # (r,)
    shape: tuple[int, int]

    name = "vera"
    keys = ("vera_lambda_b", "vera_lambda_d")
    shared = ("vera_A", "vera_B")
    settings: ClassVar = {"r": POSITIVE_INT, "save_projection": FLAG}
    unused_settings = frozenset({"d_initial", "projection_prng_key", "vera_dropout"})
    needs_base = "its file does not say how many inputs a module has"

    @staticmethod
    def check(config: dict, where: str) -> list[AdapterkitError]:
        errors = Problems(where=where, code="AK301")
        if not config["save_projection"]:
            errors.add(
                "VeRA without its projections (save_projection false)",
                "them in the file",
                f"train with save_projection=True, or {EXTRACT}",
            )
        return errors

    @staticmethod
    def from_module(adapted: AdaptedModule) -> "Vera":
        assert adapted.weight is not None
        missing = [name for name in Vera.shared if name not in adapted.shared]
        if missing:
            problem = f"no {' and no '.join(missing)}"
            errors = Problems(where=adapted.adapter.label, code="AK301")
            errors.fail(problem, "the shared projections", "save it again")
        a, b = (adapted.shared[name] for name in Vera.shared)
        lambda_b, lambda_d = adapted.require(*Vera.keys)
        out, inputs, rank = (
            lambda_b.shape[0],
            adapted.weight.weight_shape[-1],
            adapted.adapter.config["r"],
        )
        adapted.check(
            (lambda_b.shape, lambda_d.shape) == ((out,), (rank,)),
            f"a vector of outputs and one of {rank}, as r says",
        )
        fits = (
            len(a.shape) == len(b.shape) == 2
            and a.shape[0] == b.shape[1] == rank
            and a.shape[1] >= inputs
            and b.shape[0] >= out
        )
        if not fits:
            expected = f"at least ({rank}, {inputs}) and ({out}, {rank})"
            adapted.fail(
                f"vera_A {a.shape}, vera_B {b.shape}", expected, "check the base and the config"
            )
        return Vera(a, b, lambda_b, lambda_d, (out, inputs))

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.a, self.b, self.lambda_b, self.lambda_d)

    @property
    def trailing_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    def value(self, reader: TensorReader) -> Product:
        a, b, lambda_b, lambda_d = read_float64(reader, *self.reads)
        return Product(
            lambda_b[:, None] * b[: self.shape[0]], lambda_d[:, None] * a[:, : self.shape[1]]
        )
