"""Factors of a source against the weights of the base that it is said to be for."""

import math
from collections.abc import Iterator

from adapterkit import dtypes
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Problems, shown
from adapterkit.formats.base import NamedBase
from adapterkit.formats.library import architectures
from adapterkit.formats.modules.kinds import FACTORS, PARAMETER
from adapterkit.formats.modules.record import AdapterModule, Contents


def shape_problems(contents: Contents, base: Checkpoint | None) -> list[AdapterkitError]:
    """Refusals of factors whose product has another shape than the base's weight of that name.

    Quantized weights are not compared, nor layers that control adapters widen.
    """
    if base is None:
        return []
    wide = set(_widened(contents))
    errors = Problems(where=base.folder.label)
    for module in contents.modules:
        spec = base.tensors.get(f"{module.name}.weight")
        if module.kind != FACTORS or spec is None or module.name in wide:
            continue
        if spec.dtype in dtypes.FLOATS and not _fits(module, spec.shape):
            a, b = module.parts["a"].shape, module.parts["b"].shape
            errors.add(
                f"{shown(module.path)}: factors of shapes {a} and {b}",
                f"those of the base's weight {spec.shape}",
                "give the base that it was trained on, with layers of the same kinds",
            )
    return errors


def parameter_problems(contents: Contents, model: NamedBase | None) -> list[AdapterkitError]:
    """Refusals of factors that are of no parameter of the model that target_parameters names."""
    if model is None:
        return []
    targets = tuple(contents.config.get("target_parameters") or ())
    errors = Problems(where=model.checkpoint.folder.label)
    for module in contents.modules:
        if module.kind != PARAMETER:
            continue
        names = (f"{module.name}.{leaf}" for leaf in model.names.children(module.name) or ())
        parameters = [model.names.parameter(name) for name in names if name.endswith(targets)]
        shapes = [one.shape for one in parameters if one is not None]
        a, b = module.parts["a"].shape, module.parts["b"].shape
        matrix = sorted((*a[1:], *b[:1], *b[2:]))  # either way round
        if not any(sorted(shape[-2:]) == matrix for shape in shapes):
            known = f"those of {' or '.join(map(str, shapes))}" if shapes else "no such factors"
            errors.add(
                f"{shown(module.path)}: factors of shapes {a} and {b} for a parameter",
                f"{known}: the base's parameters that target_parameters names",
                "give the base that it was trained on, with layers of the same kinds",
            )
    return errors


def _fits(module: AdapterModule, shape: tuple[int, ...]) -> bool:
    """Whether a (r, in, *kernel) and b (out, r) make a weight of that shape, or of its transpose:
    GPT-2 stores linear layers so, and embeddings are."""
    rows, columns = module.parts["b"].shape[0], module.parts["a"].shape[1:]
    if "mid" in module.parts:  # which has the kernel
        columns = (columns[0], *module.parts["mid"].shape[2:])
    if shape == (rows, *columns):
        return True
    is_flat = len(shape) == 2 and len(columns) >= 1
    return is_flat and shape == (math.prod(columns), rows)


def _widened(contents: Contents) -> Iterator[str]:
    """Modules that have more inputs where the adapter is for control images."""
    for name in contents.architectures:
        for words in architectures()[name].components.values():
            yield from words.inputs
