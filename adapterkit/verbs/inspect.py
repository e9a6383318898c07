"""inspect: what a checkpoint or an adapter holds, from headers and JSON, and on request from the
factors."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.keys import CONFIG
from adapterkit.checkpoint.folder import Folder, LocalFolder
from adapterkit.checkpoint.shards import NOT_A_MODEL, pickles
from adapterkit.errors import Refused, shown
from adapterkit.hub.folder import HubFolder
from adapterkit.options import StrPath, checked
from adapterkit.planning.converted import ConvertedFolder, adapter_or_file
from adapterkit.planning.sources import open_model, open_source
from adapterkit.reports import pictures
from adapterkit.reports.adapter import inspect_adapter
from adapterkit.reports.checkpoint import MAX_NAMES, inspect_base, inspect_file

if TYPE_CHECKING:
    from adapterkit.plan import Progress


@checked()
def inspect(
    path: StrPath,
    *,
    base: StrPath | None = None,
    download: bool = False,
    headers: bool = False,
    plot: StrPath | None = None,
    progress: "Progress" = lambda done: None,
) -> dict[str, Any]:
    """What a base, an adapter or a .safetensors file holds, and what is wrong with it; a dict that
    `--json` prints as it is.

    Of every kind:
      inspect       1, the version of this schema
      kind          "base", "adapter" or "file"
      name, origin  the folder's name, and what a receipt would say of it (repo, revision)
      parameters    elements of all tensors; of a quantized base those of the storage
      bytes         of the weight files
      dtypes        {dtype: {tensors, parameters, bytes}}
      shards        [{file, bytes, tensors}]; tensors null where the header cannot be read
      architecture  {classes, model_type} from config.json, or null
      tied          {config, head_stored}: tie_word_embeddings (null: not said) and whether a head
                    is stored; null unless a base
      quantization  {found, config}, or null
      loads         {class, missing, misshapen} of a base: the class that transformers loads, and
                    how many parameters it makes up or refuses; null where it does not know the
                    model, and with `headers`
      readable      whether all files are there and could be read
      problems      [{found, expected, where, do}]
      modules       a LoRA's modules, else [] (of other types of adapters the config and the header
                    are told)
    Of an adapter:
      format, peft_type, base, revision, task_type, peft_version
      flags         {rslora, dora, lora_bias, bias, init, ensure_weight_tying, layer_replication,
                    target_parameters}
      modules_to_save, replaced (parameters that are replaced as a whole), tokens [{module, rows}]
      groups        [{modules, count, kind, rank, alpha, scale}], modules by their last component
                    and equal values
      statistics    whether the factors were read
    Of a module: module, kind ("module" or "embedding"), depth (wrapper levels inside it), parameter
    (known with `base`), experts, rank, alpha, scale, trained (b is not zero), norm (Frobenius, of
    scale * b @ a; of a stack over all experts; without DoRA's rescaling), effective_rank (exp of
    the entropy of the normalized squared singular values of b @ a, 0 for zero; of a stack the mean
    over experts that are not zero), relative (norm by the base weight's norm, with `base`). What is
    not known is null.

    Weights on the Hub are not read unless `download` is given, of a file of another tool only what
    tells ranks and scales; and with `headers` no factors are read anywhere (of an adapter with tens
    of thousands of modules they take minutes), and no model's class is built. `plot` draws the
    norms, relative ones with `base`, into a PNG file. Raises `Refused` where there is nothing to
    inspect or an option does not apply.
    """
    if plot is not None:
        pictures.check_plot(Path(plot))
    on = open_model(base) if base is not None else None
    folder = open_source(path)
    if CONFIG not in folder.files():
        folder = adapter_or_file(folder, on)
    kind = _kind(folder)
    if kind != "adapter":
        _refuse_options(folder, f"a {kind}, no adapter", base, plot)
        return inspect_base(folder, headers) if kind == "base" else inspect_file(folder)
    if headers:
        _refuse_options(folder, "headers alone (--headers)", base, plot, download)
    far = [
        source
        for source in (folder, on)
        if source is not None and not isinstance(_original(source), LocalFolder)
    ]
    if far and not download:
        _refuse_options(
            far[0], "weights on the Hub, which are read with --download only", base, plot
        )
    with_factors = not headers and (download or not far)
    if with_factors:  # in a dialect of PEFT's layout they may be other ones than PEFT would read
        folder = adapter_or_file(folder, on)
    result = inspect_adapter(folder, on, with_factors, progress)
    if plot is not None:
        pictures.draw(result, Path(plot))
    return result


def _original(folder: Folder) -> Folder:
    """The folder that was given."""
    return folder.source if isinstance(folder, ConvertedFolder) else folder


def _refuse_options(
    folder: Folder, problem: str, base: object, plot: object, download: bool = False
) -> None:
    """`Refused` where factors are asked about that there are not, or that are not read."""
    options = {"--base": base, "--plot": plot, "--download": download or None}
    names = " and ".join(name for name, value in options.items() if value is not None)
    if names:
        hint = f"remove {names}" + (", or give --download" if "download" in problem else "")
        raise Refused(
            problem,
            expected=f"an adapter whose factors are read, for {names}",
            where=folder.name,
            hint=hint,
        )


def _in_another_layout(folder: Folder) -> bool:
    from adapterkit.formats.detect import in_another_layout

    return in_another_layout(folder) is not None


def _kind(folder: Folder) -> str:
    if isinstance(folder, LocalFolder | HubFolder) and folder.single:
        if folder.single.endswith(".safetensors"):
            return "file"
        raise Refused(
            "not a .safetensors file",
            expected="a .safetensors file or a folder",
            where=folder.name,
            hint="check the path",
        )
    here = [name for name in folder.files() if "/" not in name]
    if CONFIG in here or any(name.startswith(NOT_A_MODEL) for name in here):
        return "adapter"
    if "config.json" not in here and _in_another_layout(folder):
        return "file"
    if pickles(folder) or any(
        name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json"))
        for name in here
    ):
        return "base"
    ends = (".safetensors", CONFIG)
    nested = sorted(
        {name.rpartition("/")[0] for name in folder.files() if name.endswith(ends) and "/" in name}
    )
    raise Refused(
        "neither a checkpoint nor an adapter",
        expected=f"safetensors files, config.json or {CONFIG}",
        where=folder.name,
        hint=f"name a subfolder: {', '.join(map(shown, nested[:MAX_NAMES]))}"
        if nested
        else "check the path",
    )
