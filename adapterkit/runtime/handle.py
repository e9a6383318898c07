"""The handle of a model's adapters: train, run, combine and save them."""

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterkit.core.errors import Problems, Refused, did_you_mean, shown
from adapterkit.core.inputs.weights_file import write_weights
from adapterkit.core.options import Sources, StrPath, finite
from adapterkit.core.records import Json
from adapterkit.core.registry import experimental
from adapterkit.runtime import arrow as arrows
from adapterkit.runtime import merging, rows
from adapterkit.runtime.load import creation, reading, swapping, writing
from adapterkit.runtime.load.store import Store
from adapterkit.runtime.merging import conflicts, wrong_sums
from adapterkit.runtime.report import ModuleTable, report
from adapterkit.runtime.state import State
from adapterkit.runtime.training import trainer
from adapterkit.runtime.weights import as_file, by_module, named, named_sources, weights_of
from adapterkit.verbs.combine.records.combine import combine as combine_files
from adapterkit.verbs.shared.lora_config import LoraConfig
from adapterkit.verbs.stats.reader import Stats

COMBINE_OPTIONS = (
    "space", "rank", "energy", "density", "majority", "svd_clamp", "weight_for", "settings",
    "dtype", "seed", "stats",
)  # fmt: skip
ATTRIBUTE = "_adapterkit"  # of a model that has a handle

Names = str | Iterable[str] | Mapping[str, float] | None


class Adapters:
    """The adapters of one model; see `attach` and `load`.

    The model itself keeps its class, its modules' names and its state dict. The adapters'
    parameters are in `model.parameters()`, so optimizers, DDP and FSDP find them, and never in
    `model.state_dict()`.
    """

    def __init__(self, model: nn.Module):
        self.state = State(model)
        self.model = model

    @property
    def names(self) -> list[str]:
        """The loaded adapters, in the order of loading."""
        return list(self.state.adapters)

    @property
    def active(self) -> dict[str, float]:
        """The active adapters with their weights, including weights of modules and directions;
        `activate` and `merge` accept it."""
        return dict(self.state.active)

    @property
    def merged(self) -> dict[str, float]:
        """The adapters that are merged into the base's weights, with their weights."""
        return dict(self.state.merged)

    @property
    def missed_invocations(self) -> dict[str, int]:
        """The number of rows in which each activated LoRA did not find its invocation sequence, and
        therefore did not act. A call that continues a cache counts no row again."""
        found = self.state.invocations
        return {} if found is None else {name: found.missed[name] for name in found.tokens}

    def attach(
        self,
        config: LoraConfig | Mapping[str, object],
        *,
        name: str,
        seed: int | None = None,
        dtype: torch.dtype | None = torch.float32,
        ephemeral_gpu_offload: bool = False,
        stats: Stats | None = None,
        strict: bool = False,
    ) -> None:
        """Attach a new, trainable adapter; active adapters do not change."""
        self.state.own_weights("attach")
        creation.attach(
            self.state,
            config,
            name,
            seed,
            dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            stats=stats,
            strict=strict,
        )

    def load(
        self,
        source: StrPath,
        *,
        name: str,
        trainable: bool = False,
        dtype: torch.dtype | None = None,
        ephemeral_gpu_offload: bool = False,
        pad_rank: int | None = None,
        strict: bool = False,
    ) -> None:
        """Load an adapter from a folder, a file or the Hub; active adapters do not change.
        `pad_rank`: the highest rank for a later `swap`."""
        self.state.own_weights("load")
        reading.load(
            self.state,
            source,
            name,
            trainable=trainable,
            dtype=dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            pad_rank=pad_rank,
            strict=strict,
        )

    def swap(self, name: str, source: StrPath) -> None:
        """Give an adapter the weights, ranks and scales of another one from disk, in place.

        If it was loaded with `pad_rank`, compiled code is not compiled again, and optimizers keep
        their parameters. Modules that the new adapter lacks do nothing. `Refused`, before anything
        changes, for further modules, other kinds (DoRA, biases) and ranks above `pad_rank`. PEFT's
        hotswap uses one rank and one alpha for all modules and ignores the patterns."""
        swapping.swap(self.state, name, source)

    def parameters(self, name: str | None = None) -> Iterator[nn.Parameter]:
        """The trainable parameters of an adapter, or of all."""
        names = self.names if name is None else [name]
        self.state.known(names)
        adapters = [self.state.adapters[n] for n in names if self.state.adapters[n].trainable]
        patches = [patch for adapter in adapters for _, patch in adapter.patches()]
        # tied patches share parameters
        yield from dict.fromkeys(parameter for patch in patches for _, parameter in patch.trained())

    def activate(self, names: Names, *, weights: StrPath | None = None) -> None:
        """Activate these adapters, with weights if a map is given; None: the base alone. `Refused`
        while adapters are merged.

        `weights`: a file with weights of modules and directions for these adapters, in its order.
        The trainable ones among them are trained from here on."""
        self.state.outside_rows("activate")
        self.state.own_weights("activate")
        try:
            names = named(names)
            self.state.provide(names, with_active=False)
            table = weights_of(self.state, names)
            if weights is not None:
                table = by_module(self.state, list(table), weights)
            Problems(conflicts(self.state, table, "activate")).raise_all()
            self.state.select(table)
            self._warn_of_sums()
        finally:
            if self.state.store is not None:
                self.state.store.trim()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base alone, bit for bit."""
        with rows.without_rows(self.state), merging.without_merge(self.state):
            active = self.active
            self.state.select({})
            try:
                yield
            finally:
                self.state.select(active)

    def rows(self, names: Iterable[str | None]) -> AbstractContextManager[None]:
        """Run row i of each batch with the adapter names[i], None: the base; one pass for all rows.

        `Refused` for unknown names, inside other rows and while merged; in the call, for a batch of
        another size (`generate` repeats the names for beams), for modules that get no rows (one
        expert's, an image encoder's in a language model), and for training. Factors are
        concatenated at the first call, so values written later take effect in the next `rows`.
        Unlike PEFT's adapter_names: DoRA too, and adapters with copies of modules that others lack.
        """
        return rows.rows(self.state, names)

    def store(self, folder: StrPath, *, max_loaded: int) -> Store:
        """Let `activate` and `rows` load missing adapters from a folder, by the names of its
        subfolders; at most `max_loaded` of them stay loaded."""
        self.state.store = store = Store(self.state, folder, max_loaded)
        return store

    def merge(self, names: Names = None) -> None:
        """Merge adapters (None: the active ones) into the base's weights: W + Σ weight·scale·b·a,
        computed in float32 and rounded once.

        Until `unmerge`, calls that change the active adapters are refused. Tied weights are untied.
        `Refused` for adapters without an equal weight (aLoRA, Arrow) and for a second merge, before
        anything changes."""
        self.state.outside_rows("merge")
        merging.merge(self.state, self.active if names is None else weights_of(self.state, names))

    def unmerge(self) -> None:
        """Restore the base's weights, bit for bit, and the previously active adapters."""
        self.state.outside_rows("unmerge")
        merging.unmerge(self.state)

    def combine(
        self, adapters: Mapping[str, float], *, name: str, method: str = "linear", **options: Any
    ) -> None:
        """Add an inactive combination of adapters: the methods and options of
        `adapterkit.combine`."""
        self.state.own_weights("combine")
        self.state.unused(name)
        table = weights_of(self.state, adapters)
        unknown = sorted(set(options) - set(COMBINE_OPTIONS))
        if unknown:
            raise Refused(
                f"combine takes no options {', '.join(map(shown, unknown))}",
                expected=", ".join(COMBINE_OPTIONS),
                where="combine",
                hint=did_you_mean(unknown, COMBINE_OPTIONS) or "remove them",
                code="AK802",
            )
        with tempfile.TemporaryDirectory(prefix="adapterkit-") as folder:
            file, sources = as_file(self.state, table), {}
            for number, (adapter, weight) in enumerate(table.items()):
                source = Path(folder, str(number))
                writing.save(self.state, source, adapter, every_process=True)
                sources[source] = weight if file is None else 1.0
            if file is not None:
                options["weights"] = Path(folder, "weights.json")
                write_weights(file, options["weights"])
            out = Path(folder, "combined")
            combine_files(sources, out=out, method=method, hash="none", **options)
            reading.load(self.state, out, name, trainable=False, dtype=None)

    @experimental
    def experts(self, arrow: str = "arrow") -> list[str]:
        """The names of a router's experts."""
        return list(arrows.find(self.state, arrow).experts)

    @experimental
    def add_expert(
        self, source: StrPath, *, name: str, arrow: str = "arrow", general: Sources | None = None
    ) -> None:
        """Add an expert to a router, as `adapterkit arrow` over all experts would; `source`: a
        folder, a Hub id, or the name of a loaded adapter.

        `general`: the sources of the general adapters that the router subtracts; None if
        `create_arrow_model` had them. `Refused` before anything changes."""
        self.state.outside_rows("add_expert")
        self.state.own_weights("add_expert")
        arrows.add_expert(self.state, source, name=name, arrow=arrow, general=general)

    @experimental
    def remove_expert(self, name: str, *, arrow: str = "arrow") -> None:
        """Remove an expert from a router; `top_k` becomes at most the number that remains.
        `Refused` for the only one."""
        self.state.outside_rows("remove_expert")
        self.state.own_weights("remove_expert")
        arrows.remove_expert(self.state, name, arrow=arrow)

    def rescale(self, factor: float, *, name: str) -> None:
        """Multiply an adapter's scale; `save` writes the product."""
        self.state.outside_rows("rescale")
        self.state.own_weights("rescale")
        self.state.known([name])
        number = finite(factor)
        if number is None:
            raise Refused(
                f"factor {factor!r}",
                expected="a finite number",
                where="rescale",
                hint="give one",
                code="AK802",
            )
        for site, patch in self.state.adapters[name].patches():
            patch.rescale(number)
            site.renew()
        self.state.adapters[name].rescaled *= number
        self._warn_of_sums()

    def report(self) -> ModuleTable:
        """Report the modules with adapters in a row each; prints in three lines, `.table()` has all
        rows. `.trainable`, `.total` and `.share`: the numbers of trained and of all parameters, and
        their ratio."""
        return report(self.state)

    def delete(self, name: str) -> None:
        """Delete an adapter from the model; `Refused` while it is active or merged."""
        self.state.outside_rows("delete")
        self.state.known([name])
        for table, word, hint in (
            (self.state.active, "active", "activate another one, or None, first"),
            (self.state.merged, "merged", "unmerge first"),
        ):
            if name in table:
                raise Refused(
                    f"{shown(name)} is {word}",
                    expected=f"an adapter that is not {word}",
                    where="delete",
                    hint=hint,
                    code="AK802",
                )
        self.state.remove(name)

    def detach(self) -> None:
        """Remove all adapters; the model is bit for bit as before."""
        self.state.outside_rows("detach")
        if self.state.merge is not None:
            self.unmerge()
        self.state.select({})
        for name in self.names:
            self.state.remove(name)
        self.state.release()
        delattr(self.model, ATTRIBUTE)

    def save(self, folder: StrPath, *, name: str | None = None) -> None:
        """Write an adapter in PEFT's layout; PEFT, vLLM and `adapterkit merge` read it. A router is
        written as `adapterkit arrow` does.

        `name`: optional if one adapter is active, or there is only one."""
        writing.check_local(folder, "save")
        name = name or self._only_name("save")
        if isinstance(self.state.adapters.get(name), arrows.ArrowRouter):
            arrows.save(self.state, folder, name)
        else:
            writing.save(self.state, folder, name)

    def trainer(self, cls: type) -> type:
        """A subclass of a transformers Trainer (also Seq2SeqTrainer, TRL's SFTTrainer) for this
        model.

        Checkpoints and `save_model` contain the active trainable adapters as `save` writes them, in
        the folder itself, or several in folders of their names; never the base. Resuming and
        `load_best_model_at_end` read them; everything else is the Trainer's. Quantized bases are
        accepted (the stock Trainer refuses them). `Refused` without an active trainable adapter."""
        return trainer.trainer(self.state, cls)

    def accelerate(self, accelerator: object) -> None:
        """Let `save_state` and `load_state` of accelerate save and restore the active trainable
        adapters, as `trainer` does, instead of the base. Call it once, before or after `prepare`.
        `Refused` without an active trainable adapter."""
        trainer.accelerate(self.state, accelerator)

    def _warn_of_sums(self) -> None:
        """Warn if the active adapters restore the initial factors of their base wrongly."""
        for error in wrong_sums(self.state, self.active):
            warnings.warn(error.problem, stacklevel=3)

    def _only_name(self, where: str) -> str:
        candidates = list(self.state.active) or self.names
        if len(candidates) != 1:
            raise Refused(
                f"{len(candidates)} adapters: {', '.join(map(shown, candidates))}",
                expected="one active adapter, or a name",
                where=where,
                hint="give name=",
                code="AK802",
            )
        return candidates[0]


def attach(
    model: nn.Module,
    config: LoraConfig | Mapping[str, object],
    *,
    name: str = "default",
    seed: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    ephemeral_gpu_offload: bool = False,
    stats: Stats | None = None,
    strict: bool = False,
) -> Adapters:
    """Attach a new, trainable adapter to a model, active; the base is frozen.

    y = x·Wᵀ + scale·(x·aᵀ)·bᵀ at each target. `config`: adapterkit's, PEFT's, or a map with the
    names of either. `dtype`: of the factors, None for the dtype of the base's weight. `stats`:
    statistics for the inits `corda`, `eva` and `lora_ga`, from `collect`, or their file.
    `ephemeral_gpu_offload`: compute norms of DoRA on an available accelerator while the model is on
    the CPU. `strict`: factors that do nothing in the model's first call, or have no gradient at the
    first step, are an error, not a warning. `Refused` for a model that has adapters (use
    `adapters.attach`), before anything changes. Unlike PEFT, the model is not wrapped and none of
    its names change.
    """
    with _new(model, name) as adapters:
        adapters.attach(
            config,
            name=name,
            seed=seed,
            dtype=dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            stats=stats,
            strict=strict,
        )
    return adapters


def load(
    model: nn.Module,
    source: Sources = (),
    *,
    name: str = "default",
    weights: StrPath | None = None,
    trainable: bool = False,
    pad_rank: int | None = None,
    dtype: torch.dtype | None = None,
    ephemeral_gpu_offload: bool = False,
    strict: bool = False,
) -> Adapters:
    """Load an adapter (a folder, a file, a Hub id) onto a model, active; the base is frozen.

    `weights`: a file of weights; its adapters are loaded, from its paths or from `source`, under
    the names of their folders (the second of a name as `name-2`), and act with these weights.
    `dtype`: of the factors, None for the stored one, at least float32. `pad_rank`: the highest rank
    for a later `swap`. `strict`: factors that do nothing in the model's first call are an error,
    not a warning. `Refused` with every mismatch, before anything changes.
    """
    sources: Json = {name: source} if weights is None else named_sources(source, weights)
    with _new(model, [*sources], weights) as adapters:
        for own, place in sources.items():
            adapters.load(
                place,
                name=own,
                trainable=trainable,
                dtype=dtype,
                ephemeral_gpu_offload=ephemeral_gpu_offload,
                pad_rank=pad_rank,
                strict=strict,
            )
    return adapters


@experimental
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
    and the coefficients their softmax at `temperature` (None: as stored); arXiv:2405.11157. The
    router is active, and adapters that were active stay so. Factors are float32 or wider. `Refused`
    before anything changes. PEFT cannot load a router that it saved.
    """
    with _extended(model, name) as adapters:
        arrows.load(adapters.state, folder, name, top_k=top_k, temperature=temperature)
    return adapters


@experimental
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
    """Route between adapters as experts: `adapterkit.arrow`, then `load_arrow`.

    `sources`, `general`: folders, Hub ids, or names of loaded adapters. `general` adapters are
    subtracted from each expert (GenKnowSub): exactly, whereas PEFT subtracts means of factors.
    `compat="peft"`: PEFT's prototypes and subtraction, from `seed`. `top_k` None: 3, or all experts
    if there are fewer. `Refused` before anything changes.
    """
    with _extended(model, name) as adapters:
        arrows.create(
            adapters.state,
            sources,
            name,
            general=general,
            top_k=top_k,
            temperature=temperature,
            compat=compat,
            seed=seed,
        )
    return adapters


@contextmanager
def _extended(model: nn.Module, name: str) -> Iterator[Adapters]:
    """The handle of a model, to which the block adds an adapter, active if it is the only one."""
    adapters = getattr(model, ATTRIBUTE, None)
    if adapters is None:
        with _new(model, name) as adapters:
            yield adapters
        return
    adapters.state.outside_rows("load_arrow")
    adapters.state.own_weights("load_arrow")
    yield adapters


@contextmanager
def _new(model: nn.Module, names: Names, weights: StrPath | None = None) -> Iterator[Adapters]:
    """The new handle of a model, to which the block adds its first adapters; they become active."""
    if hasattr(model, ATTRIBUTE):
        raise Refused(
            f"{type(model).__name__} has adapters already",
            expected="a model without adapters",
            where="model",
            hint="use the handle's attach and load, or its detach first",
            code="AK802",
        )
    adapters = Adapters(model)
    object.__setattr__(model, ATTRIBUTE, adapters)
    try:
        yield adapters
        adapters.activate(names, weights=weights)
    except BaseException:
        adapters.detach()
        raise
