"""aLoRA (arXiv:2504.12397): factors of a linear layer that act from an invocation sequence on.

Tokens before it, and therefore their cached keys and values, are the base's, bit for bit.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.core.errors import Refused
from adapterkit.runtime.layers.linear import Conv1DPatch, LinearPatch
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.patches.memo import ResultCache
from adapterkit.runtime.site import Args, Kwargs, Site

MEMORY = "_adapterkit_invocations"  # of a cache


@dataclass(frozen=True)
class Memory:
    """Invocation starts and last tokens of a cache."""

    starts: dict[str, Tensor]  # where each aLoRA began to act; (rows,), -1 where it did not
    tail: Tensor  # the last tokens, fewer than the longest sequence has
    length: int  # tokens in the cache


class Invocations:
    """Finds the start of each aLoRA of a model in the tokens of every call.

    A start is the position, counted with the cached tokens, of the sequence's last occurrence in
    the tokens of a call. The cache keeps it: in later calls without the sequence all tokens are
    after the start. A copied cache keeps it; one that is cut before it, or reset, does not.
    """

    def __init__(
        self,
        model: nn.Module,
        acting: Callable[[], Collection[str]],
        rows_of: Callable[[str, int], Sequence[int]],  # of an adapter, in a call with that many
    ):
        self.tokens: dict[str, tuple[int, ...]] = {}
        self.missed = Counter[str]()  # rows without the sequence of an adapter that acts on them
        self.acting, self.rows_of = acting, rows_of
        self.shape = (0, 0)  # rows and tokens of the call
        self._counts: dict[str, tuple[int, ...]] = {}  # acting tokens of each row, from the end
        # those of the last call that records gradients
        self._recorded: dict[str, tuple[int, ...]] = {}
        self._recomputed = self._ambiguous = False
        self._memory: Memory | None = None
        self._rows: tuple[int, ...] | None = None  # those that are meant, of a mixed batch
        self._kept = ResultCache()
        self._hooks = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        )

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def narrowed(self, rows: tuple[int, ...]) -> Iterator[None]:
        """Count for some of the rows."""
        before = self.shape, self._rows
        self._rows = rows if self._rows is None else tuple(self._rows[row] for row in rows)
        self.shape = len(rows), self.shape[1]
        try:
            yield
        finally:
            self.shape, self._rows = before

    def count(self, adapter: str) -> tuple[int, ...]:
        """The number of tokens of each row, from the end, that an adapter acts on.

        With gradient checkpointing a layer runs again in backward: its call is then the one that
        recorded gradients. `Refused` if there were several with different starts."""
        if torch._C._current_graph_task_id() == -1:
            counts = self._counts[adapter]
            return counts if self._rows is None else tuple(counts[row] for row in self._rows)
        self._recomputed = True
        if self._ambiguous:
            raise Refused(
                "several calls before one backward pass, with different invocations",
                expected="one call, or no gradient checkpointing",
                where="aLoRA",
                hint="call backward after each, or switch gradient checkpointing off",
                code="AK806",
            )
        return self._recorded[adapter]

    def last(self, counts: tuple[int, ...], length: int, device: torch.device) -> Tensor:
        """Flags (rows, length) of the last tokens of each row, whose number counts give."""
        return self._kept(_last, counts, length, device)

    def _before(self, model: nn.Module, args: Args, kwargs: Kwargs) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        acting = [name for name in self.tokens if name in self.acting()]
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim != 2:
            self._memory = None
            if not acting:
                return
            raise Refused(
                "no input_ids (rows, tokens) in the call",
                expected="token ids: an aLoRA looks for its invocation sequence in them",
                where="aLoRA",
                hint="give input_ids, or deactivate the adapter",
                code="AK806",
            )
        cache = _cache([*args, *kwargs.values()])
        length = 0 if cache is None else int(cache.get_seq_length())
        memory = _memory(cache, length, ids)
        text = ids if memory is None else torch.cat([memory.tail.to(ids.device), ids], 1)
        first = length - (text.shape[1] - ids.shape[1])  # position of the text's first token
        self.shape = (ids.shape[0], ids.shape[1])
        end, starts, counts = length + ids.shape[1], {}, {}
        for adapter in acting:
            sequence = self._kept(_on_device, self.tokens[adapter], text.device)
            start = last_start(text, sequence)
            start = torch.where(start >= 0, start + first, start)
            if memory is not None and adapter in memory.starts:
                before = memory.starts[adapter].to(start.device)
                start = torch.where((start < 0) & (before < length), before, start)
            starts[adapter] = start
            counts[adapter] = torch.where(start >= 0, (end - start).clamp(max=ids.shape[1]), 0)
        self._record(_numbers(counts))
        for adapter in acting:
            if memory is None or adapter not in memory.starts:  # else its rows were counted before
                own = self.rows_of(adapter, ids.shape[0])
                self.missed[adapter] += sum(not self._counts[adapter][row] for row in own)
        longest = max(map(len, self.tokens.values()))
        self._memory = Memory(starts, text[:, max(0, text.shape[1] - longest + 1) :].clone(), end)
        if cache is not None:
            setattr(cache, MEMORY, self._memory)

    def _record(self, counts: dict[str, tuple[int, ...]]) -> None:
        if torch.is_grad_enabled():
            same = self._recorded == counts
            self._ambiguous = bool(self._recorded) and not self._recomputed and not same
            self._recorded, self._recomputed = counts, False
        self._counts = counts

    def _after(self, model: nn.Module, args: object, kwargs: object, output: object) -> None:
        values = output.values() if isinstance(output, Mapping) else ()
        cache = _cache(values)
        if cache is not None and self._memory is not None:
            setattr(cache, MEMORY, self._memory)  # also of a cache that the call made


def _cache(values: Iterable[Any]) -> Any:
    """The cache of keys and values among these, because its argument's name differs between
    versions of transformers."""
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def _memory(cache: object, length: int, ids: Tensor) -> Memory | None:
    """The memory of a cache of this length, if it fits these rows."""
    memory: Memory | None = getattr(cache, MEMORY, None)
    if memory is None or not length or memory.tail.shape[0] != ids.shape[0]:
        return None
    if memory.length != length:  # cut: its last tokens are not known
        return replace(memory, tail=memory.tail[:, :0])
    return memory


def _last(counts: tuple[int, ...], length: int, device: torch.device) -> Tensor:
    return (torch.arange(length) >= length - torch.tensor(counts)[:, None]).to(device)


def _on_device(tokens: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(tokens, device=device)


def _numbers(counts: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Tensors (rows,) as numbers, with one synchronization of a GPU."""
    table = torch.stack([*counts.values()]).tolist() if counts else []
    return {name: tuple(row) for name, row in zip(counts, table, strict=True)}


def last_start(
    ids: Tensor,  # (rows, tokens)
    sequence: Tensor,  # (n,)
) -> Tensor:  # (rows,)
    """The position of the sequence's last occurrence in each row, -1 without one."""
    rows, length = ids.shape
    if length < len(sequence):
        return torch.full((rows,), -1, device=ids.device)
    windows = ids.unfold(1, len(sequence), 1)
    equal = (windows == sequence).all(-1)
    positions = torch.arange(equal.shape[1], device=ids.device)
    return torch.where(equal, positions, -1).amax(1)


class InvokedPatch(LinearPatch):
    """Factors that act on the last tokens of each row, as many as follow the invocation."""

    mixes_rows = False
    invocations: Invocations

    def forward(self, y: Tensor, weight: float, x: Tensor) -> Tensor:
        rows, length = self.invocations.shape
        count = self.invocations.count(self.adapter)
        if x.ndim == 2:  # (rows * tokens, in), as routers of experts get it
            tokens = x.shape[0] // max(rows, 1)
            if tokens not in (1, length) or tokens * rows != x.shape[0]:
                raise Refused(
                    f"an input of {x.shape[0]} vectors for {rows} rows of {length} tokens",
                    expected="one vector for each token, in order",
                    where="aLoRA",
                    hint="exclude this layer from targets",
                    code="AK806",
                )
            shaped = self.forward(
                y.view(rows, tokens, y.shape[-1]), weight, x.view(rows, tokens, x.shape[-1])
            )
            return shaped.reshape(y.shape[0], -1)
        length = x.shape[1]
        longest = min(max(count, default=0), length)
        if longest == 0:
            return y
        first = length - longest
        tail = y[:, first:]
        changed = super().forward(tail.clone(), weight, x[:, first:])
        if min(count) < longest:
            acts = self.invocations.last(count, longest, x.device)
            changed = torch.where(acts[..., None], changed, tail.to(changed.dtype))
        return torch.cat([y[:, :first].to(changed.dtype), changed], 1) if first else changed

    def unmergeable(self, site: Site, weight: float) -> str | None:
        return "an activated LoRA acts on the tokens after its invocation only"


class InvokedConv1DPatch(InvokedPatch, Conv1DPatch):
    """An `InvokedPatch` on GPT-2's Conv1D."""


INVOKED: dict[type[FactorsPatch], type[InvokedPatch]] = {
    LinearPatch: InvokedPatch,
    Conv1DPatch: InvokedConv1DPatch,
}
