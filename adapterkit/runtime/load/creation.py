"""Create adapters on a live model, with initial values from the methods of `init`."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Generator, Tensor

from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.engine.device import float32_products, with_float64
from adapterkit.core.errors import Problems, Refused, Unrecoverable, by_reason, listed, shown
from adapterkit.core.registry import members
from adapterkit.runtime.layers import KINDS
from adapterkit.runtime.layers.parameter import is_transposed
from adapterkit.runtime.load.placing import OtherValues, PatchMaker
from adapterkit.runtime.patches import dora
from adapterkit.runtime.patches.copies import biases, known_parameter
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.patches.tokens import own_rows
from adapterkit.runtime.quantized import stored
from adapterkit.runtime.replication import replicate, replicating
from adapterkit.runtime.site import Host
from adapterkit.runtime.state import Attached, State
from adapterkit.runtime.targets import LiveResolver
from adapterkit.verbs.init.methods import created_init
from adapterkit.verbs.init.methods.eva import distribute
from adapterkit.verbs.init.methods.protocol import (
    ComputedInit,
    DrawnInit,
    Initialization,
    RedistributingInit,
)
from adapterkit.verbs.shared.lora_config import LoraConfig
from adapterkit.verbs.shared.statistics_file import select_statistics, shape_of
from adapterkit.verbs.shared.targets import Target, input_embedding
from adapterkit.verbs.stats.reader import Stats, open_statistics

# of a module by kind, all or those that are named; float32 on the CPU
Statistics = Callable[..., dict[str, Tensor]]


def method_of(config: LoraConfig, targets: Sequence[Target]) -> Initialization:
    """The record of a config's init; `Refused` if it cannot start these adapters."""
    name = "random" if config.init is False else str(config.init)
    name, _, niter = name.partition("_niter_")  # PEFT's pissa_niter_4
    errors = Problems(where="LoraConfig", code="AK801")
    if name not in members("inits"):
        raise Refused(
            f"init {shown(name)}",
            expected=", ".join(members("inits")),
            where="LoraConfig",
            hint="start it from the files with `adapterkit init` or `loftq`, then load it",
            code="AK801",
        )
    options = {"niter": int(niter)} if niter else config.init_options
    method = created_init(name, dict(options))
    if method.needs:
        others = [target.path for target in targets if not KINDS[target.kind].is_matrix]
        if others:
            errors.add(
                f"init {name} on {', '.join(map(shown, others[:6]))}",
                "linear layers (PEFT silently uses another init for other layers)",
                "exclude them from targets, or give another init",
            )
    if method.changes_base and config.invocation_tokens:
        errors.add(
            f"init {name} of an activated LoRA",
            "an init that does not change the base before the invocation",
            "give another init",
        )
    errors.raise_all()
    return method


@contextmanager
def statistics_for(
    method: Initialization, targets: Sequence[Target], stats: Stats | None
) -> Iterator[Statistics]:
    """The statistics that an init needs for its targets; `Refused` with all missing ones."""
    kinds = [kind for kind in method.needs if kind != "weight"]
    if bool(kinds) != (stats is not None):
        what = "covariance" if not kinds else "pca" if "components" in kinds else kinds[0]
        raise Refused(
            f"init {method.name} {'without' if kinds else 'with'} statistics",
            expected=f"stats= with {', '.join(kinds)} of each target" if kinds else "no stats=",
            where="attach",
            hint=f'stats=collect(model, run_model, what="{what}")' if kinds else "remove stats=",
            code="AK106",
        )
    if stats is None:
        yield lambda module, *some: {}
        return
    with open_statistics(stats) as (stored, read):
        specs: dict[str, dict[str, TensorSpec]] = {target.path: {} for target in targets}
        for kind in kinds:
            shapes = {}
            for target in targets:
                (_, width), (out, _) = KINDS[target.kind].shapes(target.module, target.rank)
                shapes[target.path] = shape_of(kind, out, width)
            for path, spec in select_statistics(stored, kind, shapes).items():
                specs[path][kind] = spec

        def of(module: str, *some: str) -> dict[str, Tensor]:
            own = specs[module].items()
            return {kind: read(spec) for kind, spec in own if not some or kind in some}

        yield of


def redistributed(
    method: Initialization, config: LoraConfig, targets: Sequence[Target], statistics: Statistics
) -> tuple[LoraConfig, Sequence[Target]]:
    """The targets with the ranks from the statistics, without those of rank 0, and the config that
    names these; `Refused` with all targets that have too few components."""
    if not isinstance(method, RedistributingInit):
        return config, targets
    spectra = [statistics(target.path, "variances", "variance") for target in targets]
    # modules that see the same inputs have as many candidates
    groups = [tuple(spectrum["variances"].tolist()) for spectrum in spectra]
    widths = [KINDS[t.kind].shapes(t.module, t.rank)[0][1] for t in targets]
    most = method.candidates(zip(groups, (t.rank for t in targets), widths, strict=True))
    Problems(
        [
            method.too_few(target.path, target.rank, len(group), most[group], "stats")
            for target, group in zip(targets, groups, strict=True)
            if len(group) < most[group]
        ]
    ).raise_all()
    ratios = [
        method.ratios(most[group], **spectrum)
        for group, spectrum in zip(groups, spectra, strict=True)
    ]
    ranks = distribute(ratios, sum(target.rank for target in targets))
    left = [
        replace(target, rank=rank, alpha=method.new_alpha(target.alpha, target.rank, rank))
        for target, rank in zip(targets, ranks, strict=True)
        if rank
    ]
    names = replace(
        config, targets=[target.path for target in left], exclude=None, layers=None,
        layers_pattern=None, rank_pattern={}, alpha_pattern={},
    )  # fmt: skip
    return names, left


@torch.no_grad()
def start(
    method: Initialization,
    target: Target,
    kind: type[FactorsPatch],
    host: Host,
    generator: Generator,
    statistics: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """a and b of a new adapter on a module, float32."""
    if isinstance(method, DrawnInit):
        shapes = kind.shapes(host, target.rank)
        return method.start(*shapes, generator, kind.stored_as == "embedding")
    assert isinstance(method, ComputedInit)
    weight = _matrix(method, target, kind, host)
    where = torch.device("cpu") if weight.is_meta else with_float64(weight.device)
    statistics = {key: value.to(where) for key, value in statistics.items()}
    try:
        weight = weight if weight.is_meta else weight.to(where)
        return method.start(weight, target.rank, target.scale, statistics, generator)
    except ValueError as error:
        raise Unrecoverable(
            f"statistics of {shown(target.path)}: {error}",
            expected=f"statistics for init {method.name}",
            where="stats",
            hint="collect them on texts that reach this module, in float32",
            code="AK106",
        ) from error


def _matrix(method: ComputedInit, target: Target, kind: type[FactorsPatch], host: Host) -> Tensor:
    """The weight (out, in), without values if the method does not need them."""
    if "weight" not in method.needs:
        (_, width), (out, _) = kind.shapes(host, target.rank)
        return torch.empty(out, width, device="meta")
    matrix = kind.matrix(host)
    each = method.triplets_per_rank
    if matrix.is_meta or target.rank * each > min(matrix.shape):
        raise Refused(
            f"rank {target.rank} for {shown(target.path)} of shape {tuple(matrix.shape)}"
            + (" on the meta device" if matrix.is_meta else ""),
            expected="a weight with values, and a rank of at most "
            + ("its smaller side" if each == 1 else f"1/{each} of its smaller side"),
            where=f"init {method.name}",
            hint="load the base first" if matrix.is_meta else "give a smaller rank",
            code="AK801",
        )
    return matrix


def start_parameter(
    method: Initialization, target: Target, generator: Generator
) -> tuple[Tensor, Tensor]:
    """a and b of a parameter, float32; for a stack, a linear layer's for each expert."""
    leaf, host = target.leaf, target.module
    assert leaf is not None and isinstance(method, DrawnInit)
    parameter = host._parameters[leaf]
    assert parameter is not None
    out, columns = parameter.shape[-2:]
    if is_transposed(host, leaf):
        out, columns = columns, out
    shapes = (target.rank, columns), (out, target.rank)
    if parameter.ndim == 2:
        return method.draw(*shapes, generator)
    pairs = [method.draw(*shapes, generator) for _ in parameter]
    return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])


@float32_products()
def attach(
    state: State,
    config: LoraConfig | Mapping[str, object],
    name: str,
    seed: int | None,
    dtype: torch.dtype | None,
    *,
    ephemeral_gpu_offload: bool = False,
    stats: Stats | None = None,
    strict: bool = False,
) -> None:
    """Add a new, trainable adapter; `Refused` before anything changes."""
    state.unused(name)
    config = LoraConfig.of(config)
    with replicating(state):
        replicate(state, config.layer_replication, "LoraConfig: layer_replication")
        resolver = LiveResolver(state.model, config)
        targets: Sequence[Target] = resolver.resolve()
        if config.dora:
            _check_dora(targets)
        method = method_of(config, targets)
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        with statistics_for(method, targets, stats) as statistics:
            config, targets = redistributed(method, config, targets, statistics)
            maker = PatchMaker(state, name, config, dtype, ephemeral_gpu_offload)
            heads = {target.path: target.tied for target in targets if target.tied is not None}
            values = _other_values(state, resolver, [target.path for target in targets])
            factors = list(_new_factors(maker, targets, method, statistics, generator))
            patches = maker.all_patches(factors, values, heads)
    adapter = Attached(name, config, trainable=True, base=state.base_name, strict=strict)
    adapter.base_fingerprint = state.base_fingerprint
    state.put(adapter, patches)
    if config.invocation_tokens and config.task_type != "CAUSAL_LM":
        text = "PEFT runs an activated LoRA only with CAUSAL_LM"
        warnings.warn(f"task_type {config.task_type}: {text}", stacklevel=3)


def _new_factors(
    maker: PatchMaker,
    targets: Sequence[Target],
    method: Initialization,
    statistics: Statistics,
    generator: Generator,
) -> Iterator[tuple[str, FactorsPatch]]:
    further = Counter(target.path for target in targets)  # parameters of a module, after this one
    config = maker.config
    for target in targets:
        if target.leaf is not None:
            further[target.path] -= 1
            a, b = start_parameter(method, target, generator)
            depth = further[target.path]
            patch = maker.on_parameter(target.path, target.leaf, a, b, target.scale, depth)
            patch.fix(*method.fixed)
            yield target.path, patch
            continue
        for path, kind in KINDS[target.kind].members(target.path):
            host = maker.state.modules[path]
            a, b = start(method, target, kind, host, generator, statistics(path))
            bias = torch.zeros(b.shape[0]) if config.lora_bias else None
            patch = maker.on_layer(
                path, kind, a, b, target.scale, bias=bias, base_lacks=method.changes_base
            )
            patch.fix(*method.fixed)
            if config.dora:
                patch.decompose(host, maker.dtype)
            yield path, patch


def _check_dora(targets: Sequence[Target]) -> None:
    """`Refused` for layers without a DoRA, and for weights that cannot be read (yet)."""
    errors = Problems(
        where="attach", hint="exclude these layers, or attach without dora", code="AK801"
    )
    expected = "linear layers, embeddings or convolutions with values"
    for reason, paths in by_reason((one.path, _why_no_dora(one)) for one in targets).items():
        errors.add(f"DoRA on {listed(paths)}: {reason}", expected)
    errors.raise_all()


def _why_no_dora(target: Target) -> str | None:
    reason = dora.problem(target.module, KINDS[target.kind].axis)
    if reason is None and any(tensor.is_meta for tensor in stored(target.module)):
        return "magnitudes are norms of the weight, which is on the meta device"
    return reason


def _other_values(
    state: State, resolver: LiveResolver, targets: Sequence[str]
) -> OtherValues[Tensor]:
    """Values of a config other than factors of targets: copies of modules, biases and rows of
    tokens, which start as the base's. `Refused` while the base is on the meta device."""
    config, modules = resolver.config, resolver.modules
    saved, rows = resolver.saved(), resolver.tokens()
    if rows:
        rows = own_rows(modules, rows, input_embedding(state.model, modules), config.tie)
    names = []
    if config.bias != "none":
        names = biases(state.modules, None if config.bias == "all" else targets)
        names = [name for name in names if not any(name.startswith(f"{x}.") for x in saved)]
    values = {name: known_parameter(state.modules, name) for name in names}
    weights = {path: known_parameter(modules, f"{path}.weight") for path in rows}
    tensors: dict[str, Tensor] = {**values, **weights}
    tensors |= {path: t for path in saved for t in state.modules[path].state_dict().values()}
    missing = [name for name, tensor in tensors.items() if tensor.is_meta]
    if missing:
        raise Refused(
            f"{listed(missing)} on the meta device",
            expected="values, because the adapter starts with them",
            where="attach",
            hint="load the base's weights first",
            code="AK801",
        )
    return OtherValues(
        copies={path: {} for path in saved},
        biases={name: own.detach().clone() for name, own in values.items()},
        weights={},
        rows={
            path: (indices, weights[path].detach()[list(indices)]) for path, indices in rows.items()
        },
    )
