"""A transformers model whose buffers are real and whose parameters are on the meta device, until
they are read from the shards."""

import contextlib
import copy
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import AdapterkitError, Problems, Refused, shown
from adapterkit.core.system.memory import return_memory
from adapterkit.core.weights.codec import stored_parts
from adapterkit.core.weights.decoded import decoded_view
from adapterkit.core.weights.names import Names
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.core.weights.safe_config import closed


class StoredModel:
    """The model of a checkpoint, as transformers builds it: in `dtype`, else its config's, or that
    of its first stored floats; in eval mode, without a cache.

    Without `buffers` no weights are read. `Refused` for a model that transformers does not know or
    cannot build, and for parameters of another shape."""

    def __init__(
        self,
        base: Checkpoint,
        sources: Sources,
        device: torch.device,
        *,
        buffers: bool = True,
        dtype: torch.dtype | None = None,
        reader: type[LocalReader] = LocalReader,
    ):
        self.base, self.device, self.notes = decoded_view(base), device, []
        self.names = Names(self.base, build_model=True, notes=self.notes)
        skeleton = self.names.model
        if skeleton is None:
            reason = f": {self.notes[-1].splitlines()[0]}" if self.notes else ""
            raise Refused(
                f"transformers has no model of type {shown(base.config.get('model_type'))}{reason}",
                expected="a model that transformers can build",
                where=base.name,
                hint="update transformers",
                code="AK405",
            )
        config = copy.deepcopy(skeleton.model.config)
        self.dtype = dtype or self._dtype(config)
        self.model = _without_data(type(skeleton.model), config, self.dtype)
        self.model.requires_grad_(False)
        self._reader = reader(sources, device, dtype=None)
        self.as_stored: set[str] = set()
        self._meta = dict(self.model.named_parameters(remove_duplicate=False))
        self._stored, self._absent = self._find_parameters()
        self.stored_buffers = self._find_buffers()
        for name in sorted(self.stored_buffers if buffers else (), key=self._files):
            buffer = self.model.get_buffer(name)
            stored = self.stored_buffers[name]
            buffer.copy_(stored.read(replace(self._reader, device=buffer.device)))

    def _dtype(self, config: Any) -> torch.dtype:
        if isinstance(config.dtype, torch.dtype):
            return config.dtype
        stored = (spec.dtype for spec in self.base.tensors.values())
        return dtypes.torch_dtype(next((d for d in stored if d in dtypes.FLOATS), "F32"))

    def _find_parameters(self) -> tuple[dict[str, StoredParameter], set[str]]:
        stored, absent = {}, set()
        errors = Problems()
        for name, value in self._meta.items():
            try:
                parameter = self.names.parameter(name)
            except AdapterkitError as error:
                errors.append(error)
                continue
            if parameter is None:
                absent.add(name)
                continue
            if parameter.shape != tuple(value.shape):
                error = Refused(
                    f"{shown(name)} has shape {parameter.shape}",
                    expected=str(tuple(value.shape)),
                    where=self.base.name,
                    hint="fix the config",
                    code="AK405",
                )
                errors.append(error)
            stored[name] = StoredParameter.of(parameter, self.base.tensors)
        errors.raise_all()
        return stored, absent

    def _find_buffers(self) -> dict[str, StoredParameter]:
        """The stored buffers, such as those of batch norms."""
        stored = {}
        for name, buffer in self.model.named_buffers():
            parameter = self.names.parameter(name)
            if parameter is not None and parameter.shape == tuple(buffer.shape):
                stored[name] = StoredParameter.of(parameter, self.base.tensors)
        return stored

    def _files(self, name: str) -> list[str]:
        """The files of a parameter or a buffer, in reading order."""
        stored = self.stored_buffers.get(name) or self._stored.get(name)
        specs = stored.reads if stored is not None else ()
        return [part.file for spec in specs for part in stored_parts(spec)]

    def reads(self, parts: Iterable[Iterable[str]]) -> list[str]:
        """The files in reading order if the buffers are loaded first, then these groups of
        parameters; a file appears twice if another one is read in between."""
        order = [self.stored_buffers, *parts]
        files = [
            f
            for names in order
            for name in sorted(names, key=self._files)
            for f in self._files(name)
        ]
        return [name for name, _ in itertools.groupby(files)]

    def stored_parameter(self, name: str) -> StoredParameter | None:
        """The stored tensors of a parameter or a buffer; None if it is not stored."""
        return self._stored.get(name) or self.stored_buffers.get(name)

    def absent(self) -> list[str]:
        """Parameters that are not stored."""
        return [name for name in self._meta if name in self._absent]

    def parameters(self, module: str = "") -> list[str]:
        """Names of a module's parameters."""
        prefix = f"{module}." if module else ""
        within = self.model.get_submodule(module).named_parameters(remove_duplicate=False)
        return [f"{prefix}{name}" for name, _ in within]

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes of parameters in memory."""
        return sum(self._meta[name].numel() * self._meta[name].element_size() for name in names)

    def load(self, names: Iterable[str], device: torch.device) -> None:
        """Read parameters from the shards, one after the other; tied ones share their memory, those
        not stored are zero. Those of `as_stored` keep the dtype that they are stored in."""
        loaded: dict[int, nn.Parameter] = {}
        for name in sorted(names, key=self._files):
            meta = self._meta[name]
            if id(meta) not in loaded:
                stored = self._stored.get(name)
                if stored is None:
                    value = torch.zeros_like(meta, device=device)
                else:
                    dtype = None if name in self.as_stored else meta.dtype
                    value = stored.read(replace(self._reader, device=device, dtype=dtype))
                loaded[id(meta)] = nn.Parameter(value, requires_grad=False)
            self._set(name, loaded[id(meta)])

    def free(self, names: Iterable[str]) -> None:
        """Free the values of parameters, and the memory that computing with them has left."""
        for name in names:
            self._set(name, self._meta[name])
        return_memory(0)

    @contextlib.contextmanager
    def buffers_on_device(self, module: nn.Module) -> Iterator[None]:
        """Move a module's buffers to the model's device inside the context."""
        before = [
            (part, name, buffer)
            for part in module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None and buffer.device != self.device
        ]
        for part, name, buffer in before:
            part._buffers[name] = buffer.to(self.device)
        try:
            yield
        finally:
            for part, name, buffer in before:
                part._buffers[name] = buffer

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        parent, _, leaf = name.rpartition(".")
        self.model.get_submodule(parent)._parameters[leaf] = parameter


def _without_data(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model of transformers in eval mode whose parameters are on the meta device."""
    from transformers.initialization import no_init_weights

    _disable_cache(config)
    with no_init_weights(), _parameters_on_meta(), closed():
        model: Any = cls._from_config(config, dtype=dtype)
        model.tie_weights(recompute_mapping=False)
    _keep_wide(model, model._get_dtype_plan(dtype))
    return model.eval()


def _disable_cache(config: Any) -> None:
    parts: list[Any] = [config, *(getattr(config, key, None) for key in config.sub_configs)]
    for part in parts:
        if getattr(part, "use_cache", False):
            part.use_cache = False


def _keep_wide(model: nn.Module, plan: dict[str, torch.dtype]) -> None:
    """Keep parameters in float32 if transformers does so in a 16-bit model."""
    patterns = {re.compile(key.replace("*", ".*")): dtype for key, dtype in plan.items()}
    for name, parameter in list(model.named_parameters()):
        dtype = next((d for pattern, d in patterns.items() if pattern.search(name)), None)
        if dtype is not None:
            parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Build modules with their buffers' values and without those of their parameters, inside the
    context.

    (Under `torch.device("meta")`, buffers that the code computes would have no values either.)"""
    original = nn.Module.register_parameter
    moved: Any = WeakIdKeyDictionary()  # tied ones stay one

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            if param not in moved:
                moved[param] = nn.Parameter(param.detach().to("meta"), param.requires_grad)
            param = moved[param]
        original(self, name, param)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = original
