"""Find the files of a checkpoint folder that contain its weights: by an index, one file, or a
numbered set."""

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

from adapterkit.core.checkpoint.folder import RESERVED, Folder, inside
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.commands import command
from adapterkit.core.errors import AdapterkitError, Damaged, Problems, Refused, shown

T = TypeVar("T")
SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
# of diffusers' variants, too: model.safetensors.index.fp16.json
INDEX = re.compile(r".+\.safetensors\.index(\.\w+)?\.json")
# of diffusers' models, with a variant before or behind the number
OF_DIFFUSERS = re.compile(
    r"(diffusion_pytorch_model(?:\.\w+)?)(?:-\d{5}-of-\d{5})?(\.\w+)?\.safetensors"
)
NOT_A_MODEL = "adapter_model"  # the name of a PEFT adapter's weights
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# files of a tokenizer next to a model
TOKENIZER = re.compile(
    r"(tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)"
    r"|merges\.txt|.*\.(spm|tiktoken)|spiece\.model|sentencepiece.*\.model|chat_template.*)"
)
# a Trainer's pickles that hold no weights
TRAINER = ("training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state", "random_states")


def find_shards(
    folder: Folder, errors: Problems
) -> tuple[list[str] | None, dict | None, str | None]:
    """Return the readable files that contain the folder's weights, None if they cannot be
    determined; the content of their index; and its name. Every problem with them is added to
    `errors`."""
    own = [name for name in folder.files() if "/" not in name]
    index_name = _index_name(own, folder.name, errors)
    if index_name is None:
        return _unindexed(folder, own, errors), None, None
    index = noted(errors, read_json, folder, index_name)
    names = None if index is None else _indexed(index, index_name, folder, errors)
    return names, index, index_name


def noted(errors: Problems, read: Callable[..., T], *arguments: object) -> T | None:
    """Return the result of `read`; None if it raises, with the error added to `errors`."""
    try:
        return read(*arguments)
    except (Refused, Damaged) as error:
        errors.include(error)
        return None


def stem_of(names: Iterable[str]) -> str:
    """Return the name of a model's new shards before their number: the one that readers look for,
    `model` or `diffusion_pytorch_model`, with diffusers' variant."""
    found = OF_DIFFUSERS.fullmatch(next(iter(names), ""))
    return "model" if found is None else found[1] + (found[2] or "")


def index_filename(stem: str) -> str:
    """Return the file name of the index of shards with this stem."""
    name, _, variant = stem.partition(".")
    return f"{name}.safetensors.index.{variant + '.' if variant else ''}json"


def likely_shards(folder: Folder) -> list[str]:
    """Return the likely files of a model without an index: the one with the standard name, else
    all."""
    weights = weight_files(folder)
    return [name for name in SINGLE if name in weights][:1] or weights


def pickles(folder: Folder) -> list[str]:
    """Return the folder's own pickles that may contain weights."""
    names = (name for name in folder.files() if "/" not in name and name.endswith(PICKLES))
    return sorted(name for name in names if not name.startswith(TRAINER))


def weight_files(folder: Folder) -> list[str]:
    """Return the folder's own safetensors files that are not an adapter's."""
    names = (name for name in folder.files() if "/" not in name and name.endswith(".safetensors"))
    return sorted(name for name in names if not name.startswith(NOT_A_MODEL))


def _index_name(own: list[str], where: str, errors: Problems) -> str | None:
    """Return the index file; the standard name comes before a variant's."""
    indexes = sorted(filter(INDEX.fullmatch, own))
    standard = [f"{single}.index.json" for single in SINGLE if f"{single}.index.json" in indexes]
    if standard or any(single in own for single in SINGLE):
        return standard[0] if standard else None
    if len(indexes) > 1:  # other readers may choose another one
        errors.add(
            f"several indexes: {', '.join(map(shown, indexes))}",
            "one, or model.safetensors.index.json among them",
            "move the files of the other variants away",
            where=where,
            code="AK203",
        )
    return indexes[0] if indexes else None


def _unindexed(folder: Folder, own: list[str], errors: Problems) -> list[str] | None:
    """Return the files of a model without an index."""
    weights = weight_files(folder)
    for name in SINGLE:
        if name in weights:
            return [name]
    if len(weights) == 1:
        return weights
    if not weights:
        errors.append(_no_weights(folder, own))
        return None
    numbered = [NUMBERED.fullmatch(name) for name in weights]
    if all(numbered):
        sets = {(match[1], int(match[3])) for match in numbered if match}
        if len(sets) == 1 and len(weights) == next(iter(sets))[1]:
            return weights
    errors.add(
        f"{len(weights)} safetensors files and no index: "
        + ", ".join(shown(name) for name in weights[:6]),
        "model.safetensors.index.json, or one file, or a complete set "
        "name-0000i-of-0000n.safetensors",
        "add the index, or remove the files that are not part of the model",
        where=folder.name,
        code="AK203",
    )
    return None


def _indexed(index: dict, index_name: str, folder: Folder, errors: Problems) -> list[str] | None:
    """Return the files that an index names; None without a map of names."""
    where, files = f"{folder.name}/{index_name}", folder.files()
    weight_map = index.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        errors.append(_bad_index("no weight_map", "a map of keys to file names", where))
        return None
    if not isinstance(index.get("metadata", {}), dict):
        problem = "metadata that is no JSON object"
        errors.append(_bad_index(problem, "a map", where))
    names = sorted(set(weight_map.values()))
    wrong = {file: error for file in names if (error := _shard_name_error(file, files, where))}
    errors += wrong.values()
    single = index_name.removesuffix(".index.json")
    if single in SINGLE and single in files and single not in names:
        errors.add(
            f"{single} is next to an index that does not name it",
            "one of them (transformers would load the single file, the index names others)",
            "move away the one that is not the model",
            where=where,
            code="AK203",
        )
    by_folded: dict[str, list[str]] = {}
    for file in names:
        by_folded.setdefault(file.casefold(), []).append(file)
    for group in [group for group in by_folded.values() if len(group) > 1]:
        errors.add(
            f"file names that differ only in case: {', '.join(map(shown, group))}",
            "names that any file system keeps apart",
            "rename one",
            where=where,
            code="AK203",
        )
    return [file for file in names if file not in wrong]


def _bad_index(problem: str, expected: str, where: str) -> Damaged:
    return Damaged(problem, expected=expected, where=where, hint="restore the index", code="AK203")


def _shard_name_error(file: str, files: dict[str, int], where: str) -> AdapterkitError | None:
    """Return the error of a file name in an index that is invalid on any operating system, or
    None."""
    try:
        inside(file, where)
    except Refused as error:
        return error
    problem = expected = ""
    plain = "/" not in file and ":" not in file and file == file.rstrip(". ")
    if not plain or RESERVED.fullmatch(file):
        problem, expected = f"file name {shown(file)!r}", "a plain name of the folder itself"
    elif file.startswith(NOT_A_MODEL) or not file.endswith(".safetensors"):
        problem = f"the index names {shown(file)} as a shard"
        expected = "safetensors files of a model"
    if problem:
        hint = "restore the index"
        return Refused(problem, expected=expected, where=where, hint=hint, code="AK203")
    if file not in files:
        return Damaged(
            f"{shown(file)} is missing",
            expected="every file the index names",
            where=where,
            hint="download it",
            code="AK203",
        )
    return None


def _no_weights(folder: Folder, own: list[str]) -> AdapterkitError:
    """Return the refusal of a folder without weights, depending on its files."""
    if any(name.startswith(NOT_A_MODEL) for name in own):
        return Refused(
            "this is an adapter",
            expected="a model checkpoint",
            where=folder.name,
            hint="give a model; with adapters, give the base model first",
            code="AK206",
        )
    expected, hint = "safetensors files", "check the path"
    if names := pickles(folder):
        problem = f"the weights are pickles: {', '.join(shown(p) for p in names[:6])}"
        hint = (
            "convert them: AutoModel.from_pretrained(DIR).save_pretrained(OUT), or on the Hub "
            "use the convert Space"
        )
    elif any(name.endswith(".gguf") for name in own):
        problem = "this is a GGUF file"
        hint = f"make floats of it\n{command('adapterkit dequantize', folder.label, out='floats')}"
    else:
        problem, expected = "there are no safetensors files", "a model checkpoint"
    return Refused(problem, expected=expected, where=folder.name, hint=hint, code="AK206")
