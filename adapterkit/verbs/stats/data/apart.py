"""Run tokenizers in a process with limits of time and memory, because strangers' tokenizers may be
arbitrarily slow and large. Records and ids pass through its pipes as JSON."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from adapterkit.core.checkpoint.folder import Folder, LocalFolder
from adapterkit.core.errors import AdapterkitError, MultipleErrors, Problems, Refused, shown
from adapterkit.core.records import Json
from adapterkit.verbs.stats.data import samples
from adapterkit.verbs.stats.data.records import Record
from adapterkit.verbs.stats.data.samples import Sample, Samples
from adapterkit.verbs.stats.data.templates import LimitedProcess, serve

SECONDS, RATE = 180.0, 20_000  # for all, and bytes of the data for each second more
MEMORY = 4 << 30  # bytes more than at its start, if the system can limit them


def tokenize_apart(folder: Folder, records: Sequence[list[Record]], options: Json) -> list[Samples]:
    """`tokenize_all` with the tokenizer of a model's folder."""
    rows = [[(one.kind, one.fields, one.where) for one in its] for its in records]
    most = (1 << 20) + sum(map(len, rows)) * (4096 + 48 * options["length"])
    with (
        tempfile.TemporaryDirectory() as copy,
        closing(LimitedProcess(__name__, MEMORY)) as process,
    ):
        try:
            for name in samples.tokenizer_names(folder):
                shutil.copyfile(folder.path(name), Path(copy, name))
        except OSError as error:
            raise _failed(f"cannot be read: {error.strerror}", folder.label) from error
        request = {"rows": rows, "options": options, "folder": copy, "label": folder.label}
        answer = process.answer(request, lambda size: SECONDS + size / RATE, lambda size: most)
    if not answer.endswith(b"\n"):
        reason = f"takes more than {SECONDS:g} s and 1 s for each {RATE:,} bytes of the data, or "
        raise _failed(f"{reason}{MEMORY >> 20} MiB, or its library ends", folder.label)
    errors, found = json.loads(answer)
    Problems(
        Refused(p, expected=e, where=w, hint=h, code="AK901") for p, e, w, h in errors
    ).raise_all()
    return [
        Samples([Sample(tuple(ids), tuple(labels), where) for ids, labels, where in its], *others)
        for its, *others in found
    ]


def _failed(reason: str, where: str) -> Refused:
    return Refused(
        f"the tokenizer {reason}",
        expected="a tokenizer that turns texts into ids",
        where=where,
        hint="save the tokenizer again, or give data with input_ids",
        code="AK901",
    )


def _answer(request: Json) -> tuple[list, list]:
    """The fields of each error, and the samples."""
    folder = LocalFolder(request["folder"])
    folder.label = request["label"]
    try:
        tokenizer = samples.load_tokenizer(folder)
        records = [[Record(*row) for row in its] for its in request["rows"]]
        found = samples.tokenize_all(records, tokenizer, request["options"])
    except MemoryError:
        raise
    except AdapterkitError as error:
        errors = error.errors if isinstance(error, MultipleErrors) else (error,)
        return [(one.problem, one.expected, one.where, one.hint) for one in errors], []
    except BaseException as error:  # a panic of Rust is no Exception
        reason = _failed(f"fails: {type(error).__name__}: {shown(error)}", folder.label)
        return [(reason.problem, reason.expected, reason.where, reason.hint)], []
    rows = [[(s.tokens, s.labels, s.where) for s in each.samples] for each in found]
    others = [(each.pad, each.notes, each.has_decoder) for each in found]
    return [], [(its, *other) for its, other in zip(rows, others, strict=True)]


if __name__ == "__main__":
    serve("transformers.models.auto.tokenization_auto", _answer)
