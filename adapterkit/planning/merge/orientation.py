"""The parameter of each adapted module, and the orientation of b @ a on it: by shapes, and by the
model's classes where shapes leave it open."""

from adapterkit.adapters.factors import Factors
from adapterkit.adapters.record import Adapter, Lora
from adapterkit.errors import Refused, shown
from adapterkit.planning.adapters.sites import flips_square_experts, sites_of
from adapterkit.planning.merge.job import MergeJob
from adapterkit.weights.parameters import Parameter


def resolve_targets(
    job: MergeJob, adapter: Adapter, module: str, loras: list[Lora]
) -> list[tuple[str, str | None, Lora]]:
    """The parameter of each of a module's factor pairs, with its own name where target_parameters
    has it; `Refused` where there is none, or several fit."""
    own, leaves, candidates = None, [], []
    if adapter.config.get("target_parameters") or any(lora.depth for lora in loras):
        own = job.names.children(module)
        candidates = own if own is not None else job.leaves.get(module, [])
        leaves = [] if loras[0].kind == "embedding" else adapter.leaves(module, candidates)
    if not leaves and all(lora.depth == 0 for lora in loras):
        for leaf in ("weight", "in_proj_weight"):
            if job.names.parameter(f"{module}.{leaf}") is not None:
                return [(f"{module}.{leaf}", None, loras[0])]
    leaves = leaves or adapter.leaves(module) or candidates
    if not any(job.names.parameter(f"{module}.{leaf}") for leaf in leaves):
        raise job.unknown_error(adapter, loras[0].a.key, module)
    number, names = adapter.number, job.names
    sites = sites_of(module, {number: loras}, {number: leaves}, {number: adapter}, own, names)
    if any(site.leaf is None for site in sites):
        raise Refused(
            f"{shown(loras[0].a.key)} fits several parameters of {shown(module)}: "
            f"{', '.join(map(shown, leaves))}",
            expected="one parameter (PEFT's file names the nesting, not the parameter)",
            where=adapter.label,
            hint="use a transformers that knows the model, or give target_parameters as they were "
            "in training",
        )
    return [(site.name, site.leaf, site.members[number][0]) for site in sites]


def orient(
    job: MergeJob,
    adapter: Adapter,
    parameter: Parameter,
    lora: Lora,
    leaf: str | None,
    scale: float,
) -> tuple[Factors, int]:
    """scale · b @ a as it lies on the parameter, and the parameter's axis of outputs.

    A matrix that is a target itself (`leaf` its name) is taken as it is stored, whatever its
    module's class: PEFT's ParamWrapper does so. A module's weight, and a stack, go by shapes and,
    where these leave it open, by the module's class. `Refused` where the factors do not fit."""
    shape, a, b = parameter.shape, lora.a.shape, lora.b.shape
    if lora.kind == "embedding":
        if len(a) != 2 or len(b) != 2 or (a[1], b[0]) != shape or a[0] != b[1]:
            raise job.shape_error(adapter, lora.a.key, (a, b), shape)
        return Factors(a=lora.a, b=lora.b, scale=scale, rank=a[0], flip=True), 1
    if len(shape) > 3 or (len(shape) == 3 and len(a) == 3):
        return _on_convolution(job, adapter, parameter, lora, scale), 0
    if len(shape) == 3:
        return _on_experts(job, adapter, parameter, lora, scale), 1
    if len(shape) != 2 or len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise job.shape_error(adapter, lora.a.key, (a, b), shape)
    fits, fits_transposed = shape == (b[0], a[1]), shape == (a[1], b[0])
    flip = fits_transposed and leaf is None
    flip = flip and job.names.transposed(
        lora.module,
        fan_in_fan_out=bool(adapter.config.get("fan_in_fan_out")),
        square=fits,
        where=adapter.label,
    )
    if not (flip or fits):
        raise job.shape_error(adapter, lora.a.key, (a, b), shape)
    factors = Factors(a=lora.a, b=lora.b, scale=scale, rank=a[0], flip=flip)
    return factors, 1 if flip else 0


def _on_convolution(
    job: MergeJob, adapter: Adapter, parameter: Parameter, lora: Lora, scale: float
) -> Factors:
    shape, a, b = parameter.shape, lora.a.shape, lora.b.shape
    module = parameter.name.rpartition(".")[0]
    groups = job.names.groups(module)
    if groups > 1 or b[1:2] != a[:1]:
        raise Refused(
            f"a grouped convolution: {shown(module)} has {groups} groups",
            expected="groups 1 (PEFT cannot merge these either)",
            where=adapter.label,
            hint="exclude it with --exclude",
        )
    if b[:1] + a[1:] != shape or any(n != 1 for n in b[2:]):
        raise job.shape_error(adapter, lora.a.key, (a, b), shape)
    return Factors(a=lora.a, b=lora.b, scale=scale, rank=a[0])


def _on_experts(
    job: MergeJob, adapter: Adapter, parameter: Parameter, lora: Lora, scale: float
) -> Factors:
    count, *matrix = parameter.shape
    shapes = a, b = lora.a.shape, lora.b.shape
    rank, rest = divmod(a[0], count)
    fits, fits_transposed = matrix == [b[0], a[-1]], matrix == [a[-1], b[0]]
    if rest or b[1] != a[0] or not (fits or fits_transposed):
        raise job.shape_error(adapter, lora.a.key, shapes, parameter.shape)
    flip = fits_transposed
    if fits and fits_transposed:
        flip = _flips_square_experts(job, adapter, parameter)
    return Factors(a=lora.a, b=lora.b, scale=scale, rank=rank, experts=count, flip=flip)


def _flips_square_experts(job: MergeJob, adapter: Adapter, parameter: Parameter) -> bool:
    """Whether square experts are (in, out) to the adapter."""
    transposed = job.names.transposed_experts(parameter.name.rpartition(".")[0])
    hint = "give --expert-layout peft-0.18 or --expert-layout peft-0.19"
    return flips_square_experts(
        adapter, parameter.name, transposed, job.options.expert_layout, hint
    )
