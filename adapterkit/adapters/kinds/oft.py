"""OFT: block-wise rotation of the inputs of a weight (arXiv:2306.07280, 2311.06243)."""

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from adapterkit.adapters.kinds.common import AdaptedModule
from adapterkit.adapters.kinds.rows import RowChange, RowDelta
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.commands import EXTRACT
from adapterkit.core.errors import AdapterkitError, Problems, shown
from adapterkit.core.lazy import torch
from adapterkit.core.records import FINITE, FLAG, NON_NEGATIVE_INT, POSITIVE_INT
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels import rotations

ROTATION, EMBEDDING = "oft_R", "oft_embedding_R"


@dataclass(frozen=True)
class Oft(RowDelta):
    """delta = W (Rᵀ - I) for a layer, (Rᵀ - I) W for an embedding, whose weight is transposed here.

    R is block-diagonal; a block is the Cayley transform (I - Q) (I + Q)⁻¹ of a skew-symmetric
    matrix Q, or some terms of its Neumann series. With `coft`, Q is first projected to within
    eps / sqrt(blocks) of zero.
    """

    # (blocks, size * (size - 1) / 2), upper triangles; one row where all blocks share it
    rotation: TensorSpec
    weight: StoredParameter
    size: int
    terms: int | None  # of the Neumann series; None: the exact inverse
    eps: float | None  # of COFT
    embedding: bool

    name = "oft"
    keys = (ROTATION, EMBEDDING)
    settings: ClassVar = {
        "r": NON_NEGATIVE_INT, "oft_block_size": NON_NEGATIVE_INT, "coft": FLAG, "eps": FINITE,
        "block_share": FLAG, "use_cayley_neumann": FLAG, "num_cayley_neumann_terms": POSITIVE_INT,
    }  # fmt: skip
    unused_settings = frozenset()
    needs_base = "it rotates the base's weights"
    merges_rows = True

    @staticmethod
    def check(config: dict, where: str) -> list[AdapterkitError]:
        version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version")))
        is_known = version is not None and (int(version[1]), int(version[2])) >= (0, 18)
        errors = Problems(where=where, code="AK301")
        if config["use_cayley_neumann"] and not is_known:
            errors.add(
                f"use_cayley_neumann, and peft_version {shown(config.get('peft_version'))}",
                "0.18 or later: the series was another before",
                EXTRACT,
            )
        return errors

    @staticmethod
    def from_module(adapted: AdaptedModule) -> "Oft":
        assert adapted.weight is not None
        config, shape = adapted.adapter.config, adapted.weight.weight_shape
        embedding = EMBEDDING in adapted.parts
        (rotation,) = adapted.require(EMBEDDING if embedding else ROTATION)
        if math.prod(shape[2:]) != 1:
            reason = "OFT of a kernel larger than 1: what PEFT computes with it is no convolution"
            adapted.fail(
                reason,
                "linear layers, embeddings, kernels of size 1",
                "leave the module out of the adapter",
            )
        width = shape[0] if embedding else math.prod(shape[1:])
        size = _size(rotation)
        rows = 1 if config["block_share"] else width // max(size, 1)
        fits = size > 0 and width % size == 0 and rotation.shape[0] == rows
        adapted.check(
            fits,
            f"the upper triangles of {'one block' if config['block_share'] else 'blocks'} that "
            f"tile {width} inputs",
        )
        terms = config["num_cayley_neumann_terms"] if config["use_cayley_neumann"] else None
        return Oft(
            rotation,
            adapted.weight,
            size,
            terms,
            config["eps"] if config["coft"] else None,
            embedding,
        )

    @property
    def turned(self) -> bool:
        return self.embedding

    def change(self, reader: TensorReader, dtype: "torch.dtype") -> RowChange:
        q = rotations.skew(reader.tensor(self.rotation).double(), self.size, self.eps)
        turn = rotations.less_identity(q, self.terms).to(dtype)
        turn = turn if self.embedding else turn.mT
        return lambda rows, here: rotations.rotated(rows, turn)


def _size(rotation: TensorSpec) -> int:
    """The block size, from the number of elements above the diagonal; 0 if none fits."""
    count = rotation.shape[1] if len(rotation.shape) == 2 else -1
    size = (1 + math.isqrt(1 + 8 * count)) // 2 if count > 0 else 0
    return size if size * (size - 1) // 2 == count else 0
