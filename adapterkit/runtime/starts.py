"""Initial factors of new adapters, by the records of `adapterkit.inits`."""

from typing import Any

import torch
from torch import Generator, Tensor

from adapterkit.adapters.lora_config import LoraConfig
from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown
from adapterkit.inits.common import draw
from adapterkit.registry import create, members
from adapterkit.runtime.factors import FactorsPart
from adapterkit.runtime.targets import Target


def method_of(config: LoraConfig, targets: list[Target]) -> Any:
    """The record of a config's init; `Refused` for one that cannot start these adapters."""
    name = "random" if config.init is False else str(config.init)
    name, _, niter = name.partition("_niter_")  # PEFT's pissa_niter_4
    errors: list[AdapterkitError] = []
    if name not in members("inits"):
        raise Refused(
            f"init {shown(name)}",
            expected=", ".join(members("inits")),
            where="LoraConfig",
            hint="start it from the files with adapterkit init or loftq, then load it",
        )
    method: Any = create("inits", name, {"niter": int(niter)} if niter else {})
    if "weight" in method.needs:
        others = [target.path for target in targets if target.kind not in ("linear", "conv1d")]
        if others:
            errors.append(
                Refused(
                    f"init {name} on {', '.join(map(shown, others[:6]))}",
                    expected="linear layers (PEFT starts other layers in another way, silently)",
                    where="LoraConfig",
                    hint="leave them out, or give another init",
                )
            )
    if method.changes_base and config.invocation_tokens:
        errors.append(
            Refused(
                f"init {name} of an activated LoRA",
                expected="an init that leaves the base as it is before the invocation",
                where="LoraConfig",
                hint="give another init",
            )
        )
    refuse_all(errors)
    return method


@torch.no_grad()
def start(
    method: Any,
    target: Target,
    kind: type[FactorsPart],
    host: Any,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """a and b of a new adapter on a module, float32."""
    a_shape, b_shape = kind.shapes(host, target.rank)
    if "weight" in method.needs:
        matrix = kind.matrix(host)
        if matrix.is_meta or target.rank > min(matrix.shape):
            raise Refused(
                f"rank {target.rank} for {shown(target.path)} of shape {tuple(matrix.shape)}"
                + (" on the meta device" if matrix.is_meta else ""),
                expected="a weight with values, and a rank of at most its smaller side",
                where=f"init {method.name}",
                hint="load the base first" if matrix.is_meta else "give a smaller rank",
            )
        return method.factors(matrix, target.rank, target.scale)
    return draw(method, a_shape, b_shape, generator, kind.stored_as == "embedding")
