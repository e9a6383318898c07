"""The tensors of a module: consistent shapes, the rank, the shape of the delta."""

import math
from collections.abc import Collection, Mapping

from adapterkit.adapters.formats.modules.kinds import CORES, EXPERTS, FACTORS, KINDS, MAGNITUDES
from adapterkit.adapters.formats.modules.record import AdapterModule
from adapterkit.adapters.formats.modules.tensors import Expression, flat, reshaped, without_reshape
from adapterkit.core.errors import AdapterkitError, Problems

Parts = Mapping[str, Expression]


def rank_of(kind: str, parts: Parts) -> int | None:
    """The rank by which alpha is divided; None if the delta has no scale: a LoKr of two full
    matrices (LyCORIS ignores alpha then), OFT, differences."""
    axes = KINDS[kind].rank.items()
    return next((parts[role].shape[axis] for role, axis in axes if role in parts), None)


def with_magnitudes(parts: Parts, roles: Collection[str]) -> dict[str, Expression]:
    """The parts with norms as vectors; a row (1, in, ...) is that of the inputs if the format has
    such."""
    own = {role: part for role, part in parts.items() if role not in MAGNITUDES}
    for role in magnitudes(parts):
        shape = parts[role].shape
        is_row = len(shape) > 1 and shape[0] == 1 < shape[1] and "input_magnitude" in roles
        own[MAGNITUDES[is_row]] = flat(parts[role])
    return own


def magnitude_in_file(module: AdapterModule, role: str, *, column: bool) -> Expression:
    """Norms in a file's layout: a column (out, 1, ...), or in PEFT a vector, for a convolution (1,
    out, 1, ...); norms of inputs are a row (1, in, ...)."""
    value = module.parts[role]
    trailing_shape = tail_of(module.kind, module.parts)
    axes = 2 if trailing_shape is None else 1 + len(trailing_shape)
    size = max(value.shape)
    if not column:
        return reshaped(value, (1, size, *(1,) * (axes - 2)) if axes > 2 else (size,))
    own = without_reshape(value)
    is_row = role == "input_magnitude"
    if trailing_shape is None and len(own.shape) > 1 and own.shape[is_row] == size:
        return own  # of a flattened kernel: as the source has it
    return reshaped(value, (1, size, *(1,) * (axes - 2)) if is_row else (size, *(1,) * (axes - 1)))


def scaled_role(module: AdapterModule) -> str:
    """The role that takes a factor of the delta; "" if the kind has no scale."""
    return next((role for role in KINDS[module.kind].scaled if role in module.parts), "")


def cores(parts: Parts) -> list[str]:
    """The roles of tensors between two factors."""
    return [role for role in CORES if role in parts]


def magnitudes(parts: Parts) -> list[str]:
    """The roles of norms: of the weight's outputs, or of its inputs."""
    return [role for role in MAGNITUDES if role in parts]


def misfits(name: str, kind: str, parts: Parts, where: str) -> list[AdapterkitError]:
    """Refuse parts whose shapes do not fit each other."""
    errors = Problems(where=where, code="AK302")
    if expected := _expected_shapes(kind, parts):
        shapes = ", ".join(f"{role} {part.shape}" for role, part in sorted(parts.items()))
        errors.add(f"{name}: {shapes}", expected, "save the adapter again")
    return errors


def _expected_shapes(kind: str, parts: Parts) -> str:
    """The shapes that a module's parts should have; "" if they fit each other."""
    shapes = {role: part.shape for role, part in parts.items()}
    checks = {
        FACTORS: _lora,
        EXPERTS: _experts,
        "loha": _loha,
        "lokr": _lokr,
        "oft": _oft,
        "full": _full,
    }
    problem, norms = checks[kind](shapes) if kind in checks else "", magnitudes(parts)
    if problem or not norms:
        return problem
    trailing_shape = tail_of(kind, parts)
    sizes = {
        "magnitude": matrix_shape(kind, parts)[0],
        "input_magnitude": trailing_shape and trailing_shape[0],
    }
    for role in norms:
        if sizes[role] is not None and shapes[role] != (sizes[role],):
            return f"one norm for each {'output' if role == 'magnitude' else 'input'}"
    return ""


Shapes = Mapping[str, tuple[int, ...]]


def _lora(shapes: Shapes) -> str:
    a, b = shapes["a"], shapes["b"]
    inner = shapes["mid"][:2] if "mid" in shapes else (a[0], a[0])
    fits = len(a) >= 2 and len(b) >= 2 and inner == (b[1], a[0]) and set(b[2:]) <= {1}
    if "bias" in shapes and shapes["bias"] != b[:1]:
        return "a bias for each output"
    return "" if fits else "a (r, in) and b (out, r)"


def _experts(shapes: Shapes) -> str:
    a, b = shapes["a"], shapes["b"]
    fits = len(a) == len(b) == 3 and (a[0], a[1]) == (b[0], b[2])
    return "" if fits else "a (experts, r, in) and b (experts, out, r)"


def _loha(shapes: Shapes) -> str:
    if ("t1" in shapes) != ("t2" in shapes):
        return "both cores, t1 and t2"
    for one, two in (("w1_a", "w2_a"), ("w1_b", "w2_b"), ("t1", "t2")):
        if len(shapes.get(one, (1, 1))) < 2 or len(shapes.get(two, (1, 1))) < 2:
            return f"{one} and {two} matrices"
    out = {shapes[role][1 if "t1" in shapes else 0] for role in ("w1_a", "w2_a")}
    inputs = {shapes[role][1:] for role in ("w1_b", "w2_b")}
    if len(out) > 1 or len(inputs) > 1:
        return "w1 and w2 of one shape"
    if shapes.get("t1", (0, 0))[2:] != shapes.get("t2", (0, 0))[2:]:
        return "t1 and t2 with one kernel"
    return _pair(shapes, "w1_a", "w1_b", "t1") or _pair(shapes, "w2_a", "w2_b", "t2")


def _pair(shapes: Shapes, a: str, b: str, core: str) -> str:
    """`_expected_shapes` of two factors of one rank, perhaps with a core between them."""
    if core not in shapes:
        fits = shapes[a][1:] == (shapes[b][0],)
    else:
        fits = (
            len(shapes[a]) == len(shapes[b]) == 2
            and len(shapes[core]) > 2
            and shapes[core][:2] == (shapes[a][0], shapes[b][0])
        )
    return "" if fits else f"{a} and {b} of one rank"


def _lokr(shapes: Shapes) -> str:
    for side, core in (("w1", "t1"), ("w2", "t2")):
        factors = [role for role in (f"{side}_a", f"{side}_b", core) if role in shapes]
        if side in shapes:
            if factors or len(shapes[side]) < 2:
                return f"{side} alone and a matrix, or {side}_a and {side}_b"
        else:
            problem = _pair(shapes, f"{side}_a", f"{side}_b", core)
            if problem:
                return problem
    return "" if len(shapes.get("w1", (1, 1))) == 2 else "w1 a matrix"


def _oft(shapes: Shapes) -> str:
    blocks = shapes["blocks"]
    if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2]:
        return "square blocks, (n, b, b) or in stages (m, n, b, b)"
    if len(blocks) == 4 and blocks[-1] % 2:
        return "stages with blocks of an even size"
    out = blocks[-3] * blocks[-1]
    return "" if math.prod(shapes.get("rescale", (out,))) == out else "one rescale for each output"


def _full(shapes: Shapes) -> str:
    fits = len(shapes.get("diff_b", (0,))) == 1 and len(shapes.get("diff", (0,))) > 0
    if fits and "diff" in shapes and "diff_b" in shapes:
        fits = shapes["diff"][0] == shapes["diff_b"][0]
    return "" if fits else "a difference of the weight, and one of its bias"


def matrix_shape(kind: str, parts: Parts) -> tuple[int, int]:
    """(out, in) of the delta, a kernel's axes flattened; for OFT in = 0, which is unknown."""
    shapes = {role: part.shape for role, part in parts.items()}
    if kind == FACTORS:
        kernel = math.prod(shapes["mid"][2:]) if "mid" in shapes else 1
        return shapes["b"][0], math.prod(shapes["a"][1:]) * kernel
    if kind == "loha":
        return _side_shape(shapes, "w1_a", "w1_b", "t1")
    if kind == "lokr":
        (out1, in1), (out2, in2) = (
            (shapes[side][0], math.prod(shapes[side][1:]))
            if side in shapes
            else _side_shape(shapes, f"{side}_a", f"{side}_b", core)
            for side, core in (("w1", "t1"), ("w2", "t2"))
        )
        return out1 * out2, in1 * in2
    if kind == "oft":
        return shapes["blocks"][-3] * shapes["blocks"][-1], 0
    diff = shapes["diff"]
    return diff[0], math.prod(diff[1:])


def _side_shape(shapes: Shapes, a: str, b: str, core: str) -> tuple[int, int]:
    kernel = math.prod(shapes[core][2:]) if core in shapes else 1
    return shapes[a][1 if core in shapes else 0], math.prod(shapes[b][1:]) * kernel


def tail_of(kind: str, parts: Parts) -> tuple[int, ...] | None:
    """The axes after `out` of the weight; None if a flattened kernel looks like inputs, or a core
    has the kernel (k, 1), which PEFT also uses for a Conv1d."""
    shapes = {role: part.shape for role, part in parts.items()}
    if kind == FACTORS:
        return (shapes["a"][1], *shapes["mid"][2:]) if "mid" in shapes else shapes["a"][1:]
    if kind == "full":
        return shapes["diff"][1:]
    core = shapes.get({"loha": "t1", "lokr": "t2"}.get(kind, ""))
    kernel = core[2:] if core else shapes["w2"][2:] if kind == "lokr" and "w2" in shapes else None
    if kernel is None or (core and kernel[1:] == (1,)):
        return None
    return (matrix_shape(kind, parts)[1] // math.prod(kernel), *kernel)


def product_rank(kind: str, parts: Parts) -> int:
    """Upper bound of the rank of a delta that is a product: r, r² for LoHa, r1 · r2 for LoKr."""
    if kind == FACTORS:
        return parts["a"].shape[0]
    if kind == "loha":
        return parts["w1_b"].shape[0] * parts["w2_b"].shape[0]
    if kind == "lokr":
        ranks = []
        for side in ("w1", "w2"):
            whole = parts.get(side)
            if whole is not None:
                ranks.append(min(whole.shape[0], math.prod(whole.shape[1:])))
            else:
                ranks.append(parts[f"{side}_b"].shape[0])
        return math.prod(ranks)
    out, inputs = matrix_shape(kind, parts)
    return min(out, inputs) if inputs else out
