"""transformers' Trainer on a model with adapters: checkpoints contain only the adapters."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.core.errors import Problems, Refused, shown
from adapterkit.core.inputs.sources import open_adapter
from adapterkit.core.options import StrPath
from adapterkit.runtime.guard import OWNER
from adapterkit.runtime.load import reading, writing
from adapterkit.runtime.load.placing import PatchMaker
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.quantized import quantization_of
from adapterkit.runtime.sharding import full_tensor, is_sharded, spread
from adapterkit.runtime.site import CHILD, Patch, Site, owner
from adapterkit.runtime.state import State

ARGUMENTS = "training_args.bin"  # transformers' name


def trainer(state: State, cls: type) -> type:
    """A subclass of a Trainer whose checkpoints contain the trained adapters; see
    `Adapters.trainer`."""
    trained(state)

    class AdapterTrainer(cls):
        def __init__(self, *args: object, **kwargs: object):
            model = kwargs.get("model", args[0] if args else None)
            _check_model(state, model)
            settings = (each for each in (*args, *kwargs.values()) if hasattr(each, "output_dir"))
            check_reference(state, cls, next(settings, None))
            patches = [p for name in trained(state) for _, p in state.adapters[name].patches()]
            with _accepted(state.model), reference_from_model(model, cls, patches):
                super().__init__(*args, **kwargs)
            if getattr(self.args, "disable_dropout", False):  # TRL's: PEFT's dropout is a module
                for patch in patches:
                    if isinstance(patch, FactorsPatch):
                        patch.dropout = 0.0
            setattr(self, OWNER, (state.model,))

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            if not self.is_fsdp_enabled:
                super().save_model(output_dir, _internal_call=_internal_call)
                return
            self._save(output_dir)  # gathers sharded adapters, without the base
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

        def _save(self, output_dir: str | None = None, state_dict: object = None) -> None:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            for name, place in _places(state, folder).items():
                writing.save(state, place, name)
            if not self.args.should_save:
                return
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            torch.save(self.args, folder / ARGUMENTS)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
            restore(state, resume_from_checkpoint)

        def _load_best_model(self) -> None:
            restore(state, self.state.best_model_checkpoint)

    AdapterTrainer.__name__ = AdapterTrainer.__qualname__ = f"Adapter{cls.__name__}"
    return AdapterTrainer


def accelerate(state: State, accelerator: Any) -> None:
    """Let an Accelerator save and restore the trained adapters; see `Adapters.accelerate`."""
    trained(state)

    def own(models: list[nn.Module]) -> list[int]:
        bare = [accelerator.unwrap_model(each, keep_torch_compile=False) for each in models]
        return [i for i, each in enumerate(bare) if each is state.model]

    def save(models: list[nn.Module], weights: list[object], folder: str) -> None:
        for i in own(models)[: len(weights)]:  # sharded models have none
            del weights[i]
        for name, place in _places(state, Path(folder)).items():
            writing.save(state, place, name)

    def load(models: list[nn.Module], folder: str) -> None:
        for i in own(models):
            del models[i]
        restore(state, folder)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    setattr(accelerator, OWNER, (*getattr(accelerator, OWNER, ()), state.model))


def trained(state: State) -> list[str]:
    """The active trainable adapters; `Refused` if there are none, or if several have names that
    cannot be folders'."""
    names = [name for name in state.active if state.adapters[name].trainable]
    errors = Problems(where="trainer", code="AK805")
    if not names:
        errors.add(
            "no active adapter is trainable",
            "one or more",
            "attach one, or load one with trainable=True, and activate it",
        )
    for name in names:
        if len(names) > 1 and (Path(name).name != name or "\\" in name):
            hint = "each of several trained adapters has a folder of its name in a checkpoint"
            problem = f"an adapter {shown(name)} among several"
            errors.add(problem, "a name that can be a folder's", hint)
    errors.raise_all()
    return names


@torch.no_grad()
def restore(state: State, folder: StrPath) -> None:
    """Restore the trained adapters from a checkpoint; `Refused` before anything changes."""
    pairs = []
    errors = Problems(
        hint="attach the adapter with the config that it had at the checkpoint", code="AK805"
    )
    for name, place in _places(state, Path(folder)).items():
        own = {
            (site.path, patch.role): patch
            for site, patch in state.adapters[name].patches()
            if not isinstance(patch, FactorsPatch) or patch.stored_rank  # of rank 0: not in a file
        }
        stored = reading.join_folder(state, open_adapter(place))
        maker = PatchMaker(state, name, stored.config, None)
        patches = {(path, patch.role): patch for path, patch in reading.read_patches(maker, stored)}
        for path, _ in own.keys() ^ patches.keys():
            problem = f"{shown(path)} of {shown(name)}, either trained or stored"
            errors.add(problem, "the modules that are trained", where=str(place))
        for (path, role), patch in own.items():
            if (other := patches.get((path, role))) is not None and not patch.fits(other):
                problem = f"{shown(path)} of {shown(name)}: {other}"
                errors.add(problem, str(patch), where=str(place))
        pairs += [(own[key], patches[key]) for key in own.keys() & patches.keys()]
    errors.raise_all()
    for patch, other in pairs:
        patch.take(other)


def _places(state: State, folder: Path) -> dict[str, Path]:
    """The folders of the trained adapters in a checkpoint: a single one in the folder itself,
    several by name."""
    names = trained(state)
    return {name: folder if len(names) == 1 else folder / name for name in names}


def _check_model(state: State, model: object) -> None:
    if getattr(model, "_orig_mod", model) is not state.model:
        raise Refused(
            f"model {type(model).__name__}",
            expected="the model that has the adapters",
            where="trainer",
            hint="give model= the handle's model",
            code="AK805",
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        method = quantizer.quantization_config.quant_method
        raise Refused(
            f"a base quantized by {method}",
            expected="a quantization through which gradients flow",
            where="trainer",
            hint="load the base in nf4, or in 16 bits",
            code="AK805",
        )


@contextmanager
def _accepted(model: object) -> Iterator[None]:
    """Make a Trainer accept a quantized model, for which it requires PEFT's adapters."""
    name = "_hf_peft_config_loaded"
    before = vars(model).get(name)
    setattr(model, name, True)
    try:
        yield
    finally:
        delattr(model, name)
        if before is not None:
            setattr(model, name, before)


LOADER = "create_model_from_path"  # TRL's, by which its trainers load a reference
HEAD = "add_fused_lm_head"  # TRL's, of trainers that multiply by the head's weight themselves

Values = list[tuple[Patch, str, Tensor]]  # names of parameters and buffers in patches


class Reference(nn.Module):
    """A model with the initial values of its adapters: calls run the model with those values.

    It has no parameters. TRL changes the forward of a model that it considers its own; this runs
    the model's own forward, which TRL has changed as well."""

    def __init__(self, model: nn.Module, values: Values):
        super().__init__()
        # in a tuple: a child would have the model's parameters
        self._policy = (model,)
        self._values = [(patch, name, value.clone()) for patch, name, value in values]

    def __call__(self, *args: object, **kwargs: object) -> Any:
        with self._as_it_was():
            return self._policy[0](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_policy":  # before there is one
            raise AttributeError(name)
        return getattr(self._policy[0], name)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Keep the versions of the parameters, which backward compares."""
        # by name: FSDP2 puts other parameters into the patches
        before = [(_tensor(patch, name), value) for patch, name, value in self._values]
        present = [_exchange(now, value) for now, value in before]
        try:
            yield
        finally:
            for (now, _), value in zip(before, present, strict=True):
                _exchange(now, value)


def current_values(patches: list[Patch]) -> Values:
    """The current values of patches; no copies."""
    return [
        (patch, name, value.data) for patch in patches for name, value in patch.tensors().items()
    ]


def _tensor(patch: Patch, name: str) -> Tensor:
    return getattr(*owner(patch, name))


def _exchange(tensor: Tensor, value: Tensor) -> Tensor:
    """Set a tensor to a full value, and return the old one."""
    if is_sharded(tensor):
        own: Tensor = full_tensor(tensor.detach()).clone()
        new: Any = spread(value.to(tensor.device), tensor)
        # in place: FSDP2 gathers from memory of its own
        tensor.to_local().data.copy_(new.to_local())
        return own
    own, tensor.data = tensor.data, value.to(tensor.device)
    return own


@contextmanager
def reference_from_model(model: Any, cls: type, patches: list[Patch]) -> Iterator[None]:
    """While a TRL trainer is created, replace the reference that it would load by the model itself
    with its adapters' current values."""
    values = current_values(patches)
    own_path = getattr(getattr(model, "config", None), "_name_or_path", "")
    loaders = [(vars(module), vars(module)[LOADER]) for module in _modules(cls, LOADER)]
    for table, load in loaders:
        table[LOADER] = lambda path, load=load, **settings: (
            Reference(model, values) if path == own_path else load(path, **settings)
        )
    try:
        yield
    finally:
        for table, load in loaders:
            table[LOADER] = load
        for patch, name, value in values:  # TRL casts what is trained on quantized bases
            tensor = _tensor(patch, name)
            if tensor.dtype != value.dtype:
                tensor.data = value


def check_reference(state: State, cls: type, arguments: object) -> None:
    """`Refused` for settings with which a TRL trainer would ignore the adapters."""
    errors = Problems(where="trainer", code="AK805")
    if getattr(arguments, "use_vllm", False):
        errors.add(
            "use_vllm: TRL sends vLLM the base's weights alone",
            "generation by the model",
            "remove use_vllm",
        )
    if getattr(arguments, "sync_ref_model", False):
        errors.add(
            "sync_ref_model: the reference is the model with the initial values of its adapters",
            "a fixed reference",
            "remove sync_ref_model, or give ref_model= another model",
        )
    if _modules(cls, HEAD) and _acts_on_head(state):
        errors.add(
            f"adapters on the head, whose weight {cls.__name__} multiplies by itself",
            "adapters on other modules: those on the head would do nothing",
            "exclude the head from targets, modules_to_save and tied trainable_tokens",
        )
    errors.raise_all()


def _modules(cls: type, name: str) -> list[Any]:
    """The modules of a trainer's class and its bases that use a function of TRL."""
    modules = dict.fromkeys(sys.modules.get(each.__module__) for each in inspect.getmro(cls))
    return [module for module in modules if name in vars(module or object)]


def _acts_on_head(state: State) -> bool:
    ask: Any = getattr(state.model, "get_output_embeddings", None)
    head = None if ask is None else ask()
    site = None if head is None else head._modules.get(CHILD)
    return isinstance(site, Site) and any(name in site.patches for name in state.active)


BITSANDBYTES = ("Linear4bit", "Linear8bitLt")


def prepare_for_kbit_training(
    model: nn.Module,
    *,
    gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Make a base ready for QLoRA (arXiv:2305.14314), in place: parameters are frozen, those in 16
    bits become float32, and, if layers are quantized, gradient checkpointing saves memory.

    With other tools than bitsandbytes all parameters keep their dtype, because only its layers cast
    their inputs. Existing adapters do not change. `Refused` for a model without gradient
    checkpointing. Unlike PEFT's prepare_model_for_kbit_training, checkpoints are not reentrant
    unless the keywords say so."""
    layers = [known for known in map(quantization_of, model.modules()) if known is not None]
    transformer: Any = model
    # its name before transformers 5.24
    old = getattr(model, "gradient_checkpointing_enable", None)
    enable = getattr(model, "activation_checkpointing_enable", old)
    is_able = enable is not None and transformer.supports_gradient_checkpointing
    if layers and gradient_checkpointing and not is_able:
        raise Refused(
            f"{type(model).__name__} has no gradient checkpointing",
            expected="a model of transformers that has",
            where="prepare_for_kbit_training",
            hint="give gradient_checkpointing=False",
            code="AK805",
        )
    widens = _method(model) in (None, "bitsandbytes") and all(
        known.matches in BITSANDBYTES for known in layers
    )
    adapters = {id(p) for path, p in model.named_parameters() if CHILD in path.split(".")}
    for parameter in model.parameters():
        if id(parameter) in adapters:
            continue
        parameter.requires_grad_(False)
        narrow = parameter.dtype in (torch.float16, torch.bfloat16)
        if narrow and widens and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(torch.float32)
    if layers and gradient_checkpointing and enable is not None:
        transformer.enable_input_require_grads()
        enable(gradient_checkpointing_kwargs or {"use_reentrant": False})
    return model


def _method(model: nn.Module) -> str | None:
    """The quantization method of the model according to transformers."""
    method = getattr(model, "quantization_method", None)
    return None if method is None else str(getattr(method, "value", method))
