"""transformers' Trainer on a model with adapters: checkpoints hold the adapters, not the base."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adapterkit.errors import Problems, Refused, shown
from adapterkit.options import StrPath
from adapterkit.runtime.guard import OWNER
from adapterkit.runtime.load import reading, writing
from adapterkit.runtime.parts.factors import FactorsPart
from adapterkit.runtime.state import State
from adapterkit.runtime.training import reference

ARGUMENTS = "training_args.bin"  # transformers' name


def trainer(state: State, cls: type) -> type:
    """A subclass of a transformers Trainer whose checkpoints hold what is trained; see
    `Adapters.trainer`."""
    trained(state)

    class AdapterTrainer(cls):
        def __init__(self, *args: Any, **kwargs: Any):
            model = kwargs.get("model", args[0] if args else None)
            _check_model(state, model)
            settings = (each for each in (*args, *kwargs.values()) if hasattr(each, "output_dir"))
            reference.check(state, cls, next(settings, None))
            parts = [p for name in trained(state) for _, p in state.adapters[name].parts()]
            with _accepted(state.model), reference.in_place_of_loaded(model, cls, parts):
                super().__init__(*args, **kwargs)
            if getattr(self.args, "disable_dropout", False):  # TRL's: PEFT's dropout is a module
                for part in parts:
                    if isinstance(part, FactorsPart):
                        part.dropout = 0.0
            setattr(self, OWNER, (state.model,))

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            if not self.is_fsdp_enabled:
                super().save_model(output_dir, _internal_call=_internal_call)
                return
            self._save(output_dir)  # what is sharded is gathered there, without the base
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            for name, place in _places(state, folder).items():
                writing.save(state, place, name)
            if not self.args.should_save:
                return
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            torch.save(self.args, folder / ARGUMENTS)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            restore(state, resume_from_checkpoint)

        def _load_best_model(self) -> None:
            restore(state, self.state.best_model_checkpoint)

    AdapterTrainer.__name__ = AdapterTrainer.__qualname__ = f"Adapter{cls.__name__}"
    return AdapterTrainer


def accelerate(state: State, accelerator: Any) -> None:
    """Let an Accelerator's `save_state` and `load_state` save and restore what is trained, in place
    of the base."""
    trained(state)

    def own(models: list[Any]) -> list[int]:
        bare = [accelerator.unwrap_model(each, keep_torch_compile=False) for each in models]
        return [i for i, each in enumerate(bare) if each is state.model]

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        for i in own(models)[: len(weights)]:  # of sharded models there are none
            del weights[i]
        for name, place in _places(state, Path(folder)).items():
            writing.save(state, place, name)

    def load(models: list[Any], folder: str) -> None:
        for i in own(models):
            del models[i]
        restore(state, folder)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    setattr(accelerator, OWNER, (*getattr(accelerator, OWNER, ()), state.model))


def trained(state: State) -> list[str]:
    """The adapters that are trained: active and trainable; `Refused` if there are none, or if
    several have names that are no folders'."""
    names = [name for name in state.active if state.adapters[name].trainable]
    errors = Problems(where="trainer")
    if not names:
        errors.add(
            "no active adapter is trainable",
            "one or more",
            "attach one, or load one with trainable=True, and activate it",
        )
    errors += [
        Refused(
            f"an adapter {shown(name)} beside others",
            expected="a name that can be a folder's",
            where="trainer",
            hint="each of several trained adapters has a folder of its name in a checkpoint",
        )
        for name in names
        if len(names) > 1 and (Path(name).name != name or "\\" in name)
    ]
    errors.raise_all()
    return names


@torch.no_grad()
def restore(state: State, folder: StrPath) -> None:
    """Give the adapters that are trained the values of a checkpoint; `Refused` where it does not
    fit, before anything changes."""
    pairs = []
    errors = Problems()
    for name, place in _places(state, Path(folder)).items():
        own = {
            (site.path, part.role): part
            for site, part in state.adapters[name].parts()
            if not isinstance(part, FactorsPart) or part.stored_rank  # of rank 0: not in a file
        }
        stored = reading.join(state, place)
        parts = {(path, p.role): p for path, p in reading.read_parts(state, stored, name, None)}
        errors += [
            Refused(
                f"{shown(path)} of {shown(name)}, either trained or stored",
                expected="the modules that are trained",
                where=str(place),
                hint="attach the adapter as it was when the checkpoint was written",
            )
            for path, _ in own.keys() ^ parts.keys()
        ]
        errors += [
            Refused(
                f"{shown(path)} of {shown(name)}: {parts[path, role]}",
                expected=str(part),
                where=str(place),
                hint="attach the adapter as it was when the checkpoint was written",
            )
            for (path, role), part in own.items()
            if (path, role) in parts and not part.fits(parts[path, role])
        ]
        pairs += [(own[key], parts[key]) for key in own.keys() & parts.keys()]
    errors.raise_all()
    for part, other in pairs:
        part.take(other)


def _places(state: State, folder: Path) -> dict[str, Path]:
    """Where the adapters that are trained are in a checkpoint: one in the folder itself, several in
    folders of their names."""
    names = trained(state)
    return {name: folder if len(names) == 1 else folder / name for name in names}


def _check_model(state: State, model: Any) -> None:
    if getattr(model, "_orig_mod", model) is not state.model:
        raise Refused(
            f"model {type(model).__name__}",
            expected="the model that has the adapters",
            where="trainer",
            hint="give model= the handle's model",
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        method = quantizer.quantization_config.quant_method
        raise Refused(
            f"a base quantized by {method}",
            expected="a quantization through which gradients flow",
            where="trainer",
            hint="load the base in nf4, or in 16 bits",
        )


@contextmanager
def _accepted(model: Any) -> Iterator[None]:
    """Let a Trainer take a quantized model: it asks for PEFT's adapters."""
    name = "_hf_peft_config_loaded"
    before = vars(model).get(name)
    setattr(model, name, True)
    try:
        yield
    finally:
        delattr(model, name)
        if before is not None:
            setattr(model, name, before)
