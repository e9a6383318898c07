"""A merge into a GGUF file: what differs from one into a folder of safetensors."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.checkpoint.hashes import sha256_of_file
from adapterkit.commands import command, line
from adapterkit.errors import AdapterkitError, Problems, Refused
from adapterkit.formats.one_file import OneFileModel
from adapterkit.gguf.beside.imatrix import Importance, read_imatrix
from adapterkit.gguf.beside.modelfile import modelfile
from adapterkit.gguf.model import GgufCheckpoint
from adapterkit.options import StrPath, flag_of
from adapterkit.plan import OutputFile, Step
from adapterkit.planning.inputs.sources import open_source
from adapterkit.planning.merge.job import MergeJob
from adapterkit.planning.outputs.folder_files import Files
from adapterkit.planning.outputs.gguf_model import plan_gguf_files
from adapterkit.verbs.merge import MergeOptions

MODELFILE = "Modelfile"
OPTIONS = ("touched_as", "scales", "modelfile")
OF_FOLDERS = ("max_shard_size", "tokenizer")
OF_SAFETENSORS = ("dtype", "compat", "dequantize", *OF_FOLDERS)


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
    options: MergeOptions, imatrix: ImportanceFile | None, *, is_gguf: bool, is_file: bool
) -> list[AdapterkitError]:
    """`Refused` for options that this kind of base has no use for."""
    errors = Problems(where="options", hint="remove it")
    if imatrix is not None and not is_gguf:
        errors.add("--imatrix with this base", "a base in a GGUF file")
    others = {
        "a base in a GGUF file": () if is_gguf else OPTIONS,
        "a base of safetensors": OF_SAFETENSORS if is_gguf else (),
        "a folder": OF_FOLDERS if is_file and not is_gguf else (),
    }
    for expected, names in others.items():
        for name in names:
            if getattr(options, name):
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
    loaded. `Refused` for one of an image model."""
    first = shards[0].file
    if isinstance(base, OneFileModel):
        if asked:
            problem, expected = "--modelfile with an image model", "a language model"
            raise Refused(problem, expected=expected, where="options", hint="remove --modelfile")
        notes.append(
            "to load it: ComfyUI-GGUF's node Unet Loader (GGUF), from models/diffusion_models; "
            f"stable-diffusion.cpp: {line(['--diffusion-model', first])}, -m where it has all parts"
        )
        return {}
    how = f"ollama create NAME -f {MODELFILE}" if asked else "Ollama: a Modelfile (--modelfile)"
    load = command("llama-cli -m", first)
    notes.append(f"to load it: {load}; {how}; LM Studio: put it into the folder of its models")
    header = next(iter(base.headers.values()))
    return {MODELFILE: modelfile(header, first)} if asked else {}
