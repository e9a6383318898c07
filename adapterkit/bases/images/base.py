"""Image and video models with their publisher's names, in one file or a folder of files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.errors import AdapterkitError, Problems, listed
from adapterkit.core.inputs.base_door import SAFETENSORS, Base

if TYPE_CHECKING:
    from adapterkit.adapters.formats.image_model import Model, SingleFileModel
    from adapterkit.core.merge.job import MergeState

AVERAGES = "model_ema."  # copies of the weights that training averages
OF_FOLDERS = ("max_shard_size", "tokenizer")


@dataclass(frozen=True)
class ImageBase(Base):
    """Safetensors whose config names no transformers model; an image model if its keys fit one."""

    does: ClassVar = {
        "quantize": "bases.images.quantize:plan_image_quantization",
        "prepare merge": "bases.images.base:prepare_images",
    }
    inapplicable_to_files: ClassVar = OF_FOLDERS

    @cached_property
    def images(self) -> "SingleFileModel | None":
        try:
            return _in_safetensors(open_checkpoint(self.folder))
        except AdapterkitError:
            return None

    @property
    def ending(self) -> str | None:
        is_file = getattr(self.folder, "single", None) is not None
        return SAFETENSORS if is_file and self.images is not None else None

    def own(self, work: str) -> Callable[..., Any] | None:
        return super().own(work) if work in self.does and self.images is not None else None

    def read(self, number: int = 0) -> Checkpoint:
        if number == 0 and getattr(self.folder, "single", None) is not None and self.images:
            return self.images  # read before, for the output's name
        checkpoint = open_checkpoint(self.folder, number)
        return _in_safetensors(checkpoint) or checkpoint


def _in_safetensors(checkpoint: Checkpoint) -> "SingleFileModel | None":
    from adapterkit.adapters.formats.image_model import SingleFileModel

    return images_in(checkpoint, SingleFileModel)


def images_in(checkpoint: Checkpoint, kind: "type[Model]") -> "Model | None":
    """The checkpoint as an image or video model with its publisher's names; None for others."""
    from adapterkit.adapters.formats.image_model import with_parts
    from adapterkit.adapters.formats.schema import MODEL

    model = with_parts(checkpoint, kind)
    # in a pipeline's folder the names are the model's
    is_plain = bool(checkpoint.config) and model and {*model.namings.values()} == {MODEL}
    return None if is_plain else model


def prepare_images(state: "MergeState", errors: Sequence[AdapterkitError]) -> None:
    """`Refused` with these errors, and for modules or components that the file lacks; notes on the
    file join the job's."""
    from adapterkit.adapters.formats.image_model import SingleFileModel
    from adapterkit.adapters.formats.library import architectures

    model = state.original
    if not isinstance(model, SingleFileModel):
        return
    errors = Problems(errors, where=model.name, code="AK401")
    known = {part for one in architectures().values() for part in one.components}
    for adapter in state.adapters:
        added = (one.target for one in adapter.others)
        names = [*(one.module for one in adapter.loras), *added, *adapter.replaced]
        for part in sorted(known):
            own = [one for one in names if one.startswith(f"{part}.") and state.is_selected(one)]
            own = [one for one in own if one not in model.modules]
            if own:
                which = "that" if part in model.parts else f"of {part}, which"
                errors.add(
                    f"{adapter.name} trains {len(own)} modules {which} the file does not have: "
                    f"{listed(own)}",
                    f"modules of {', '.join(model.parts)} ({model.architecture})",
                    "leave them out with --exclude"
                    if part in model.parts
                    else f'leave them out: --exclude "{part}[.].*"',
                )
    errors.raise_all()
    state.notes += file_notes(model)


def file_notes(model: "SingleFileModel") -> list[str]:
    """Notes about the file."""
    parts = ", ".join(
        f"{name} ({part.prefix or 'no prefix'})" for name, part in model.parts.items()
    )
    notes = [f"{model.name} is a model of {model.architecture}: {parts}"]
    copies = sum(key.startswith(AVERAGES) for key in model.tensors)
    if copies:
        notes.append(
            f"{copies} tensors {AVERAGES}* are averages of the weights, which do not change: "
            "nothing is merged into them"
        )
    return notes
