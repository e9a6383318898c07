"""Models in a GGUF file, or in a split one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.adapters.formats.image_model import SingleFileModel
from adapterkit.bases.gguf.header import GgufFiles, GgufHeader, find_gguf, is_gguf_adapter
from adapterkit.bases.gguf.imatrix import ImportanceFile
from adapterkit.bases.gguf.model import GgufCheckpoint, open_gguf, open_image_gguf, open_plain_gguf
from adapterkit.bases.gguf.output import plan_gguf_files
from adapterkit.bases.images.base import OF_FOLDERS, images_in
from adapterkit.core.adapter.keys import CONFIG as ADAPTER_CONFIG
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.commands import command, line
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.core.inputs.base_door import GGUF, Base, has_type
from adapterkit.core.plan import Files, OutputFile, Step

if TYPE_CHECKING:
    from adapterkit.core.merge.job import MergeState

MODELFILE = "Modelfile"
# metadata of `general.sampling.`, and the parameters of a Modelfile that they are
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
}


@dataclass(frozen=True)
class GgufImageModel(SingleFileModel, GgufCheckpoint):
    """An image or video model in a GGUF file."""


@dataclass(frozen=True)
class GgufBase(Base):
    """A model of llama.cpp's, or an image model."""

    in_safetensors = False
    does: ClassVar = {
        "quantize": "bases.gguf.quantize:plan_gguf_quantization",
        "dequantize": "bases.gguf.quantize:plan_gguf_dequantization",
        "inspect": "verbs.look.gguf:inspect_gguf",
        "prepare merge": "bases.images.base:prepare_images",
        "merged files": "bases.gguf.base:merged_files",
        "run": "bases.gguf.base:model_to_run",
    }
    inapplicable: ClassVar = {
        "a base of safetensors": ("dtype", "compat", "dequantize", *OF_FOLDERS)
    }

    @cached_property
    def files(self) -> GgufFiles:
        files = find_gguf(self.folder)
        assert files is not None
        return files

    @cached_property
    def images(self) -> GgufImageModel | None:
        try:
            return None if has_type(self.folder) else _images_in(self.files)
        except AdapterkitError:
            return None

    @property
    def ending(self) -> str | None:
        return GGUF if len(self.files.names) == 1 else None

    def own(self, work: str) -> Callable[..., Any] | None:
        is_adapter = lambda: ADAPTER_CONFIG in self.folder.files() or is_gguf_adapter(self.files)
        return None if work == "inspect" and is_adapter() else super().own(work)

    def read(self, number: int = 0) -> Checkpoint:
        if number == 0 and getattr(self.folder, "single", None) is not None and self.images:
            return self.images  # read before, for the adapters
        images = _images_in(self.files, number)
        return images or open_gguf(self.files, number, by_table=True).checkpoint

    def read_for(self, is_enough: Callable[[Checkpoint], bool]) -> Checkpoint:
        """Open without a transformers model if the table of names is enough."""
        plain = open_plain_gguf(self.files)
        return plain if plain is not None and is_enough(plain) else self.read()


def _images_in(files: GgufFiles, number: int = 0) -> GgufImageModel | None:
    """The image or video model in a GGUF file; None for a language model."""
    checkpoint = open_image_gguf(files, number)
    return None if checkpoint is None else images_in(checkpoint, GgufImageModel)


def model_to_run(base: GgufBase) -> tuple[Checkpoint, dict[str, bytes], tuple[str, ...]] | None:
    """A language model whose config can run it, its tokenizer's files, and notes."""
    if base.images is not None:
        return None
    model = open_gguf(base.files, tokenizer=True)
    return model.checkpoint, model.texts, tuple(model.notes)


def merged_files(
    state: "MergeState", steps: Sequence[Step], file: str | None, imatrix: ImportanceFile | None
) -> tuple[tuple[OutputFile, ...], Files, Mapping[str, str]]:
    """The weight files of a merge's output, its small files, and extra entries for its receipt;
    `Refused` if the merge would change the base's metadata."""
    base = state.original
    assert isinstance(base, GgufCheckpoint)
    changed = {*state.config} - {"tie_word_embeddings"}
    changed = sorted(key for key in changed if state.config[key] != state.base.config.get(key))
    if changed:
        raise Refused(
            f"the merge changes {', '.join(changed)} of the model",
            expected="a merge that does not change the file's metadata",
            where=base.name,
            hint="merge into the original checkpoint, and convert that with llama.cpp's own tool",
            code="AK404",
        )
    shards = plan_gguf_files(
        base,
        steps,
        changed_type=state.options.changed_type,
        keep_scales=state.options.gguf_scales == "keep",
        importance=imatrix.sums if imatrix else {},
        name=file,
    )
    files = small_files(base, shards, state.notes, asked=state.options.modelfile)
    return shards, files, {"imatrix": imatrix.sha256} if imatrix else {}


def small_files(
    base: GgufCheckpoint, shards: Sequence[OutputFile], notes: list[str], *, asked: bool
) -> Files:
    """The small files of the output, including a Modelfile if requested; a note says how to load
    it. `Refused` for a Modelfile of an image model."""
    first = shards[0].file
    if isinstance(base, SingleFileModel):
        if asked:
            problem, expected = "--modelfile with an image model", "a language model"
            raise Refused(
                problem, expected=expected, where="options", hint="remove --modelfile", code="AK102"
            )
        notes.append(
            "to load it: ComfyUI-GGUF's node Unet Loader (GGUF), from models/diffusion_models; "
            f"stable-diffusion.cpp: {line(['--diffusion-model', first])}, -m for all parts"
        )
        return {}
    how = f"ollama create NAME -f {MODELFILE}" if asked else "Ollama: a Modelfile (--modelfile)"
    load = command("llama-cli -m", first)
    notes.append(f"to load it: {load}; {how}; LM Studio: put it into the folder of its models")
    header = next(iter(base.headers.values()))
    return {MODELFILE: modelfile(header, first)} if asked else {}


def modelfile(header: GgufHeader, name: str) -> bytes:
    """The text of a Modelfile for the file in the same folder, with the sampling settings of its
    metadata. Ollama's templates are Go's, and the one in a GGUF file is Jinja's: `ollama create`
    finds a matching one of its own.

    Source: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx.
    """
    lines = [f"FROM ./{name}"]
    if "tokenizer.chat_template" in header.metadata:
        lines.append("# the chat template is in the file")
    for key, parameter in SAMPLING.items():
        value = header.metadata.get(f"general.sampling.{key}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            lines.append(f"PARAMETER {parameter} {float(f'{value:.6g}'):g}")
    return ("\n".join(lines) + "\n").encode()
