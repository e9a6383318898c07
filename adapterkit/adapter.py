"""The neutral adapter: factors per module, in PEFT's layout on disk.

Files' own names (`lora_A`, `lora_embedding_B`, ...) live here and nowhere else; beyond this file there are `a (r, in)`,
`b (out, r)`, `scale`, magnitudes, replaced parameters and trained token rows.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from adapterkit.checkpoint.folder import Folder, belonging_to, called, locate
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import Scan, no_model, other_lora
from adapterkit.dtypes import FLOATS
from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown
from adapterkit.patterns import matcher

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# What PEFT 0.21 writes, and what each key means for arithmetic on the weights. A key that is not here changes nothing when it is
# falsy and is refused when it is not: an unknown flag may mean unknown arithmetic.
HARMLESS = {
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias",
    "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "monteclora_config", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_dora", "use_rslora", "velora_config", "runtime_config", "eps", "num_labels",
}  # fmt: skip
OTHER_ARITHMETIC = {
    "alora_invocation_tokens": "an activated LoRA acts on the tokens after its invocation only: no weight equals it",
    "arrow_config": "an Arrow router picks experts for each token: no weight equals it",
    "kasa_config": "KaSA truncates the base and has a diagonal of its own",
    "use_qalora": "QALoRA pools the inputs before a",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "megatron_config": "Megatron layers are laid out in another way",
}
CHANGED_BASE = (
    "pissa",
    "olora",
    "corda",
    "lora_ga",
    "loftq",
)  # inits that subtract from, or quantize, the base
UNCHANGED_BASE = ("gaussian", "eva", "mica", "orthogonal", "default", "true", "false")
FLAGS = ("use_dora", "use_rslora", "lora_bias", "ensure_weight_tying")
TEXTS = ("task_type", "peft_version", "bias")
LISTS = ("modules_to_save", "target_parameters")
MOST_LAYERS = 100_000
# What PEFT adds to modules_to_save by task_type; a model has one of them, or none
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

Check = Callable[
    [dict, str], list[AdapterkitError]
]  # (config, where it stands) -> what is wrong with it
Patterns = list[tuple[re.Pattern[str], str]]  # what a key looks like, and its role
Roles = dict[tuple[str, int], dict[str, TensorSpec]]  # (module, depth) -> role -> its tensor


@dataclass(frozen=True)
class Lora:
    """One adapted module or parameter: delta = scale * b @ a, as the file stores it."""

    module: str  # dotted path in the loaded model
    kind: str  # "module" or "embedding", by the factors' names
    a: TensorSpec
    b: TensorSpec
    magnitude: TensorSpec | None = None  # DoRA
    bias: TensorSpec | None = None  # lora_B.bias
    depth: int = 0  # how many wrappers of the module's other parameters lie around this one's


@dataclass(frozen=True)
class Tokens:
    """Rows of an embedding that replace the base's: row indices and their values, in the same order."""

    module: str
    indices: tuple[int, ...]
    values: TensorSpec


@dataclass(frozen=True)
class Adapter:
    """An adapter's config and tensors, every tensor accounted for."""

    folder: Folder
    number: int  # its place among the job's inputs
    config: dict
    loras: tuple[Lora, ...]
    replaced: dict[
        str, TensorSpec
    ]  # parameter -> trained value: modules_to_save, biases, resized embeddings
    tokens: tuple[Tokens, ...]
    tensors: dict[str, TensorSpec] = field(repr=False)
    header_sha256: str = ""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def given(self) -> str:
        """What its user calls it, for messages."""
        return called(self.folder)

    @property
    def where(self) -> str:
        return f"{self.given}/{CONFIG}"

    def changed_base(self) -> str | None:
        """The init method's name if it changed the base's weights, else None."""
        init = self.config.get("init_lora_weights", True)
        return init if isinstance(init, str) and init.lower().startswith(CHANGED_BASE) else None

    @property
    def saved(self) -> list[str]:
        """Modules that are trained whole: modules_to_save, and the heads that PEFT adds to it for the task."""
        return saved_modules(self.config)

    def saves(self, parameter: str) -> bool:
        """Whether a module that is trained whole holds the parameter."""
        return any(inside(parameter, module) for module in self.saved)

    def pattern_of(self, whole: Sequence[str]) -> str:
        """A regular expression, as short as may be, that is found in these values that were trained whole and in no adapted
        module."""
        rest = [name for name in whole if not self.saves(name)]
        found = {
            re.escape(module)
            for module in self.saved
            if any(inside(name, module) for name in whole)
        }
        found |= {"bias$" if name.endswith("bias") else re.escape(name) for name in rest}
        pattern = "|".join(sorted(found))
        if any(re.search(pattern, lora.module) for lora in self.loras):
            pattern = "|".join(f"^{re.escape(name)}$" for name in sorted(whole))
        return pattern

    @cached_property
    def copies(self) -> dict[str, TensorSpec]:
        """Of `replaced`, the copies of the base's weights that PEFT saves beside an embedding's or head's factors and rows."""
        biases = self.config.get("bias", "none") != "none"
        beneath = {n: s for n, s in self.replaced.items() if BENEATH.search(s.key)}
        return {n: s for n, s in beneath.items() if not (biases and n.endswith("bias"))}

    def leaves(self, module: str, own: Sequence[str] | None = None) -> list[str]:
        """The module's own parameters that target_parameters names: PEFT compares the end of the full name.

        `own` are all of them in the order of its code. Without it those that the module may have: a name without a dot counts
        where target_modules does not name the module, of which PEFT takes one or the other.
        """
        targets = self.config.get("target_parameters") or []
        if own is not None:
            return [
                leaf
                for leaf in own
                if any(f".{module}.{leaf}".endswith(f".{target}") for target in targets)
            ]
        split = [target.rpartition(".") for target in targets]
        bare = any(not home for home, _, _ in split)
        named = bare and (
            self._names(module) or any(x.module == module and self.attention(x) for x in self.loras)
        )
        there = [
            leaf
            for home, _, leaf in split
            if (f".{module}".endswith(f".{home}") if home else not named)
        ]
        return list(dict.fromkeys(there))

    def _names(self, module: str) -> bool:
        """Whether target_modules names a module."""
        targets = self.config.get("target_modules")
        if isinstance(targets, str):
            whole = r"\A(?:{})\Z"
            return targets == "all-linear" or matcher(
                targets, f"{self.where}: target_modules", whole
            )(module)
        return isinstance(targets, list) and any(
            f".{module}".endswith(f".{target}") for target in targets
        )

    def attention(self, lora: Lora) -> str | None:
        """The MultiheadAttention that a factor pair belongs to as its output projection, else None.

        PEFT adapts both projections of such a layer at once; the key of the output's lies inside the layer's wrapper.
        """
        parent, _, last = lora.module.rpartition(".")
        inside = f"{parent.rpartition('.')[2]}.base_layer.out_proj.lora_A."  # what is around the attention may be wrapped too
        if last != "out_proj" or inside not in lora.a.key or self.leaves(parent):
            return None
        return parent if any(other.module == parent for other in self.loras) else None

    def pattern_name(self, lora: Lora, leaf: str | None = None) -> str:
        """The name that PEFT holds rank_pattern and alpha_pattern against: a parameter's full name (`leaf` its own), the
        attention's for a MultiheadAttention's output projection, else the module's."""
        return f"{lora.module}.{leaf}" if leaf is not None else self.attention(lora) or lora.module

    def resolved(self, name: str) -> tuple[int, float]:
        """Rank and scale of a module or parameter.

        The first pattern of rank_pattern, and of alpha_pattern, that matches counts, each on its own
        (PEFT's `get_pattern_key`: `(.*\\.)?(pattern)$` from the start of the name, a dot matching any character).
        """
        rank, alpha = self.patterned(
            name, self.config.get("r", 8), self.config.get("lora_alpha", 8)
        )
        return rank, self.scale(rank, alpha)

    def patterned(self, name: str, rank: int, alpha: float) -> tuple[int, float]:
        """Rank and alpha of a module: those of the first patterns that match, else the ones given."""
        return self._first(self._rank_patterns, name, rank), self._first(
            self._alpha_patterns, name, alpha
        )

    def scale(self, rank: int, alpha: float) -> float:
        """alpha / r, or alpha / sqrt(r) with use_rslora."""
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @cached_property
    def _rank_patterns(self) -> list:
        return self._patterns("rank_pattern")

    @cached_property
    def _alpha_patterns(self) -> list:
        return self._patterns("alpha_pattern")

    def _patterns(self, key: str) -> list:
        table = self.config.get(key) or {}
        where = f"{self.where}: {key}"
        return [
            (matcher(str(pattern), where, r"\A(?:.*\.)?(?:{})\Z"), value)
            for pattern, value in table.items()
        ]

    @staticmethod
    def _first(patterns: list, name: str, default):
        return next((value for matches, value in patterns if matches(name)), default)


def saved_modules(config: dict) -> list[str]:
    """modules_to_save, and the heads that PEFT adds to it, in memory, by task_type."""
    return list(
        dict.fromkeys(
            [
                *(config.get("modules_to_save") or []),
                *TASK_HEADS.get(config.get("task_type") or "", ()),
            ]
        )
    )


def inside(parameter: str, module: str) -> bool:
    """Whether modules_to_save of that name wraps the parameter's module; PEFT goes by the end of a name, without its dot."""
    return f"{module}." in parameter


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
        seen.note(no_model(*other, folder.name))
    else:
        for name in lacking:
            seen.note(_missing(folder, name, files))
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


def check_config(config: dict, where: str) -> list[AdapterkitError]:
    """Everything in an adapter's config that is out of range, unknown, or means other arithmetic than b @ a."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        hint = "adapterkit resize makes a plain LoRA of the types that it knows; others cannot be read here"
        return [Refused(f"peft_type {shown(repr(kind))}", expected="LORA", where=where, hint=hint)]
    errors: list[AdapterkitError] = []
    for key, why in OTHER_ARITHMETIC.items():
        if config.get(key):
            errors.append(
                Refused(
                    f"{key} is set: {why}",
                    expected="a plain or DoRA LoRA",
                    where=where,
                    hint="use this adapter with the library that trained it; it cannot be merged",
                )
            )
    errors += check_known(config, HARMLESS | set(OTHER_ARITHMETIC), where)
    init = config.get("init_lora_weights")
    name = init.lower() if isinstance(init, str) else ""
    if not (
        init is None
        or type(init) is bool
        or name in UNCHANGED_BASE
        or name.startswith(CHANGED_BASE)
    ):
        errors.append(
            unfit(
                config,
                "init_lora_weights",
                "true, false, or one of " + ", ".join(CHANGED_BASE + UNCHANGED_BASE),
                where,
            )
        )
    for key in (
        "r",
        "lora_alpha",
    ):  # PEFT always writes both: a default here would be a guess at the scale
        if not is_number(config.get(key), whole=key == "r"):
            errors.append(
                unfit(
                    config,
                    key,
                    "a whole number above 0" if key == "r" else "a finite number",
                    where,
                )
            )
    errors += check_types(config, where) + check_patterns(config, where)
    replication = config.get("layer_replication")
    if replication is not None and not (
        isinstance(replication, list)
        and all(
            isinstance(p, list) and len(p) == 2 and all(type(x) is int and x >= 0 for x in p)
            for p in replication
        )
        and sum(max(0, end - start) for start, end in replication) <= MOST_LAYERS
    ):
        errors.append(
            unfit(
                config,
                "layer_replication",
                f"pairs [start, end) of at most {MOST_LAYERS:,} layers",
                where,
            )
        )
    return errors


def unfit(config: dict, key: str, expected: str, where: str) -> Refused:
    return Refused(
        f"{key} = {shown(repr(config.get(key)))}",
        expected=expected,
        where=where,
        hint="mend the config",
    )


def check_known(config: dict, known: Collection[str], where: str) -> list[AdapterkitError]:
    """Settings that nobody here knows, and that are not off."""
    return [
        Refused(
            f"unknown setting {shown(key)} = {shown(repr(config[key]))}",
            expected="settings of PEFT 0.21 (an unknown one may mean other arithmetic)",
            where=where,
            hint="remove it from the config if it does not change the weights",
        )
        for key in sorted(set(config) - set(known))
        if config[key]
    ]


def check_types(config: dict, where: str) -> list[AdapterkitError]:
    """Settings of all types that are flags, texts or lists, and are not."""
    errors: list[AdapterkitError] = [
        unfit(config, k, "true or false", where)
        for k in FLAGS
        if not isinstance(config.get(k), bool | None)
    ]
    errors += [
        unfit(config, k, "a text", where)
        for k in TEXTS
        if not isinstance(config.get(k), str | None)
    ]
    for key in LISTS:
        value = config.get(key)
        if value is not None and not (
            isinstance(value, list) and all(isinstance(v, str) and v for v in value)
        ):
            errors.append(unfit(config, key, "a list of names", where))
    return errors


def check_patterns(config: dict, where: str) -> list[AdapterkitError]:
    """Ranks and alphas by pattern that are none."""
    errors: list[AdapterkitError] = []
    for key in ("rank_pattern", "alpha_pattern"):
        table = config.get(key) or {}
        if not isinstance(table, dict) or not all(
            is_number(v, whole=key == "rank_pattern") for v in table.values()
        ):
            what = "whole numbers above 0" if key == "rank_pattern" else "finite numbers"
            errors.append(unfit(config, key, f"a map of patterns to {what}", where))
    return errors


def is_number(value, *, whole: bool) -> bool:
    if whole:
        return type(value) is int and 0 < value < 2**31
    return type(value) in (int, float) and math.isfinite(value)


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
BENEATH = re.compile(r"\.base_layer\.\w+$")  # a value of the layer right inside a wrapper
NO_ARITHMETIC = re.compile(r"\.lora_velora_embed$")  # a buffer of VeLoRA's backward pass
NOT_READ = re.compile(
    r"\.(lora_\w+|ranknum|hada_\w+|lokr_\w+|oft_\w+|boft_\w+|vera_\w+|ia3_\w+)(\.|$)"
)


def _sorted_out(
    tensors: dict[str, TensorSpec], errors: list[AdapterkitError], where: str, roles: Patterns
) -> _Parts:
    parts = _Parts()
    names = {key: _unwrapped(key) for key in tensors}
    plain = set(names.values())
    for key, spec in tensors.items():
        name = names[key]
        role = next(((m[1], what) for pattern, what in roles if (m := pattern.match(name))), None)
        if role is not None:
            at = _module_and_depth(role[0])
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
            name = _without_wrappers(
                _trained_copy(name, plain).replace(".token_adapter.base_layer.", ".")
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


def _unwrapped(key: str) -> str:
    """A key without what PEFT, torch.compile and data parallelism put around the model."""
    name = key.removeprefix(PREFIX).replace("._orig_mod.", ".")
    return name.removeprefix("_orig_mod.").removeprefix("module.")


def canonical(key: str) -> str:
    """A key as PEFT writes it: its prefix, no adapter's name inside."""
    name = re.sub(r"\.(lora_[AB])\.\w+\.(weight|bias)$", r".\1.\2", _unwrapped(key))
    name = re.sub(
        r"\.(lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta)\.\w+(\.weight)?$",
        r".\1",
        name,
    )
    return PREFIX + name


def _trained_copy(name: str, plain: set[str]) -> str:
    """The parameter meant by `module.modules_to_save[.<adapter>].<rest>`; bias="all" saves it so beside the plain name."""
    module, wrapper, rest = name.partition(".modules_to_save.")
    without_adapter = rest.partition(".")[2]
    if not wrapper:
        return name
    return (
        f"{module}.{rest}"
        if not without_adapter or f"{module}.{rest}" in plain
        else f"{module}.{without_adapter}"
    )


def _two_names(key: str, other: str, where: str) -> Refused:
    return Refused(
        f"{shown(key)} and {shown(other)} name one thing",
        expected="each once",
        where=where,
        hint="remove one",
    )


def _module_and_depth(path: str) -> tuple[str, int]:
    """Module path without wrapper levels, and how many levels stand at its end (nested parameter wrappers)."""
    depth = 0
    while path.endswith(".base_layer"):
        path, depth = path.removesuffix(".base_layer"), depth + 1
    return _without_wrappers(path), depth


def _without_wrappers(name: str) -> str:
    return re.sub(r"(?:\.base_layer)+(?=\.)", "", name)


def wrapped(path: str, levels: Mapping[str, int]) -> str:
    """A plain path as PEFT writes it: `base_layer` once for each wrapper around a module that it goes through."""
    found, module = "", ""
    for part in path.split("."):
        found += (
            ".base_layer" * (levels.get(module, 0) if module else 0)
            + ("." if module else "")
            + part
        )
        module += ("." if module else "") + part
    return found


def rewrapped(key: str, levels: Mapping[str, int]) -> str:
    """The canonical key of a value that is no factor in a file whose modules are wrapped so many times."""
    head, inner, tail = canonical(key).removeprefix(PREFIX).partition(".token_adapter.")
    path = head + inner.removesuffix(".")
    return PREFIX + wrapped(_without_wrappers(path), levels) + (f".{tail}" if inner else "")


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


# What PEFT saves unasked: the embeddings, when their size changed or they were adapted (save_embedding_layers="auto")
EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:\w*embed\w*|wte|\w*lm_head|shared|output|output_layer|decoder|proj_out|vocab_projector|lm_loss)\.(?:weight|bias)$"
)


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
