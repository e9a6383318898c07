"""A diffusers pipeline: a folder of models, each in a folder of its own, named by
model_index.json."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from adapterkit.core.checkpoint.folder import Folder, LocalFolder, WithSubfolders, inside
from adapterkit.core.checkpoint.shards import pickles, weight_files
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.errors import AdapterkitError, MultipleErrors, Problems, Refused, shown
from adapterkit.core.inputs.base_door import INDEX

PART = re.compile(r"([a-z0-9_]+):(.+)", re.DOTALL)  # unet:ADAPTER
# model.fp16.safetensors, its shards, and their index
VARIANT = re.compile(
    r"(?:model|diffusion_pytorch_model)(?:\.(\w+))?(?:-\d{5}-of-\d{5})?(?:\.(\w+))?"
    r"\.safetensors(?:\.index(?:\.(\w+))?\.json)?"
)
DENOISER = re.compile(r"unet|prior|decoder|transformer(_\d+)?")
TEXT_ENCODER = re.compile(r"text_encoder(_\d+)?")


@dataclass(frozen=True)
class PipelineComponent:
    """A model of a pipeline."""

    name: str  # of its folder
    pipeline: Folder
    variant: str = ""  # of its weights, where there is one of that name

    @cached_property
    def folder(self) -> Folder:
        folder = cast(WithSubfolders, self.pipeline).subfolder(self.name)
        if not self.has_variant:
            return folder
        return folder.without(
            [n for n in folder.files() if self.variant != _variant(n) is not None]
        )

    @property
    def has_variant(self) -> bool:
        """Return whether there are weights of the requested variant."""
        files = cast(WithSubfolders, self.pipeline).subfolder(self.name).files()
        return bool(self.variant) and self.variant in map(_variant, files)

    @property
    def is_denoiser(self) -> bool:
        return DENOISER.fullmatch(self.name) is not None

    @property
    def is_text_encoder(self) -> bool:
        return TEXT_ENCODER.fullmatch(self.name) is not None

    @cached_property
    def as_base(self) -> Checkpoint:
        """The component as a base for converting adapters; its names are the model's."""
        return open_checkpoint(self.folder, 1)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors in this block name the component."""
        try:
            yield
        except AdapterkitError as error:
            for one in error.errors if isinstance(error, MultipleErrors) else (error,):
                one.problem = f"{self.name}: {one.problem}"
            raise


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's folder, its models by name, and missing models of its index."""

    folder: Folder
    parts: Mapping[str, PipelineComponent]
    absent: tuple[str, ...]

    @property
    def denoiser(self) -> Checkpoint | None:
        """The model that most adapters are for; None if no model has the name and can be read."""
        for part in filter(lambda part: part.is_denoiser, self.parts.values()):
            with suppress(AdapterkitError):
                return part.as_base
        return None

    def part(self, name: str) -> PipelineComponent:
        """A component with weights by its name; `Refused` for other names."""
        if name in self.parts:
            return self.parts[name]
        state = "lacks it, though its index names it" if name in self.absent else "has none"
        raise self.unknown(f"{shown(name)}: the pipeline {state}")

    def unknown(self, problem: str) -> Refused:
        return Refused(
            problem,
            expected=f"one of {', '.join(self.parts)}",
            where=self.folder.label,
            hint="give the whole pipeline that the adapter is for",
            code="AK103",
        )


def _variant(name: str) -> str | None:
    """The variant of a weight file or its index; "" for the unnamed one, None for other files."""
    match = VARIANT.fullmatch(name)
    return None if match is None else next(filter(None, match.groups()), "")


def read_pipeline(folder: Folder, variant: str | None = None) -> Pipeline:
    """Read the pipeline in a folder, with the weights of a variant where components have it;
    `Refused` or `Damaged` if the index names no models, and for components that are links, because
    these lead out of the pipeline."""
    index, files, errors = (
        read_json(folder, INDEX),
        folder.files(),
        Problems(where=folder.label, code="AK201"),
    )
    named = [name for name, value in index.items() if isinstance(value, list) and any(value)]
    parts, absent = {}, []
    for name in named:
        if any(file.startswith(f"{name}/") for file in files):
            part = PipelineComponent(name, folder, variant or "")
            if weight_files(part.folder) or pickles(part.folder):
                parts[name] = part
        elif isinstance(folder, LocalFolder) and (folder.root / inside(name, INDEX)).is_symlink():
            hint = "copy the pipeline with the targets of its links: cp -rL PIPELINE COPY"
            errors.add(f"{shown(name)} is a link", "folders of the pipeline itself", hint)
        else:
            absent.append(name)
    errors.raise_all()
    if not parts:
        raise Refused(
            f"{INDEX} names no model that is there",
            expected="a pipeline of diffusers, with its models",
            where=folder.label,
            hint="download all of it",
            code="AK201",
        )
    if variant and not any(part.has_variant for part in parts.values()):
        raise Refused(
            f"no part has weights of the variant {shown(variant)}",
            expected="a name such as fp16, of diffusion_pytorch_model.fp16.safetensors",
            where=folder.label,
            hint="remove --variant",
            code="AK201",
        )
    return Pipeline(folder, parts, tuple(absent))
