"""Which parameter each adapted module is, and how b @ a lies on it: decided from shapes, and from the model's classes where
shapes leave it open."""

from adapterkit.adapters.record import Adapter, Lora
from adapterkit.errors import Refused, shown
from adapterkit.planning.merge.job import Job
from adapterkit.planning.merge.placement import Product
from adapterkit.planning.sites import old_layout, sites_of
from adapterkit.weights.parameters import Parameter


def targets(
    job: Job, adapter: Adapter, module: str, loras: list[Lora]
) -> list[tuple[str, str | None, Lora]]:
    """The parameter that each of a module's factor pairs is on, and its own name where target_parameters names it."""
    own, leaves, there = None, [], []
    if adapter.config.get("target_parameters") or any(lora.depth for lora in loras):
        own = job.names.children(module)
        there = own if own is not None else job.leaves.get(module, [])
        leaves = [] if loras[0].kind == "embedding" else adapter.leaves(module, there)
    if not leaves and all(lora.depth == 0 for lora in loras):
        for leaf in ("weight", "in_proj_weight"):
            if job.names.parameter(f"{module}.{leaf}") is not None:
                return [(f"{module}.{leaf}", None, loras[0])]
    leaves = leaves or adapter.leaves(module) or there
    if not any(job.names.parameter(f"{module}.{leaf}") for leaf in leaves):
        raise job.unknown(adapter, loras[0].a.key, module)
    number, names = adapter.number, job.names
    found = sites_of(module, {number: loras}, {number: leaves}, {number: adapter}, own, names)
    if any(site.leaf is None for site in found):
        raise Refused(
            f"{shown(loras[0].a.key)} fits several parameters of {shown(module)}: {', '.join(map(shown, leaves))}",
            expected="one parameter (PEFT's file names the nesting, not the parameter)",
            where=adapter.label,
            hint="use a transformers that knows the model, or give target_parameters as they were in training",
        )
    return [(site.name, site.leaf, site.members[number][0]) for site in found]


def oriented(
    job: Job, adapter: Adapter, parameter: Parameter, lora: Lora, leaf: str | None, scale: float
) -> tuple[Product, int]:
    """How b @ a lies on the parameter, and the parameter's axis of outputs.

    On a matrix that is a target itself (`leaf` its name) as the matrix is stored, whatever its module's class: so PEFT's
    ParamWrapper does. On a module's weight, and on a stack, by shapes and, where they leave it open, by the module's class.
    """
    shape, a, b = parameter.shape, lora.a.shape, lora.b.shape
    if lora.kind == "embedding":
        if len(a) != 2 or len(b) != 2 or (a[1], b[0]) != shape or a[0] != b[1]:
            raise job.misshaped(adapter, lora.a.key, (a, b), shape)
        return Product(lora.a, lora.b, scale, a[0], True), 1
    if len(shape) > 3 or (len(shape) == 3 and len(a) == 3):
        return _convolution(job, adapter, parameter, lora, scale), 0
    if len(shape) == 3:
        return _experts(job, adapter, parameter, lora, scale), 1
    if len(shape) != 2 or len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise job.misshaped(adapter, lora.a.key, (a, b), shape)
    straight, turned = shape == (b[0], a[1]), shape == (a[1], b[0])
    flip = turned and leaf is None and _transposed(job, adapter, lora.module, square=straight)
    if not (flip or straight):
        raise job.misshaped(adapter, lora.a.key, (a, b), shape)
    return Product(lora.a, lora.b, scale, a[0], flip), 1 if flip else 0


def _transposed(job: Job, adapter: Adapter, module: str, *, square: bool) -> bool:
    """Whether a weight that would fit so is stored (in, out), as GPT-2's are."""
    flag = bool(adapter.config.get("fan_in_fan_out"))
    where = adapter.label
    return job.names.transposed(module, fan_in_fan_out=flag, square=square, where=where)


def _convolution(
    job: Job, adapter: Adapter, parameter: Parameter, lora: Lora, scale: float
) -> Product:
    shape, a, b = parameter.shape, lora.a.shape, lora.b.shape
    module = parameter.name.rpartition(".")[0]
    groups = job.names.groups(module)
    if groups > 1 or b[1:2] != a[:1]:
        raise Refused(
            f"a grouped convolution: {shown(module)} has {groups} groups",
            expected="groups 1 (PEFT cannot merge these either)",
            where=adapter.label,
            hint="leave it out with --exclude",
        )
    if b[:1] + a[1:] != shape or any(n != 1 for n in b[2:]):
        raise job.misshaped(adapter, lora.a.key, (a, b), shape)
    return Product(lora.a, lora.b, scale, a[0], False)


def _experts(job: Job, adapter: Adapter, parameter: Parameter, lora: Lora, scale: float) -> Product:
    count, rows, columns = parameter.shape
    inputs, outputs = lora.a.shape[-1], lora.b.shape[0]
    file_rank, rest = divmod(lora.a.shape[0], count)
    if rest or lora.b.shape[1] != lora.a.shape[0]:
        raise job.misshaped(adapter, lora.a.key, (lora.a.shape, lora.b.shape), parameter.shape)
    straight, turned = (rows, columns) == (outputs, inputs), (rows, columns) == (inputs, outputs)
    if not straight and not turned:
        raise job.misshaped(adapter, lora.a.key, (lora.a.shape, lora.b.shape), parameter.shape)
    flip = turned if straight != turned else _flips_squares(job, adapter, parameter)
    return Product(lora.a, lora.b, scale, file_rank, flip, count)


def _flips_squares(job: Job, adapter: Adapter, parameter: Parameter) -> bool:
    """Square experts: shapes cannot tell. PEFT up to 0.18 took them as (in, out), later as the module says."""
    chosen, old = job.options.expert_layout, old_layout(adapter)
    if chosen is None and old is not None:
        chosen = "peft-0.18" if old else "peft-0.19"
    if chosen is None:
        raise Refused(
            f"{shown(parameter.name)} holds square experts {parameter.shape} and the adapter has no peft_version",
            expected="the layout in which PEFT wrote it: it changed in 0.19",
            where=adapter.where,
            hint="give --expert-layout peft-0.18 or --expert-layout peft-0.19",
        )
    if chosen == "peft-0.18":
        return True
    return job.names.transposed_experts(parameter.name.rpartition(".")[0])
