"""A merge into an image or video model in one file: what differs from one into a folder."""

from adapterkit.errors import AdapterkitError, Problems, listed
from adapterkit.formats.library import architectures
from adapterkit.formats.one_file import OneFileModel
from adapterkit.planning.adapters.added_deltas import added_deltas
from adapterkit.planning.merge.job import MergeJob

AVERAGES = "model_ema."  # copies of the weights that training averages


def absent_parts(job: MergeJob, model: OneFileModel) -> list[AdapterkitError]:
    """Refusals of modules of the pipeline that are not in the file, or parts of it."""
    errors = Problems(where=model.name)
    known = {part for one in architectures().values() for part in one.components}
    for adapter in job.adapters:
        added = (one.module.name for one in added_deltas(adapter.folder, adapter.number))
        names = [*(one.module for one in adapter.loras), *added, *adapter.replaced]
        for part in sorted(known):
            own = [one for one in names if one.startswith(f"{part}.") and job.is_selected(one)]
            own = [one for one in own if one not in model.modules]
            if own:
                which = "that" if part in model.parts else f"of {part}, which"
                errors.add(
                    f"{adapter.name} trains {len(own)} modules {which} the file does not hold: "
                    f"{listed(own)}",
                    f"modules of {', '.join(model.parts)} ({model.architecture})",
                    "leave them out with --exclude"
                    if part in model.parts
                    else f'leave them out: --exclude "^{part}[.]"',
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
