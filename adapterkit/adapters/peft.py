"""PEFT's layout on disk, read: every key of a file has a role, or the adapter is refused."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from adapterkit.adapters.config import HARMLESS, OTHER_ARITHMETIC, TASK_HEADS, Check, check_config
from adapterkit.adapters.keys import (
    BENEATH,
    CONFIG,
    WEIGHTS,
    module_and_depth,
    trained_copy,
    unwrapped,
    without_wrappers,
)
from adapterkit.adapters.record import EMBEDDINGS, Adapter, Lora, Tokens, inside, saved_modules
from adapterkit.checkpoint.folder import Folder, belonging_to, locate
from adapterkit.checkpoint.foreign import no_model, other_lora
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import Scan
from adapterkit.dtypes import FLOATS
from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown

Patterns = list[tuple[re.Pattern[str], str]]  # what a key looks like, and its role
Roles = dict[tuple[str, int], dict[str, TensorSpec]]  # (module, depth) -> role -> its tensor


def read_adapter(folder: Folder, number: int = 1) -> Adapter:
    """Read an adapter's config and headers; `Refused` listing every key and flag that cannot be used."""
    adapter, seen, _ = scan_adapter(folder, number)
    refuse_all(seen.errors)
    return adapter


def scan_adapter(folder: Folder, number: int = 1) -> tuple[Adapter, Scan, bool]:
    """As much of an adapter as can be read, with everything for which `read_adapter` refuses it, and whether its config can be
    asked for ranks and scales."""
    adapter, parts, seen = _see(folder, number, check_config, ROLES)
    plain = {k: v for k, v in seen.config.items() if k in HARMLESS and k not in OTHER_ARITHMETIC}
    typed = not check_config(plain, "")
    loras = _loras(parts, seen.errors, folder.name)
    if typed and seen.headers:
        seen.errors += _promises(parts, seen.config, folder.name)
    for error in seen.errors:
        locate(error, folder)
    return replace(adapter, loras=loras), seen, typed


def read_other(
    folder: Folder, number: int, check: Check, names: Sequence[str]
) -> tuple[Adapter, Roles]:
    """Read an adapter of another type than LoRA: all but its modules' tensors, and those by module and name.

    `check` says what is wrong with its config, `names` what the type calls its tensors.
    """
    roles = [
        (re.compile(rf"^(.*)\.{re.escape(name)}(?:\.\w+)?(?:\.weight)?$"), name) for name in names
    ]
    with belonging_to(folder):
        adapter, parts, seen = _see(folder, number, check, roles)
        refuse_all(seen.errors)
        refuse_all(_promises(parts, adapter.config, folder.name))
    return adapter, parts.roles


def _see(
    folder: Folder, number: int, check: Check, roles: Patterns
) -> tuple[Adapter, "_Parts", Scan]:
    """An adapter without its factors, its keys by what they are, and what is wrong with its files, its config and its token
    rows."""
    seen, files = Scan(folder, number), folder.files()
    lacking = [name for name in (CONFIG, WEIGHTS) if name not in files]
    seen.readable = not lacking
    other = other_lora(folder) if lacking else None
    if other is not None:
        seen.add_error(no_model(*other, folder.name))
    else:
        for name in lacking:
            seen.add_error(_missing(folder, name, files))
    config = seen.json(CONFIG)
    if config is not None:
        seen.config = config
        seen.errors += check(config, f"{folder.name}/{CONFIG}")
    header = seen.header(WEIGHTS) if WEIGHTS in files else None
    tensors = seen.tensors
    parts = _sorted_out(tensors, seen.errors, f"{folder.name}/{WEIGHTS}", roles)
    tokens = (
        () if config is None or header is None else _tokens(parts, config, seen.errors, folder.name)
    )
    sha256 = "" if header is None else header.sha256
    return (
        Adapter(folder, number, seen.config, (), parts.replaced, tokens, tensors, sha256),
        parts,
        seen,
    )


def _missing(folder: Folder, name: str, files: dict[str, int]) -> Refused:
    nested = sorted({f.rsplit("/", 1)[0] for f in files if f.endswith("/" + CONFIG)})
    pickled = any(f in files for f in ("adapter_model.bin", "adapter_model.pt"))
    hint = "check the path"
    if nested:
        hint = f"name the subfolder: {', '.join(shown(n) for n in nested[:5])}"
    elif pickled:
        hint = "convert the pickle: PeftModel.from_pretrained(...).save_pretrained(OUT) writes safetensors"
    return Refused(
        f"no {name}", expected="an adapter in PEFT's layout", where=folder.name, hint=hint
    )


@dataclass
class _Parts:
    """An adapter file's keys by what they are: {module: {role: spec}}, the rest by parameter name."""

    roles: dict[tuple[str, int], dict[str, TensorSpec]] = field(default_factory=dict)
    replaced: dict[str, TensorSpec] = field(default_factory=dict)
    tokens: dict[str, TensorSpec] = field(default_factory=dict)


ROLES: Patterns = [
    (re.compile(r"^(.*)\.lora_A(?:\.\w+)?\.weight$"), "a"),
    (re.compile(r"^(.*)\.lora_B(?:\.\w+)?\.weight$"), "b"),
    (re.compile(r"^(.*)\.lora_B(?:\.\w+)?\.bias$"), "bias"),
    (re.compile(r"^(.*)\.lora_embedding_A(?:\.\w+)?$"), "embedding_a"),
    (re.compile(r"^(.*)\.lora_embedding_B(?:\.\w+)?$"), "embedding_b"),
    (re.compile(r"^(.*)\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?$"), "magnitude"),
]
TOKENS = re.compile(r"^(.*)\.token_adapter(?:\.\w+)?\.trainable_tokens_delta(?:\.\w+)?$")
NO_ARITHMETIC = re.compile(r"\.lora_velora_embed$")  # a buffer of VeLoRA's backward pass
NOT_READ = re.compile(
    r"\.(lora_\w+|ranknum|hada_\w+|lokr_\w+|oft_\w+|boft_\w+|vera_\w+|ia3_\w+)(\.|$)"
)


def _sorted_out(
    tensors: dict[str, TensorSpec], errors: list[AdapterkitError], where: str, roles: Patterns
) -> _Parts:
    parts = _Parts()
    names = {key: unwrapped(key) for key in tensors}
    plain = set(names.values())
    for key, spec in tensors.items():
        name = names[key]
        role = next(((m[1], what) for pattern, what in roles if (m := pattern.match(name))), None)
        if role is not None:
            at = module_and_depth(role[0])
            slot = parts.roles.setdefault(at, {})
            if role[1] in slot:
                errors.append(_two_names(key, slot[role[1]].key, where))
            slot[role[1]] = spec
        elif m := TOKENS.match(name):
            parts.tokens[m[1].replace(".base_layer", "")] = spec
        elif NO_ARITHMETIC.search(name) or ".original_module." in name:
            continue  # what the base holds already (bias="all" saves it beside the trained copy)
        elif NOT_READ.search("." + name):
            found = f"key {shown(key)}"
            errors.append(
                Refused(
                    found,
                    expected="keys of its peft_type",
                    where=where,
                    hint="it is another kind of adapter",
                )
            )
        else:
            name = without_wrappers(
                trained_copy(name, plain).replace(".token_adapter.base_layer.", ".")
            )
            known = parts.replaced.get(name)
            if (
                known is not None
                and ".modules_to_save." not in key
                and ".modules_to_save." not in known.key
            ):
                errors.append(_two_names(key, known.key, where))
            if known is None or ".modules_to_save." in known.key:
                parts.replaced[name] = spec
    return parts


def _two_names(key: str, other: str, where: str) -> Refused:
    return Refused(
        f"{shown(key)} and {shown(other)} name one thing",
        expected="each once",
        where=where,
        hint="remove one",
    )


def _loras(parts: _Parts, errors: list[AdapterkitError], name: str) -> tuple[Lora, ...]:
    loras = []
    for (module, depth), role in sorted(parts.roles.items()):
        embedding = "embedding_a" in role or "embedding_b" in role
        a, b = (
            (role.get("embedding_a"), role.get("embedding_b"))
            if embedding
            else (role.get("a"), role.get("b"))
        )
        if a is None or b is None or (embedding and ("a" in role or "b" in role)):
            found = f"{shown(module)} has {', '.join(sorted(role)) or 'nothing'}"
            errors.append(
                Refused(
                    found,
                    expected="both factors, a and b",
                    where=name,
                    hint="save the adapter again",
                )
            )
            continue
        if len(a.shape) < 2 or len(b.shape) < 2 or 0 in a.shape or 0 in b.shape:
            found = f"factors of {shown(module)} with shapes {a.shape} and {b.shape}"
            errors.append(
                Refused(
                    found,
                    expected="matrices",
                    where=name,
                    hint="gather the shards before saving (ZeRO-3, FSDP)",
                )
            )
            continue
        for spec in (a, b, role.get("magnitude"), role.get("bias")):
            if spec is not None and spec.dtype not in FLOATS:
                found = f"{shown(spec.key)} is {spec.dtype}"
                errors.append(
                    Refused(
                        found,
                        expected="F32, F16, BF16 or F64",
                        where=name,
                        hint="save it as floats",
                    )
                )
        kind = "embedding" if embedding else "module"
        loras.append(Lora(module, kind, a, b, role.get("magnitude"), role.get("bias"), depth))
    return tuple(loras)


def _promises(parts: _Parts, config: dict, name: str) -> list[AdapterkitError]:
    """Where the config promises what the file does not hold, or the file holds what the config does not speak of."""
    errors: list[AdapterkitError] = []

    def wrong(
        found: str, expected: str, hint: str = "restore the config that was saved with the file"
    ) -> None:
        errors.append(Refused(found, expected=expected, where=name, hint=hint))

    for key, role, what in [
        ("use_dora", "magnitude", "magnitudes"),
        ("lora_bias", "bias", "biases of b"),
    ]:
        lacking = [module for (module, _), roles in parts.roles.items() if role not in roles]
        if config.get(key) and lacking:
            found = f"{key}, but none for {', '.join(map(shown, lacking[:6]))}"
            wrong(found, f"{what} for every module", "save the adapter again")
        if not config.get(key) and len(lacking) < len(parts.roles):
            wrong(
                f"{what} in the file, {key} = {config.get(key)}", f"{key} true, or no such tensors"
            )
    # a task's head is looked for in the model: PEFT names those that it lacks too
    asked = set(config.get("modules_to_save") or []) - set(
        TASK_HEADS.get(config.get("task_type") or "", ())
    )
    for module in sorted(
        m for m in asked if not any(_names(m, parameter) for parameter in parts.replaced)
    ):
        wrong(
            f"modules_to_save names {shown(module)}, and the file holds nothing of it",
            "its trained weights",
            "save the adapter again, or take the name out of the config if the model has no such module",
        )
    for parameter, spec in parts.replaced.items():
        if spec.dtype not in FLOATS and spec.shape:
            wrong(
                f"{shown(spec.key)} is {spec.dtype}", "F32, F16, BF16 or F64", "save it as floats"
            )
        if not _spoken_of(parameter, spec.key, config):
            wrong(
                f"{shown(spec.key)} would replace {shown(parameter)}, of which the config does not speak",
                "factors, or what modules_to_save, bias or a changed vocabulary account for",
                "name its module in modules_to_save of the config if it was trained, or remove it from the file",
            )
    return errors


def _spoken_of(parameter: str, key: str, config: dict) -> bool:
    if ".modules_to_save." in key or BENEATH.search(key) or EMBEDDINGS.search(parameter):
        return True
    if "bias" in parameter.rpartition(".")[2] and config.get("bias", "none") != "none":
        return True
    return any(_names(saved, parameter) for saved in saved_modules(config))


def _names(saved: str, parameter: str) -> bool:
    """Whether an entry of modules_to_save means a parameter: by its module, as in PEFT, or by its own full name. PEFT wraps nothing
    for the latter, and loads the value into the model itself."""
    return inside(parameter, saved) or saved == parameter


def _tokens(
    parts: _Parts, config: dict, errors: list[AdapterkitError], name: str
) -> tuple[Tokens, ...]:
    where = f"{name}/{CONFIG}"
    asked = config.get("trainable_token_indices")
    if not parts.tokens:
        if asked:
            errors.append(
                Refused(
                    "trainable_token_indices, but no trained rows in the file",
                    expected="the rows that were trained",
                    where=where,
                    hint="save the adapter again",
                )
            )
        return ()
    found = []
    for module, spec in sorted(parts.tokens.items()):
        indices = asked
        if isinstance(asked, dict):
            ends = [
                v for k, v in asked.items() if module.endswith(k)
            ]  # PEFT asks for no dot before it
            indices = ends[0] if len(ends) == 1 else None
        rows = tuple(indices) if isinstance(indices, list) else ()
        good = all(type(i) is int and i >= 0 for i in rows) and len(set(map(str, rows))) == len(
            rows
        )
        if not good or not rows or spec.dtype not in FLOATS or spec.shape[:1] != (len(rows),):
            errors.append(
                Refused(
                    f"trained rows {spec.dtype} {spec.shape} of {shown(module)}, trainable_token_indices {shown(repr(indices))}",
                    expected="one different row index for each trained row, in order",
                    where=where,
                    hint="restore the config that was saved with the file",
                )
            )
            continue
        found.append(Tokens(module, rows, spec))
    return tuple(found)
