"""inspect: what a checkpoint or an adapter holds. Headers and JSON tell most of it; of an adapter the factors are read too.

Nothing that is wrong with the files ends an inspection: it becomes a problem of the result, in the words in which a merge would
refuse it. Only a path that holds nothing to inspect is refused.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import dtypes
from adapterkit.adapter import CONFIG, Adapter, Lora, scan_adapter
from adapterkit.checkpoint.folder import Folder, LocalFolder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import (
    NOT_A_MODEL,
    Scan,
    no_model,
    other_lora,
    pickles,
    scan_checkpoint,
    weight_files,
)
from adapterkit.errors import Damaged, Refused, shown
from adapterkit.ops import inspect_report
from adapterkit.ops.settings import printable
from adapterkit.ops.sources import open_model, open_source
from adapterkit.options import StrPath, checked
from adapterkit.weights.detect import CONFIG_KEYS, check_not_quantized

if TYPE_CHECKING:
    from adapterkit.ops.inspect_factors import Join
    from adapterkit.plan import Progress  # with torch, which headers do not need

VERSION = 1  # of the result's schema
SHOWN = 6  # names listed in one problem
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_layer|output|head)\.weight$")


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
    """What a base, an adapter or a .safetensors file holds, and what is wrong with it; a dict that `--json` prints as it is.

    Of every kind:
      inspect       1, the version of this schema
      kind          "base", "adapter" or "file"
      name, origin  the folder's name, and what a receipt would say of it (repo, revision)
      parameters    elements of all tensors; of a quantized base those of the storage
      bytes         of the weight files
      dtypes        {dtype: {tensors, parameters, bytes}}
      shards        [{file, bytes, tensors}]; tensors null where the header cannot be read
      architecture  {classes, model_type} from config.json, or null
      tied          {config, head_stored}: tie_word_embeddings (null: not said) and whether a head is stored; null unless a base
      quantization  {found, config}, or null
      readable      whether all files are there and could be read
      problems      [{found, expected, where, do}]
      modules       a LoRA's modules, else [] (of other types of adapters the config and the header are told)
    Of an adapter:
      format, peft_type, base, revision, task_type, peft_version
      flags         {rslora, dora, lora_bias, bias, init, ensure_weight_tying, layer_replication, target_parameters}
      modules_to_save, replaced (parameters that are replaced as a whole), tokens [{module, rows}]
      groups        [{modules, count, kind, rank, alpha, scale}], modules by their last component and equal values
      statistics    whether the factors were read
    Of a module: module, kind ("module" or "embedding"), depth (wrapper levels inside it), parameter (known with `base`), experts,
    rank, alpha, scale, trained (b is not zero), norm (Frobenius, of scale * b @ a; of a stack over all experts; without DoRA's
    rescaling), effective_rank (exp of the entropy of the normalised squared singular values of b @ a, 0 for zero; of a stack the
    mean over experts that are not zero), relative (norm by the base weight's norm, with `base`). What is not known is null.

    Weights on the Hub are not read unless `download` is given, and with `headers` no factors are read anywhere: of an adapter with
    tens of thousands of modules they take minutes. `plot` draws the norms, relative ones with `base`, into a PNG file.
    Raises `Refused` where there is nothing to inspect or an option does not apply.
    """
    if plot is not None:
        inspect_report.check_plot(Path(plot))
    folder = open_source(path)
    kind = _kind(folder)
    if kind != "adapter":
        _refuse_options(folder, f"a {kind}, no adapter", base, plot)
        return _base(folder) if kind == "base" else _file(folder)
    if headers:
        _refuse_options(folder, "headers alone (--headers)", base, plot, download)
    on = open_model(base) if base is not None else None
    far = [
        source
        for source in (folder, on)
        if source is not None and not isinstance(source, LocalFolder)
    ]
    if far and not download:
        _refuse_options(
            far[0], "weights on the Hub, which are read with --download only", base, plot
        )
    result = _adapter(folder, on, not headers and (download or not far), progress)
    if plot is not None:
        inspect_report.draw(result, Path(plot))
    return result


def _refuse_options(
    folder: Folder, found: str, base: object, plot: object, download: bool = False
) -> None:
    """`Refused` where factors are asked about that there are not, or that are not read."""
    options = {"--base": base, "--plot": plot, "--download": download or None}
    given = " and ".join(name for name, value in options.items() if value is not None)
    if given:
        hint = f"leave {given} out" + (", or give --download" if "download" in found else "")
        raise Refused(
            found,
            expected=f"an adapter whose factors are read, for {given}",
            where=folder.name,
            hint=hint,
        )


def _kind(folder: Folder) -> str:
    if isinstance(folder, LocalFolder) and folder.only:
        if folder.only.endswith(".safetensors"):
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
    if other_lora(folder) is not None:
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
        hint=f"name a subfolder: {', '.join(map(shown, nested[:SHOWN]))}"
        if nested
        else "check the path",
    )


# -- what headers tell ----------------------------------------------------------------------------------------------------


def _base(folder: Folder) -> dict[str, Any]:
    seen = scan_checkpoint(folder)
    _check_files(seen)
    quantization = _quantization(seen)
    _check_tensors(seen, mixed=quantization is not None)
    tied = _tied(seen)
    classes = seen.config.get("architectures")
    architecture = {
        "classes": classes if isinstance(classes, list) else [],
        "model_type": seen.config.get("model_type"),
    }
    metrics = {"architecture": printable(architecture), "tied": tied, "quantization": quantization}
    return _result("base", seen) | metrics | _ends(seen)


def _file(folder: Folder) -> dict[str, Any]:
    seen, other = Scan(folder), other_lora(folder)
    seen.header(other[0] if other is not None else next(iter(folder.files())))
    quantization = _quantization(seen)
    _check_tensors(seen, mixed=quantization is not None)
    if other is not None:
        seen.note(no_model(*other, folder.name))
    elif any(".lora_" in key for key in seen.tensors):
        _problem(
            seen,
            f"factors of a LoRA without {CONFIG}",
            f"a folder with {CONFIG}",
            "inspect the adapter's folder",
        )
    return _result("file", seen) | {"quantization": quantization} | _ends(seen)


def _problem(seen: Scan, found: str, expected: str, hint: str, where: str = "") -> None:
    seen.note(Damaged(found, expected=expected, where=where or seen.folder.name, hint=hint))


def _check_files(seen: Scan) -> None:
    """What lies beside the weights and may be taken for them, and an index whose total is another."""
    files = seen.folder.files()
    stray = [name for name in weight_files(seen.folder) if name not in seen.shards]
    if stray:
        hint = "nothing, if nothing loads them; else move them away"
        _problem(
            seen,
            f"weights that are not part of the model: {_some(stray)}",
            "the model's shards alone",
            hint,
        )
    _check_pickles(seen, "the weights")
    if "config.json" not in files:
        _problem(
            seen, "no config.json", "the model's config", "copy it from where the weights came from"
        )
    metadata = (seen.index or {}).get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    stored = sum(spec.nbytes for spec in seen.tensors.values())
    if said is not None and said != stored and seen.whole:
        where = f"{seen.folder.name}/{seen.index_name}"
        _problem(
            seen,
            f"total_size {shown(said)}",
            f"{stored}, the bytes of all tensors",
            "write the index again",
            where,
        )


def _check_pickles(seen: Scan, beside: str) -> None:
    pickled = pickles(seen.folder)
    if pickled and seen.shards:  # where they are all there is, they are refused in other words
        hint = "remove them: loading a pickle runs the code in it"
        _problem(seen, f"pickles beside {beside}: {_some(pickled)}", "safetensors files", hint)


def _check_tensors(seen: Scan, *, mixed: bool) -> None:
    """Empty tensors, and floats of several dtypes unless quantization accounts for them."""
    tensors = seen.tensors.values()
    empty = [spec.key for spec in tensors if 0 in spec.shape]
    if empty:
        hint = "gather the shards before saving (ZeRO-3, FSDP)"
        _problem(seen, f"{len(empty)} empty tensors: {_some(empty)}", "tensors with elements", hint)
    floats = {
        name: count["tensors"] for name, count in _dtypes(tensors).items() if name in dtypes.FLOATS
    }
    if len(floats) > 1 and not mixed:
        found = ", ".join(f"{name} ({count} tensors)" for name, count in floats.items())
        _problem(
            seen,
            f"floats of several dtypes: {found}",
            "one dtype",
            "nothing, if the model keeps some layers in float32",
        )


def _tied(seen: Scan) -> dict[str, Any]:
    said = _nested(seen.config, "tie_word_embeddings")
    heads = [key for key in seen.tensors if HEAD.search(key)]
    if said is True and any(key.endswith("lm_head.weight") for key in heads):
        hint = "set tie_word_embeddings to false if the head was trained apart, else drop it"
        _problem(
            seen,
            "lm_head.weight is stored, and tie_word_embeddings is true",
            "one of them: a loader may drop the head",
            hint,
        )
    classes = seen.config.get("architectures")
    causal = isinstance(classes, list) and any(
        str(name).endswith("ForCausalLM") for name in classes
    )
    if said is False and causal and seen.tensors and not heads and seen.whole:
        hint = "set tie_word_embeddings to true if the embedding is the head, else restore the head"
        _problem(
            seen, "no head is stored, and tie_word_embeddings is false", "lm_head.weight", hint
        )
    return {"config": said, "head_stored": bool(heads)}


def _nested(config: dict, key: str) -> bool | None:
    """A switch of the config, or of the text model's part in it."""
    values = [
        config.get(key),
        *(
            sub.get(key)
            for name, sub in config.items()
            if isinstance(sub, dict) and name.endswith("_config")
        ),
    ]
    return next((value for value in values if isinstance(value, bool)), None)


def _quantization(seen: Scan) -> dict[str, Any] | None:
    try:
        check_not_quantized(seen.checkpoint())
    except Refused as error:
        config = next(
            (seen.config[key] for key in CONFIG_KEYS if isinstance(seen.config.get(key), dict)),
            None,
        )
        return {
            "found": error.found.removeprefix("a quantized base: "),
            "config": printable(config),
        }
    return None


def _result(kind: str, seen: Scan) -> dict[str, Any]:
    """The metrics that every kind has, in the order of the schema."""
    files = seen.folder.files()
    tensors = [spec for header in seen.headers for spec in header.tensors]
    shards = [
        {
            "file": name,
            "bytes": files.get(name, 0),
            "tensors": None if header is None else len(header.tensors),
        }
        for name, header in seen.shards.items()
    ]
    return {
        "inspect": VERSION,
        "kind": kind,
        "name": seen.folder.name,
        "origin": seen.folder.origin,
        "parameters": sum(math.prod(spec.shape) for spec in tensors),
        "bytes": sum(shard["bytes"] for shard in shards),
        "dtypes": _dtypes(tensors),
        "shards": shards,
        "architecture": None,
        "tied": None,
        "quantization": None,
    }


def _ends(seen: Scan, modules: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    different = {str(error): error for error in seen.errors}.values()
    parts = [
        {"found": e.found, "expected": e.expected, "where": e.where, "do": e.hint}
        for e in different
    ]
    return {"readable": seen.readable, "problems": printable(parts), "modules": modules or []}


def _dtypes(tensors: Iterable[TensorSpec]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for spec in tensors:
        count = found.setdefault(spec.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        count["tensors"] += 1
        count["parameters"] += math.prod(spec.shape)
        count["bytes"] += spec.nbytes
    return dict(sorted(found.items()))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(shown, names[:SHOWN])) + more


# -- adapters -------------------------------------------------------------------------------------------------------------


def _adapter(
    folder: Folder, on: Folder | None, reads: bool, progress: "Progress"
) -> dict[str, Any]:
    """An adapter; `on`: its base, `reads`: whether the factors are read."""
    adapter, seen, typed = scan_adapter(folder)
    _check_tensors(seen, mixed=False)
    _check_pickles(seen, "the adapter")
    others = weight_files(folder)
    if others:
        hint = "inspect a model in a folder of its own"
        _problem(
            seen, f"other weights beside the adapter's: {_some(others)}", "the adapter alone", hint
        )
    modules = _modules(adapter, typed, on, reads, seen, progress)
    metrics = (
        _result("adapter", seen)
        | _said(adapter)
        | {"groups": _groups(modules), "statistics": reads}
    )
    return metrics | _ends(seen, modules)


def _modules(
    adapter: Adapter, typed: bool, on: Folder | None, reads: bool, seen: Scan, progress: "Progress"
) -> list[dict[str, Any]]:
    if not reads:
        return _in_order([_module(adapter, lora, None, typed, seen) for lora in adapter.loras])
    from adapterkit.ops import inspect_factors  # imports torch

    joined = inspect_factors.join(adapter, on, seen.errors) if on is not None and typed else None
    modules = [_module(adapter, lora, joined, typed, seen) for lora in adapter.loras]
    inspect_factors.read_factors(adapter, modules, joined, seen.errors, progress)
    if modules and not (
        any(module["trained"] for module in modules) or adapter.replaced or adapter.tokens
    ):
        _problem(
            seen,
            "no module is trained: every b is zero",
            "a trained adapter",
            "check that training ran before the save",
        )
    return _in_order(modules)


def _in_order(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(modules, key=lambda module: _natural(module["module"]))


def _said(adapter: Adapter) -> dict[str, Any]:
    """What the config says, and what the file holds besides factors."""
    said = adapter.config.get
    flags = {
        "rslora": bool(said("use_rslora")),
        "dora": bool(said("use_dora")),
        "init": said("init_lora_weights"),
    }
    flags |= {
        key: said(key)
        for key in (
            "lora_bias",
            "bias",
            "ensure_weight_tying",
            "layer_replication",
            "target_parameters",
        )
    }
    metrics = {
        "format": "peft",
        "base": said("base_model_name_or_path"),
        **{key: said(key) for key in ("peft_type", "revision", "task_type", "peft_version")},
        "flags": flags,
        "modules_to_save": said("modules_to_save") or [],
        "replaced": sorted(adapter.replaced, key=_natural),
        "tokens": [
            {"module": tokens.module, "rows": list(tokens.indices)} for tokens in adapter.tokens
        ],
    }
    return printable(metrics)


def _module(
    adapter: Adapter, lora: Lora, joined: "Join | None", typed: bool, seen: Scan
) -> dict[str, Any]:
    """One adapted module, by its header and the config; what its factors do is filled in later."""
    at, stored = (lora.module, lora.depth), lora.a.shape[0]
    parameter = (
        joined.parameters[at].name if joined is not None and at in joined.parameters else None
    )
    rank, alpha, scale = _settings(adapter, lora, parameter, seen) if typed else (None, None, None)
    experts = joined.experts.get(at) if joined is not None else None
    if (
        parameter is None
        and rank
        and stored != rank
        and stored % rank == 0
        and _leaves(adapter, lora)
    ):
        experts = stored // rank
    if rank is not None and stored != rank * (experts or 1):
        found = f"rank {stored} in the file for {shown(lora.module)}"
        hint = "restore the config that was saved with the file (a wrong rank means a wrong scale)"
        _problem(seen, found, f"rank {rank}, as r and rank_pattern say", hint, adapter.where)
        rank = scale = None
    place = {
        "module": lora.module,
        "kind": lora.kind,
        "depth": lora.depth,
        "parameter": parameter,
        "experts": experts,
    }
    unknown = dict.fromkeys(("trained", "norm", "effective_rank", "relative"))
    return place | {"rank": rank or stored, "alpha": alpha, "scale": scale} | unknown


def _settings(
    adapter: Adapter, lora: Lora, parameter: str | None, seen: Scan
) -> tuple[int | None, float | None, float | None]:
    """Rank, alpha and scale as the config says, which speaks of a module, or of its parameter where that has a name of its own."""
    own = None if parameter is None else [parameter.rpartition(".")[2]]
    names = [adapter.pattern_name(lora, leaf) for leaf in _leaves(adapter, lora, own) or [None]]
    try:
        r, lora_alpha = adapter.config["r"], adapter.config["lora_alpha"]
        found = {adapter.patterned(name, r, lora_alpha) for name in names}
    except Refused as error:  # a pattern that cannot be used
        seen.note(error)
        return None, None, None
    if len(found) > 1:
        expected = "one rank and alpha for all target_parameters of a module (PEFT's file names the nesting only)"
        _problem(
            seen,
            f"parameters of {shown(lora.module)} that cannot be told apart",
            expected,
            "give --base",
            adapter.name,
        )
        return None, None, None
    rank, alpha = found.pop()
    return rank, alpha, adapter.scale(rank, alpha)


def _leaves(adapter: Adapter, lora: Lora, own: list[str] | None = None) -> list[str]:
    """Those parameters of the module that target_parameters may mean; without a base the file does not say which of them it is."""
    return adapter.leaves(lora.module, own) if lora.kind == "module" else []


def _groups(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Modules counted by the last component of their names (a parameter's name, where it has one of its own) and equal values."""
    counts: dict[tuple, int] = {}
    for module in modules:
        own = (module["parameter"] or "").rpartition(".")[2]
        name = module["module"].rpartition(".")[2] + (
            f".{own}" if own not in ("", "weight") else ""
        )
        key = (name, *(module[value] for value in ("kind", "rank", "alpha", "scale")))
        counts[key] = counts.get(key, 0) + 1
    names = ("modules", "kind", "rank", "alpha", "scale")
    return [dict(zip(names, key, strict=True)) | {"count": count} for key, count in counts.items()]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that counts layers as numbers."""
    return [
        (0, int(part), "") if part.isascii() and part.isdecimal() else (1, 0, part)
        for part in name.split(".")
    ]
