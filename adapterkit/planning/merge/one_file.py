"""A merge into an image or video model in one file: what differs from one into a folder."""

from adapterkit.errors import AdapterkitError, Problems, listed
from adapterkit.formats.library import architectures
from adapterkit.formats.one_file import OneFileModel
from adapterkit.planning.merge.job import MergeJob

AVERAGES = "model_ema."  # copies of the weights that training averages


def absent_parts(job: MergeJob, model: OneFileModel) -> list[AdapterkitError]:
    """Refusals of modules of parts of the pipeline that are not in the file."""
    errors = Problems(where=model.name)
    others = sorted({*architectures()[model.architecture].components} - {*model.parts})
    for adapter in job.adapters:
        for part in others:
            names = [one.module for one in adapter.loras if one.module.startswith(f"{part}.")]
            if names and (wanted := list(filter(job.is_selected, names))):
                way_out = f'leave them out: --exclude "^{part}[.]"'
                errors.add(
                    f"{adapter.name} trains {len(wanted)} modules of {part}, which the file does "
                    f"not hold: {listed(wanted)}",
                    f"modules of {', '.join(model.parts)}",
                    way_out,
                )
    return errors


def file_notes(model: OneFileModel) -> list[str]:
    """What is to be said of the file."""
    parts = ", ".join(
        f"{name} ({part.prefix or 'no prefix'})" for name, part in model.parts.items()
    )
    notes = [f"{model.name} is a model of {model.architecture}: {parts}"]
    copies = sum(key.startswith(AVERAGES) for key in model.tensors)
    if copies:
        notes.append(
            f"{copies} tensors {AVERAGES}* are averages of the weights, which stay as they are: "
            "nothing is merged into them"
        )
    return notes
