"""Write an adapter of a live model as files in PEFT's layout."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adapterkit.adapters.formats.engines import adapter_card
from adapterkit.adapters.formats.peft.expert_order import in_order_of_peft
from adapterkit.core.adapter.config import CHANGED
from adapterkit.core.adapter.keys import CONFIG, PREFIX, WEIGHTS, replaced_key, value_key
from adapterkit.core.adapter.targets import ALL_LINEAR
from adapterkit.core.calls import COMMAND
from adapterkit.core.checkpoint.disk import storage_errors
from adapterkit.core.checkpoint.fingerprint import metadata_with
from adapterkit.core.checkpoint.hub_ids import is_on_hub
from adapterkit.core.errors import Problems, Refused, shown
from adapterkit.core.inputs.model_config import vocabulary_sizes
from adapterkit.core.options import StrPath
from adapterkit.core.system import system
from adapterkit.core.weights.layers import is_taken_for_experts
from adapterkit.runtime.layers.linear import Conv1DPatch
from adapterkit.runtime.layers.parameter import ParameterPatch
from adapterkit.runtime.patches.copies import CopyPatch, ValuePatch, entries_for_peft
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.patches.tokens import TokensPatch
from adapterkit.runtime.sharding import full_tensor
from adapterkit.runtime.state import Attached, State
from adapterkit.runtime.targets import parameter_refusal
from adapterkit.verbs.shared.targets import embeddings_of, model_type

CARD = "README.md"


def check_local(out: StrPath, where: str) -> None:
    """`Refused` for an output on the Hub, because a live model is written to local disk."""
    if is_on_hub(out):
        raise Refused(
            "an output on the Hub",
            expected="a path on this machine",
            where=where,
            hint="save it here, then upload it\n"
            "adapterkit convert FOLDER --to peft --out hf://ORG/NAME",
            code="AK601",
        )


def save(state: State, folder: StrPath, name: str, *, every_process: bool = False) -> None:
    """Write an adapter: adapter_model.safetensors, adapter_config.json and a card; each file
    atomically replaces an older one. `Refused` while it is merged.

    In a distributed job only the first process writes, with `every_process` each one."""
    state.known([name])
    state.own_weights("save", [name])
    adapter = state.adapters[name]
    Problems(state.guard.hosts.problems(adapter.sites.values(), "save")).raise_all()
    factors = [patch for _, patch in adapter.patches() if isinstance(patch, FactorsPatch)]
    if any(patch.a.ndim < 2 or patch.b.ndim < 2 for patch in factors):
        raise Refused(
            f"factors of {shown(name)} as flat shards",
            expected="whole parameters, or FSDP2's",
            where="save",
            hint="save it inside FullyShardedDataParallel.summon_full_params(model)",
            code="AK803",
        )
    if adapter.base_change and adapter.rescaled != 1.0:
        raise Refused(
            f"{shown(name)}, which contains the initial factors of {adapter.base_change}, times "
            f"{adapter.rescaled:g}",
            expected="its own scale, because a merge restores these factors",
            where="save",
            hint="rescale it back, then save; give the factor as the weight of the merge",
            code="AK304",
        )
    tensors, config = contents(state, adapter)
    if not writes() and not every_process:
        return
    root = Path(folder)
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        replace(root / WEIGHTS, lambda path: _write(tensors, path, adapter.base_fingerprint))
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        replace(root / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
        card = adapter_card(adapter.base, [], "an adapter of a live model", receipt="")
        card = card.replace(COMMAND, "adapters.save(FOLDER)")
        replace(root / CARD, lambda path: path.write_text(card, encoding="utf-8"))


def _write(tensors: dict[str, Tensor], path: Path, base_fingerprint: str | None) -> None:
    metadata = metadata_with(base_fingerprint)
    save_file(tensors, path, metadata)
    with path.open("r+b") as file:  # the library writes metadata in any order; they come first
        file.seek(8)
        text = json.dumps({"__metadata__": metadata}, separators=(",", ":"))
        file.write(text.removesuffix("}").encode())


def contents(state: State, adapter: Attached) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and config of an adapter as its files hold them."""
    tensors: dict[str, Tensor] = {}
    scales: dict[str, tuple[int, float]] = {}
    modules, parameters = [], list(adapter.config.parameters or ())
    taken = as_parameters(state.model, adapter)
    levels = Counter(
        patch.module(site.path)
        for site, patch in adapter.patches()
        if isinstance(patch, FactorsPatch)
    )
    with_rows = {site.path for site, patch in adapter.patches() if isinstance(patch, TokensPatch)}
    for site, patch in adapter.patches():
        path = patch.module(site.path) if isinstance(patch, FactorsPatch) else site.path
        plain, nested = value_key(path), value_key(path, levels)
        for key, value in patch.stored(site.path).items():
            if isinstance(patch, CopyPatch | ValuePatch):
                key = replaced_key(key.removeprefix(PREFIX), levels, with_rows)
            else:
                key = nested + key.removeprefix(plain)
            tensors[key] = stored_value(value)
        if isinstance(patch, FactorsPatch) and patch.stored_rank:
            target = patch.target(site.path)
            if target in taken:
                target = f"{target}.weight"
                parameters.append(target)
            elif not isinstance(patch, ParameterPatch):
                modules.append(target)
            scales[target] = (patch.stored_rank, patch.stored_scale)
    for name, value in resized_embeddings(state, adapter.base).items():
        key = replaced_key(name, levels, with_rows)
        if key not in tensors:
            tensors[key] = stored_value(value)
    # whatever the init was, the factors are for the original base
    plain = dataclasses.replace(adapter.config, init="default", init_options={})
    revision = {"revision": CHANGED + adapter.base_change} if adapter.base_change else {}
    config = plain.to_peft(adapter.base) | revision
    # PEFT requires it, although the layer's class determines it
    config["fan_in_fan_out"] = any(isinstance(patch, Conv1DPatch) for _, patch in adapter.patches())
    config |= _names_for_peft(state, adapter)
    config |= scale_settings(scales, config)
    if taken:
        config |= {"target_parameters": sorted(dict.fromkeys(parameters)), "lora_dropout": 0.0}
    targets = config.get("target_modules")
    is_regex = isinstance(targets, str) and targets.lower() != ALL_LINEAR
    if taken or not is_regex:
        config["target_modules"] = target_list(list(dict.fromkeys(modules)), state.modules)
        # PEFT would look for layers in the ends of names; these are the modules
        config |= {"layers_to_transform": None, "layers_pattern": None}
    return tensors, in_order_of_peft(config)


def as_parameters(model: nn.Module, adapter: Attached) -> set[str]:
    """The linear layers that PEFT as target modules would take for stacks of experts, and drop:
    their weights are written as target parameters. `Refused` for features that these lack."""
    paths, errors = set[str](), Problems()
    kind = model_type(model)
    for site, patch in adapter.patches():
        if not isinstance(patch, FactorsPatch) or isinstance(patch, ParameterPatch):
            continue
        if is_taken_for_experts(kind, site.path):
            paths.add(site.path)
            if (problem := parameter_refusal(site.path, site.host, adapter.config)) is not None:
                errors.append(problem)
    errors.raise_all()
    return paths


def _names_for_peft(state: State, adapter: Attached) -> dict[str, object]:
    """Names for PEFT of fully trained modules (`modules_to_save`), and of modules with rows."""
    config, names = adapter.config, {}
    if config.modules_to_save:
        copies = [(site.path, p) for site, p in adapter.patches() if isinstance(p, CopyPatch)]
        # a norm without weights has nothing in the file
        saved = [path for path, patch in copies if any(patch.values())]
        entries = [
            end for end in config.modules_to_save if any(path.endswith(end) for path in saved)
        ]
        if config.tie:  # PEFT trains with a module what is tied to it
            weights = {path: id(state.modules[path]._parameters.get("weight")) for path in saved}
            meant = {path: weights[path] for path in saved if any(map(path.endswith, entries))}
            saved = [p for p in saved if p in meant or weights[p] not in meant.values()]
        entries = entries_for_peft(entries, saved, state.modules)
        # parameters, which PEFT loads into the model
        values = {f"{s.path}.{p.leaf}" for s, p in adapter.patches() if isinstance(p, ValuePatch)}
        values = {name.removeprefix(".") for name in values}.intersection(config.modules_to_save)
        names["modules_to_save"] = [*entries, *sorted(values)] or None
    if isinstance(config.trainable_tokens, Mapping):
        table = names["trainable_token_indices"] = {}
        for name, indices in config.trainable_tokens.items():
            paths = [path for path in state.modules if path.endswith(name)]
            for entry in entries_for_peft([name], paths, state.modules):
                table[entry] = list(indices)
    return names


def scale_settings(
    scales: Mapping[str, tuple[int, float]], config: Mapping[str, object]
) -> dict[str, object]:
    """r, lora_alpha and their patterns for each module's rank and scale; the commonest values have
    no pattern, the others anchored ones."""

    def alpha(rank: int, scale: float) -> float:
        value = scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
        return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value

    alphas = {path: alpha(*both) for path, both in scales.items()}
    ranks = {path: rank for path, (rank, _) in scales.items()}
    if not scales:
        return {}
    r = Counter(ranks.values()).most_common(1)[0][0]
    lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": {f"^{path}": x for path, x in ranks.items() if x != r},
        "alpha_pattern": {f"^{path}": x for path, x in alphas.items() if x != lora_alpha},
    }


def target_list(paths: list[str], modules: Collection[str]) -> list[str]:
    """The last components of the paths, if they match these modules alone; otherwise the paths."""
    ends = sorted({path.rpartition(".")[2] for path in paths})
    matching = {name for name in modules if name.rpartition(".")[2] in ends}
    return ends if matching == set(paths) else sorted(paths)


def stored_value(value: Tensor) -> Tensor:
    """A tensor as a file stores it: gathered if sharded, contiguous and with its own memory."""
    return full_tensor(value).detach().cpu().clone(memory_format=torch.contiguous_format)


def writes() -> bool:
    """Return whether this process writes, as the first one of a distributed job does."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or (
        distributed.get_rank() == 0
    )


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it; the umask determines its permissions."""
    other = path.with_name(f".{path.name}.part")
    other.unlink(missing_ok=True)
    other.touch()
    mode = other.stat().st_mode
    write(other)
    if other.stat().st_mode != mode:  # safetensors renames a file that nobody else may read
        other.chmod(mode)
    system.replace(other, path)


def resized_embeddings(state: State, base: str | None) -> dict[str, Tensor]:
    """Parameters of the input embedding and the head by name, if the base's config has another
    size; nothing if that config is neither in a folder nor in the Hub's cache."""
    model = state.model
    config = _stored_config(base) if base and hasattr(model, "get_input_embeddings") else {}
    sizes = vocabulary_sizes(config)
    if not sizes or getattr(model.config, "vocab_size", None) in {None, *sizes}:
        return {}
    embeddings = embeddings_of(model)
    return {
        f"{path}.{leaf}": parameter
        for path, module in state.modules.items()
        if any(module is embedding for embedding in embeddings)
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }


def _stored_config(base: str) -> dict:
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(base, "config.json", local_files_only=True)
    except OSError:  # also for the path of a folder that is gone
        return {}
    return {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
