"""Read PEFT's layout: every key of a file has a role, or the adapter is refused."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from adapterkit.core.adapter.config import (
    KNOWN_SETTINGS,
    OTHER_ARITHMETIC,
    TASK_HEADS,
    ConfigCheck,
    check_config,
    with_heads,
)
from adapterkit.core.adapter.keys import (
    BASE_LAYER_VALUE,
    CONFIG,
    WEIGHTS,
    module_and_depth,
    trained_parameter,
    unwrapped,
    without_wrappers,
)
from adapterkit.core.adapter.record import EMBEDDINGS, Adapter, Lora, Tokens, is_inside
from adapterkit.core.checkpoint.fingerprint import known
from adapterkit.core.checkpoint.folder import Folder, belonging_to, locate
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.shards import noted
from adapterkit.core.checkpoint.spec import Checkpoint, scan_files
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.commands import command
from adapterkit.core.dtypes import FLOATS
from adapterkit.core.errors import AdapterkitError, Problems, Refused, shown
from adapterkit.core.registry import load
from adapterkit.doors import ADAPTERS

Patterns = list[tuple[re.Pattern[str], str]]  # of keys, with their role
Roles = dict[tuple[str, int], dict[str, TensorSpec]]  # (module, depth) -> role -> its tensor
# the tensors of a file -> those that its keys and codes mean
Stored = Callable[[dict[str, TensorSpec]], dict[str, TensorSpec]] | None


def read_adapter(
    folder: Folder, number: int = 1, check: ConfigCheck = check_config, as_stored: Stored = None
) -> Adapter:
    """Read an adapter's config and headers; `Refused` listing every key and flag that cannot be
    used.

    `check` returns the errors of its config; `as_stored` reads the file's tensors for a caller that
    also knows the column order of a stack's b."""
    adapter, scan, _ = scan_adapter(folder, number, check, as_stored=as_stored)
    scan.errors.raise_all()
    return adapter


def scan_adapter(
    folder: Folder, number: int = 1, check: ConfigCheck = check_config, as_stored: Stored = None
) -> tuple[Adapter, Checkpoint, bool]:
    """The readable content of an adapter, its scan with all errors, and whether its config is valid
    enough to compute ranks and scales."""
    adapter, keys, scan = _read(folder, number, check, ROLES, as_stored)
    plain = {
        k: v for k, v in scan.config.items() if k in KNOWN_SETTINGS and k not in OTHER_ARITHMETIC
    }
    typed = not check_config(plain, "")
    loras = _loras(keys, scan.errors, folder)
    if typed and scan.shards:
        scan.errors.extend(_check_config_against_file(keys, scan.config, folder.name))
    adapter = replace(adapter, loras=loras)
    may_have_stacks = typed and as_stored is None and adapter.config.get("target_parameters")
    if may_have_stacks and any(map(adapter.is_stack, adapter.loras)):
        scan.errors.extend(filter(None, [load(ADAPTERS["expert order"])(adapter)]))
    for error in scan.errors:
        locate(error, folder)
    return adapter, scan, typed


def read_other_type(
    folder: Folder, number: int, check: ConfigCheck, names: Sequence[str]
) -> tuple[Adapter, Roles]:
    """An adapter of another type than LoRA, and its modules' tensors by module and name.

    `check` returns the errors of its config; `names`: the type's names of tensors. Raises `Refused`
    or `Damaged` with every problem."""
    roles = [
        (re.compile(rf"^(.*)\.{re.escape(name)}(?:\.\w+)?(?:\.weight)?$"), name) for name in names
    ]
    with belonging_to(folder):
        adapter, keys, scan = _read(folder, number, check, roles)
        scan.errors.raise_all()
        Problems(_check_config_against_file(keys, adapter.config, folder.name)).raise_all()
    return adapter, keys.roles


def _read(
    folder: Folder, number: int, check: ConfigCheck, roles: Patterns, as_stored: Stored = None
) -> tuple[Adapter, "_Keys", Checkpoint]:
    """An adapter without factors, its classified keys, and its scan with the errors of its files,
    config and token rows."""
    errors, files = Problems(), folder.files()
    missing = [name for name in (CONFIG, WEIGHTS) if name not in files]
    if missing:
        errors.include(_missing_files(folder, missing, files))
    config = noted(errors, read_json, folder, CONFIG) if CONFIG in files else None
    if config is not None:
        errors += check(config, f"{folder.name}/{CONFIG}")
    scan = scan_files(folder, {WEIGHTS} & files.keys(), number, errors, config)
    header = scan.shards.get(WEIGHTS)
    scan = replace(scan, readable=header is not None and config is not None)
    tensors = scan.tensors if as_stored is None else as_stored(scan.tensors)
    keys = _classify_keys(tensors, scan.errors, f"{folder.name}/{WEIGHTS}", roles)
    sha256, made_for, tokens = "", None, ()
    if header is not None:
        sha256, made_for = header.sha256, known(header.metadata)
        if config and (keys.tokens or config.get("trainable_token_indices")):
            tokens = _tokens(keys, config, scan.errors, folder.name)
    values = keys.replaced, tokens, tensors
    return Adapter(folder, number, scan.config, (), *values, sha256, made_for), keys, scan


def _missing_files(folder: Folder, names: list[str], files: dict[str, int]) -> Refused:
    nested = sorted({f.rsplit("/", 1)[0] for f in files if f.endswith("/" + CONFIG)})
    pickled = [f for f in ("adapter_model.bin", "adapter_model.pt") if f in files]
    hint, problem = "check the path", f"no {' and no '.join(names)}"
    if "config.json" in files:
        problem = f"{problem}, but a model"
        hint = "give an adapter; where a base is given too, it comes first"
    elif nested:
        hint = f"name the subfolder: {', '.join(shown(n) for n in nested[:5])}"
    elif pickled:
        text = command(
            "adapterkit convert", folder.label, to="peft", allow_pickle=True, out="converted"
        )
        return Refused(
            f"{problem}, but {pickled[0]}, a pickle: loading it may run the code in it",
            expected="safetensors",
            where=folder.name,
            hint=f"if you trust it, convert the pickle\n{text}",
            code="AK205",
        )
    elif WEIGHTS in names and (shards := load(ADAPTERS["shards alone"])(folder)):
        return shards
    elif len(names) == 1:
        hint = f"copy {names[0]} there from the training or the repository"
        hint += ": without its alpha the scale is unknown" * (names == [CONFIG])
    return Refused(
        problem, expected="an adapter in PEFT's layout", where=folder.name, hint=hint, code="AK206"
    )


@dataclass
class _Keys:
    """The classified keys of a file: roles by (module, depth), values by parameter, token rows by
    module."""

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
FLOAT_DTYPES = "F32, F16, BF16 or F64"
NO_ARITHMETIC = re.compile(r"\.lora_(velora_embed$|monteclora_sampler\.)")  # of training alone
NOT_READ = re.compile(r"\.(ranknum|(?:lora|hada|lokr|oft|boft|vera|ia3|hra|hira|miss)_\w+)(\.|$)")


def _classify_keys(
    tensors: dict[str, TensorSpec], errors: Problems, where: str, patterns: Patterns
) -> _Keys:
    keys = _Keys()
    names = {key: unwrapped(key) for key in tensors}
    plain = set(names.values())
    for key, spec in tensors.items():
        name = names[key]
        match = next(((m[1], role) for p, role in patterns if (m := p.match(name))), None)
        if match is not None:
            path, role = match
            roles = keys.roles.setdefault(module_and_depth(path), {})
            if role in roles:
                errors.append(_duplicate(key, roles[role].key, where))
            roles[role] = spec
        elif m := TOKENS.match(name):
            keys.tokens[m[1].replace(".base_layer", "")] = spec
        elif NO_ARITHMETIC.search(name) or ".original_module." in name:
            continue  # the base's own value (bias="all" saves it with the trained copy)
        elif NOT_READ.search("." + name):
            hint = "it is another kind of adapter"
            expected = "keys of its peft_type"
            errors.add(f"key {shown(key)}", expected, hint, where=where, code="AK302")
        else:
            _add_replaced(keys, trained_parameter(name, plain), spec, errors, where)
    return keys


def _add_replaced(keys: _Keys, name: str, spec: TensorSpec, errors: Problems, where: str) -> None:
    """Add a value by its parameter; a trained copy takes precedence over the plain name."""
    name = without_wrappers(name.replace(".token_adapter.base_layer.", "."))
    other = keys.replaced.get(name)
    if other is None or ".modules_to_save." in other.key:
        keys.replaced[name] = spec
    elif ".modules_to_save." not in spec.key:
        errors.append(_duplicate(spec.key, other.key, where))


def _duplicate(key: str, other: str, where: str) -> Refused:
    problem = f"{shown(key)} and {shown(other)} name the same tensor"
    return Refused(problem, expected="each once", where=where, hint="remove one", code="AK302")


def _loras(keys: _Keys, errors: Problems, folder: Folder) -> tuple[Lora, ...]:
    loras, name = [], folder.name
    for (module, depth), roles in sorted(keys.roles.items()):
        embedding = "embedding_a" in roles or "embedding_b" in roles
        a, b = (roles.get(f"embedding_{x}" if embedding else x) for x in "ab")
        if a is None or b is None or (embedding and ("a" in roles or "b" in roles)):
            found = f"only {', '.join(sorted(roles))}" if roles else "nothing"
            problem = f"{shown(module)} has {found}"
            errors.add(
                problem, "both factors, a and b", "save the adapter again", where=name, code="AK302"
            )
            continue
        if len(a.shape) < 2 or len(b.shape) < 2 or 0 in a.shape or 0 in b.shape:
            problem = f"factors of {shown(module)} with shapes {a.shape} and {b.shape}"
            hint = load(ADAPTERS["how to join"])(folder)
            errors.add(problem, "matrices", hint, where=name, code="AK302")
            continue
        magnitude, bias = roles.get("magnitude"), roles.get("bias")
        for spec in (a, b, magnitude, bias):
            if spec is not None and spec.dtype not in FLOATS:
                problem = f"{shown(spec.key)} is {spec.dtype}"
                errors.add(problem, FLOAT_DTYPES, "save it as floats", where=name, code="AK302")
        kind = "embedding" if embedding else "module"
        loras.append(Lora(module, kind, a, b, magnitude, bias, depth))
    return tuple(loras)


def _check_config_against_file(keys: _Keys, config: dict, name: str) -> list[AdapterkitError]:
    """Errors for tensors that the config declares and the file lacks, and the reverse."""
    errors = Problems(
        where=name, hint="restore the config that was saved with the file", code="AK303"
    )
    for key, role, tensors in [
        ("use_dora", "magnitude", "magnitudes"),
        ("lora_bias", "bias", "biases of b"),
    ]:
        missing = [module for (module, _), roles in keys.roles.items() if role not in roles]
        if config.get(key) and missing:
            problem = f"{key}, but none for {', '.join(map(shown, missing[:6]))}"
            errors.add(problem, f"{tensors} for every module", "save the adapter again")
        if not config.get(key) and len(missing) < len(keys.roles):
            problem = f"{tensors} in the file, {key} = {config.get(key)}"
            errors.add(problem, f"{key} true, or no such tensors")
    # PEFT adds the heads of a task whether the model has them or not
    heads = TASK_HEADS.get(config.get("task_type") or "", ())
    for module in sorted(set(config.get("modules_to_save") or []) - set(heads)):
        if not any(_is_entry_for(parameter, module) for parameter in keys.replaced):
            errors.add(
                f"modules_to_save names {shown(module)}, and the file has no tensor of it",
                "its trained weights",
                "save the adapter again, or take the name out of the config if the model has no "
                "such module, or one without weights",
            )
    for parameter, spec in keys.replaced.items():
        if spec.dtype not in FLOATS and spec.shape:
            errors.add(f"{shown(spec.key)} is {spec.dtype}", FLOAT_DTYPES, "save it as floats")
        if not _declared_in_config(parameter, spec.key, config):
            errors.add(
                f"{shown(spec.key)} would replace {shown(parameter)}, which the config does not "
                "mention",
                "factors, or what modules_to_save, bias or a changed vocabulary account for",
                "name its module in modules_to_save of the config if it was trained, or remove it "
                "from the file",
            )
    return errors


def _declared_in_config(parameter: str, key: str, config: dict) -> bool:
    """Return whether PEFT saves such a value with this config."""
    if ".modules_to_save." in key or BASE_LAYER_VALUE.search(key) or EMBEDDINGS.search(parameter):
        return True
    if "bias" in parameter.rpartition(".")[2] and config.get("bias", "none") != "none":
        return True
    modules = with_heads(config.get("modules_to_save"), config.get("task_type"))
    return any(_is_entry_for(parameter, saved) for saved in modules)


def _is_entry_for(parameter: str, entry: str) -> bool:
    """Return whether an entry of modules_to_save is the parameter's module, as in PEFT, or the
    parameter itself, which PEFT loads into the model without a wrapper."""
    return is_inside(parameter, entry) or entry == parameter


def _tokens(keys: _Keys, config: dict, errors: Problems, name: str) -> tuple[Tokens, ...]:
    """Trained token rows by module, with their indices from the config."""

    where = f"{name}/{CONFIG}"
    setting = config.get("trainable_token_indices")
    if setting and not keys.tokens:
        problem = "trainable_token_indices, but no trained rows in the file"
        errors.add(
            problem,
            "the rows that were trained",
            "save the adapter again",
            where=where,
            code="AK303",
        )
    tokens = []
    for module, spec in sorted(keys.tokens.items()):
        indices = setting
        if isinstance(setting, dict):  # by the end of the name; PEFT needs no dot before it
            matches = [value for end, value in setting.items() if module.endswith(end)]
            if not matches:
                # a tied head's rows, not named in the setting: saved if embeddings are complete
                lists = [value for value in setting.values() if isinstance(value, list)]
                matches = [v for v in lists if [len(v)] == [*spec.shape[:1]]]
            indices = matches[0] if len(matches) == 1 else None
        rows = tuple(indices) if isinstance(indices, list) else ()
        valid = all(type(i) is int and i >= 0 for i in rows) and len({*map(str, rows)}) == len(rows)
        if not valid or not rows or spec.dtype not in FLOATS or spec.shape[:1] != (len(rows),):
            errors.add(
                f"trained rows {spec.dtype} {spec.shape} of {shown(module)}, "
                f"trainable_token_indices {shown(repr(indices))}",
                "one different row index for each trained row, in order",
                "restore the config that was saved with the file",
                where=where,
                code="AK303",
            )
            continue
        tokens.append(Tokens(module, rows, spec))
    return tuple(tokens)
