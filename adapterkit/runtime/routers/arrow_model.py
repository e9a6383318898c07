"""Arrow routers as the first adapter of a model, or a further one."""

from collections.abc import Callable

from torch import nn

from adapterkit.options import Sources, StrPath
from adapterkit.runtime.handle import ATTRIBUTE, Adapters
from adapterkit.runtime.routers import arrow
from adapterkit.runtime.state import State


def load_arrow(
    model: nn.Module,
    folder: StrPath,
    *,
    name: str = "arrow",
    top_k: int | None = None,
    temperature: float | None = None,
) -> Adapters:
    """Load the router that `adapterkit arrow` wrote: y + Σ_e coefficient_e·scale_e·b_e·a_e·x.

    For each token, e are the `top_k` experts with the largest |x·prototype_e|, x not normalized,
    and the coefficients their softmax at `temperature` (None: as stored); arXiv:2405.11157. Active,
    or beside what is active where the model has adapters already. Factors are float32 or wider.
    `Refused` before anything changes. PEFT cannot load a router that it saved.
    """
    return _with(
        model,
        name,
        lambda state: arrow.load(state, folder, name, top_k=top_k, temperature=temperature),
    )


def create_arrow_model(
    model: nn.Module,
    sources: Sources,
    *,
    general: Sources = (),
    top_k: int | None = 3,
    temperature: float = 1.0,
    compat: str | None = None,
    seed: int | None = None,
    name: str = "arrow",
) -> Adapters:
    """Route between adapters, each of them an expert: `adapterkit.arrow`, then `load_arrow`.

    `sources`, `general`: folders, Hub ids, or names of adapters that the model has. `general` ones
    are subtracted from each expert (GenKnowSub): exactly, where PEFT subtracts means of factors.
    `compat="peft"`: PEFT's prototypes and subtraction, from `seed`. `top_k` None: 3, or all experts
    where they are fewer. `Refused` before anything changes.
    """
    return _with(
        model,
        name,
        lambda state: arrow.create(
            state,
            sources,
            name,
            general=general,
            top_k=top_k,
            temperature=temperature,
            compat=compat,
            seed=seed,
        ),
    )


def _with(model: nn.Module, name: str, add: Callable[[State], None]) -> Adapters:
    """The handle of a model with a further adapter; without others that one is active."""
    adapters = getattr(model, ATTRIBUTE, None)
    if adapters is not None:
        adapters.state.outside_rows("load_arrow")
        adapters.state.own_weights("load_arrow")
        add(adapters.state)
        return adapters
    adapters = Adapters(model)
    try:
        add(adapters.state)
    except BaseException:
        adapters.state.release()
        raise
    object.__setattr__(model, ATTRIBUTE, adapters)
    adapters.activate(name)
    return adapters
