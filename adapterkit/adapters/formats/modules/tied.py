"""Factors of embeddings in tools whose model has one layer for embeddings and head. If the base
ties the two, such factors act in both, but PEFT's act in the embeddings alone."""

import math
from dataclasses import replace

from adapterkit.adapters.formats.base_model import HEAD, BaseFacts
from adapterkit.adapters.formats.modules.record import AdapterModule, Modules
from adapterkit.adapters.formats.modules.tensors import are_equal, transposed
from adapterkit.adapters.formats.schema import Format
from adapterkit.core.errors import Refused, listed
from adapterkit.core.weights.reader import TensorReader

SWAPPED = {"a": "b", "b": "a"}


def with_heads(
    modules: Modules, format: Format, tied: bool | None
) -> tuple[list[AdapterModule], list[str]]:
    """The modules of a file, and the factors of a tied head next to those of the embeddings. A note
    says if no base shows whether they are tied (`tied` None)."""
    embeddings = [m for m in modules if m.embedding]
    if not embeddings or tied is False:
        return list(modules), []
    if tied is None:
        return list(modules), [_unknown_tying(embeddings, format)]
    return [*modules, *(_head(module) for module in embeddings)], []


def without_heads(
    modules: Modules, format: Format, base: BaseFacts | None, reader: TensorReader
) -> tuple[list[AdapterModule], list[str]]:
    """The modules without a tied head's factors that equal those of the embeddings. `Refused` if
    only one of the two is adapted, or each differently."""
    embeddings = [m for m in modules if m.embedding]
    heads = [m for m in modules if m.name == HEAD]
    if base is None:
        return list(modules), [_unknown_tying(embeddings, format)] if embeddings else []
    if not base.tied or not (embeddings or heads):
        return list(modules), []
    pairs = list(zip(embeddings, heads, strict=False))
    if len(embeddings) != len(heads) or not all(_is_head_of(a, b, reader) for a, b in pairs):
        own = [*embeddings, *heads]
        raise Refused(
            f"{listed([m.path for m in own])} have factors of their own, but the base has one "
            "weight for embeddings and head",
            expected="the same factors of both, or of neither, because programs that read "
            f"{format.title} apply those of the embeddings in the head, too",
            where="--base",
            hint="merge the adapter into its base instead",
            code="AK403",
        )
    return [m for m in modules if m.name != HEAD], []


def _unknown_tying(embeddings: Modules, format: Format) -> str:
    return (
        f"{listed([m.path for m in embeddings])}: programs that read {format.title} apply it in "
        "the head, too, if the base ties the two; give --base to find out"
    )


def _head(embedding: AdapterModule) -> AdapterModule:
    """delta = (b @ a)ᵀ of the embeddings as aᵀ @ bᵀ of the head."""
    parts = {role: transposed(embedding.parts[other]) for role, other in SWAPPED.items()}
    return replace(embedding, name=HEAD, parts=parts, embedding=False)


def _is_head_of(embedding: AdapterModule, head: AdapterModule, reader: TensorReader) -> bool:
    own = _head(embedding)
    return (
        set(head.parts) == set(own.parts)
        and math.isclose(own.scale, head.scale, rel_tol=1e-12)
        and all(are_equal([own.parts[role], head.parts[role]], reader) for role in own.parts)
    )
