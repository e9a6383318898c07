"""Factors of embeddings."""

from torch import Tensor
from torch.nn import functional as F

from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.site import Host, Site


class EmbeddingPatch(FactorsPatch):
    """y + weight·scale·aᵀ[x]·bᵀ: a (r, V), b (D, r), delta (V, D) = (b·a)ᵀ.

    The delta is multiplied by the host's own factor, such as Gemma's `embed_scale`. As in PEFT,
    dropout has no effect on ids. Unlike PEFT, a host's `max_norm` does not rescale a's columns in
    place, and files have no copy of the host's weight: added rows belong to the base, and are
    trained and saved with modules_to_save or trainable_tokens."""

    kind, stored_as, axis = "embedding", "embedding", 1
    takes = ("dora",)

    @classmethod
    def shapes(cls, host: Host, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows, columns = host.weight.shape
        return (rank, rows), (columns, rank)

    def input(self, x: Tensor) -> Tensor:
        return x

    def drop(self, x: Tensor) -> Tensor:
        return x

    def product(self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        host: Host = self.host
        # not `sparse`: a is transposed, and its gradient is dense
        rows = F.embedding(
            x, a.T, padding_idx=host.padding_idx, scale_grad_by_freq=host.scale_grad_by_freq
        )
        update = F.linear(rows, b, bias)
        factor = getattr(host, "embed_scale", None)
        if factor is None:
            return update
        return update * (factor.to(update.dtype) if isinstance(factor, Tensor) else factor)

    def dense(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).T

    def unmergeable(self, site: Site, weight: float) -> str | None:
        if getattr(site.host, "max_norm", None) is not None:
            return "the layer limits the norm of its rows (max_norm)"
        return super().unmergeable(site, weight)
