"""A merge into a GGUF file: what differs from one into a folder of safetensors."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.hashes import sha256_of_file
from adapterkit.errors import AdapterkitError, Problems, Refused, shown
from adapterkit.gguf.header import ENDING, find_gguf
from adapterkit.gguf.imatrix import Importance, read_imatrix
from adapterkit.gguf.model import GgufCheckpoint
from adapterkit.gguf.modelfile import modelfile
from adapterkit.options import StrPath, flag_of
from adapterkit.plan import OutputFile, Step
from adapterkit.planning.inputs.sources import open_source
from adapterkit.planning.merge.job import MergeJob
from adapterkit.planning.outputs.folder_files import Files
from adapterkit.planning.outputs.gguf_model import plan_gguf_files
from adapterkit.verbs.merge import MergeOptions

MODELFILE = "Modelfile"
OPTIONS = ("touched_as", "scales", "modelfile")
FOLDER_OPTIONS = ("dtype", "max_shard_size", "compat", "dequantize", "tokenizer")


def output_file(base: Folder, out: StrPath) -> str | None:
    """The name of an output that is one file, as the base is; `Refused` for other names."""
    files, name = find_gguf(base), re.split(r"[/\\\\:]", str(out))[-1]
    is_file = files is not None and len(files.names) == 1
    if name.lower().endswith(ENDING) == is_file:
        return name if is_file else None
    problem = f"--out {shown(out)} for a base that is {'one' if is_file else 'no single'} file"
    raise Refused(
        problem,
        expected=f"a name that ends in {ENDING}" if is_file else "a folder",
        where="--out",
        hint=f"give --out {shown(out)}{ENDING}" if is_file else "give the name of a folder",
    )


@dataclass(frozen=True)
class ImportanceFile:
    """An importance matrix and the hash of its file."""

    sums: Importance
    sha256: str


def read_importance(text: StrPath) -> ImportanceFile:
    """`Refused` or `Damaged` for what is no such file."""
    folder = open_source(text)
    names = [name for name in folder.files() if "/" not in name]
    if len(names) != 1:
        raise Refused(
            f"a folder of {len(names)} files",
            expected="one file of llama-imatrix",
            where=folder.label,
            hint="give the path of the file itself",
        )
    return ImportanceFile(read_imatrix(folder, names[0]), sha256_of_file(folder.path(names[0])))


def options_of_others(
    options: MergeOptions, imatrix: ImportanceFile | None, is_gguf: bool
) -> list[AdapterkitError]:
    """`Refused` for options that this kind of base has no use for."""
    errors = Problems(where="options", hint="remove it")
    if imatrix is not None and not is_gguf:
        errors.add("--imatrix with this base", "a base in a GGUF file")
    for name in FOLDER_OPTIONS if is_gguf else OPTIONS:
        if getattr(options, name):
            expected = "a base of safetensors" if is_gguf else "a base in a GGUF file"
            errors.add(f"{flag_of(name)} with this base", expected)
    return errors


def gguf_shards(
    job: MergeJob,
    base: GgufCheckpoint,
    steps: Sequence[Step],
    file: str | None,
    imatrix: ImportanceFile | None,
) -> tuple[OutputFile, ...]:
    """The files of the output; `Refused` for what would change their metadata."""
    changed = {*job.config} - {"tie_word_embeddings"}
    changed = sorted(key for key in changed if job.config[key] != job.base.config.get(key))
    if changed:
        raise Refused(
            f"the merge changes {', '.join(changed)} of the model",
            expected="a merge that leaves the metadata of the file as they are",
            where=base.name,
            hint="merge into the original checkpoint, and convert that with llama.cpp's own tool",
        )
    return plan_gguf_files(
        base,
        steps,
        touched_as=job.options.touched_as,
        keep_scales=job.options.scales == "keep",
        importance=imatrix.sums if imatrix else {},
        name=file,
    )


def files_beside(
    base: GgufCheckpoint, shards: Sequence[OutputFile], notes: list[str], *, asked: bool
) -> Files:
    """The small files of the output, a Modelfile where it is asked for, and a note on how it is
    loaded."""
    first = shards[0].file
    how = f"ollama create NAME -f {MODELFILE}" if asked else "Ollama: a Modelfile (--modelfile)"
    notes.append(
        f"to load it: llama-cli -m {first}; {how}; LM Studio: put it into the folder of its models"
    )
    header = next(iter(base.headers.values()))
    return {MODELFILE: modelfile(header, first)} if asked else {}
