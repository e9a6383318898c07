"""Trained rows of embeddings, one for each of some tokens, and of the heads tied to them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterkit.core.adapter.keys import token_key
from adapterkit.core.errors import Refused, shown
from adapterkit.runtime.site import Inside, Patch, Site
from adapterkit.runtime.targets import weight_reader
from adapterkit.verbs.shared.targets import tied_modules


class TokensPatch(Patch):
    """Replaces rows of the host's weight (V, d) by trained rows (n, d).

    Embedding: y[ids = indices[i]] = rows[i], times the factor of scaled embeddings. Head:
    logits[..., indices[i]] = x·rows[i] + bias[i]; PEFT drops the bias. The weight is never copied.
    """

    role, replaces = "tokens", True
    indices: Tensor
    slots: Tensor

    def __init__(
        self,
        adapter: str,
        host: nn.Module,
        indices: Sequence[int],
        rows: nn.Parameter,
        *,
        saved: bool = True,  # False: the patch of the embedding to which the host is tied is
    ):
        super().__init__()
        self.adapter, self.rows, self.saved = adapter, rows, saved
        where = rows.device
        self.register_buffer("indices", torch.tensor(indices, device=where))
        if isinstance(host, nn.Embedding):
            # token -> its row; n for tokens without one
            slots = torch.full((host.num_embeddings,), len(indices), device=where)
            slots[self.indices] = torch.arange(len(indices), device=where)
            self.register_buffer("slots", slots)
            # the row of the padding token gets no gradient, as in the embedding itself
            order = {token: row for row, token in enumerate(indices)}
            self.padding = None if host.padding_idx is None else order.get(host.padding_idx)

    def run(self, site: Site | Inside, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        y = site.base(*args, **kwargs)
        if isinstance(site.host, nn.Embedding):
            return self._put_rows(site.host, x, y)
        bias = site.value("bias")
        if bias is not None:
            bias = bias[self.indices].to(x.dtype)
        logits = F.linear(x, self.rows.to(x.dtype), bias).to(y.dtype)
        if type(site.host) is nn.Linear:
            # its output is no view and is saved nowhere; a copy of all logits would be large
            return y.index_copy_(-1, self.indices, logits)
        return y.index_copy(-1, self.indices, logits)

    def _put_rows(self, host: nn.Embedding, ids: Tensor, y: Tensor) -> Tensor:
        count = len(self.rows)
        slots = self.slots[ids]
        rows = self.rows.to(host.weight.dtype)
        if host.max_norm is not None:
            rows = rows.clone()  # torch rescales them in place
        values = F.embedding(
            slots.clamp(max=count - 1), rows, self.padding, host.max_norm, host.norm_type
        )
        factor = getattr(host, "embed_scale", None)
        if factor is not None:
            values = values * (factor.to(values.dtype) if isinstance(factor, Tensor) else factor)
        return torch.where((slots < count)[..., None], values.to(y.dtype), y)

    def clash(self, other: Patch) -> str | None:
        if not isinstance(other, TokensPatch):
            return None
        both = sorted({*self.indices.tolist()} & {*other.indices.tolist()})
        return f"rows of tokens {both}" if both else None

    def merge(self, values: dict[str, Tensor], weight: float) -> None:
        weights = values["weight"]
        weights[self.indices] = self.rows.detach().to(weights.dtype)

    def stored(self, path: str) -> dict[str, Tensor]:
        return {token_key(path): self.rows} if self.saved else {}

    def extra_repr(self) -> str:
        return f"{len(self.indices)} rows"


def token_patches(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    adapter: str,
    rows: Mapping[str, tuple[Sequence[int], Tensor]],  # by module: indices, values
    embedding: str | None,  # the model's input embedding
) -> list[tuple[str, TokensPatch]]:
    """Patches for rows; those of the input embedding are also its tied heads'.

    As in PEFT, a head with the same indices shares them, and with other indices both have their own
    rows; rows of a head alone do not change the embedding. A head gets none if code around it reads
    its weight directly."""
    patches = []
    for path, (indices, values) in rows.items():
        shared = nn.Parameter(values, requires_grad=False)
        patches.append((path, TokensPatch(adapter, modules[path], indices, shared)))
        heads = tied_modules(modules, path) if path == embedding else []
        heads = [head for head in heads if weight_reader(model, modules, head) is None]
        if not set(heads) & set(rows):
            patches += [
                (head, TokensPatch(adapter, modules[head], indices, shared, saved=False))
                for head in heads
            ]
    return patches


def own_rows(
    modules: Mapping[str, nn.Module],
    rows: Mapping[str, tuple[int, ...]],
    embedding: str | None,
    tie: bool,
) -> dict[str, tuple[int, ...]]:
    """The rows without those that a tied head shares with the embedding; `Refused` if tie is set
    and a head has others."""
    if embedding is None or embedding not in rows:
        return dict(rows)
    heads = [path for path in tied_modules(modules, embedding) if path in rows]
    different = [path for path in heads if rows[path] != rows[embedding]]
    if tie and different:
        raise Refused(
            f"rows {rows[different[0]]} of {shown(different[0])} and {rows[embedding]} of the "
            f"embedding that it is tied to",
            expected="the same rows",
            where="LoraConfig: trainable_tokens",
            hint="remove the head's rows, or remove tie",
            code="AK806",
        )
    if different:
        return dict(rows)
    return {path: indices for path, indices in rows.items() if path not in heads}
