"""Variants of LoRA in PEFT 0.21 that are standard LoRA in fewer numbers: QA-LoRA and BD-LoRA."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from adapterkit.adapters.formats.modules.kinds import FACTORS
from adapterkit.adapters.formats.modules.record import AdapterModule, Modules
from adapterkit.adapters.formats.modules.tensors import Expression, block_diagonal, gathered
from adapterkit.core.adapter.config import (
    INCOMPLETE,
    check_settings,
    check_unknown_settings,
    invalid_setting,
)
from adapterkit.core.commands import EXTRACT
from adapterkit.core.errors import AdapterkitError, Problems, Refused, listed, shown
from adapterkit.core.records import (
    FLAG,
    POSITIVE_INT,
    TEXT,
    Check,
    Json,
    Settings,
    list_of,
    optional,
)

QALORA, BDLORA = INCOMPLETE
SIZE = "qalora_group_size"
NOISE = "monteclora_config"  # of MonteCLoRA's training; in evaluation a and b act as they are
EXCLUDED = ("use_dora", "lora_bias", "alora_invocation_tokens")  # PEFT combines them with neither
SIDES = {"a": "target_modules_bd_a", "b": "target_modules_bd_b"}
BLOCKS: dict[str, Check] = {
    "nblocks": POSITIVE_INT,
    "match_strict": optional(FLAG),
    **dict.fromkeys(SIDES.values(), optional(list_of(TEXT, "a list of texts"))),
}


ONLY_READ = "train it with PEFT: the adapters that PEFT saves are read"
REASONS = {  # setting -> why no standard factors are its delta, and what to do
    "alora_invocation_tokens": (
        "an activated LoRA acts on the tokens after its invocation only: no weight equals it",
        "load it live with adapterkit.runtime.load, or with PEFT; it cannot be merged",
    ),
    "arrow_config": (
        "an Arrow router picks experts for each token: no weight equals it",
        "merge one of its experts\nadapterkit merge BASE ADAPTER --out merged",
    ),
    "kasa_config": ("KaSA truncates the base and has a diagonal of its own", EXTRACT),
    "megatron_config": (
        "Megatron's layers are parts of the model's",
        "export it with Megatron-Bridge: its adapters are read",
    ),
    QALORA: ("QALoRA pools the inputs before a", ONLY_READ),
    BDLORA: ("BD-LoRA's factors are block-diagonal", ONLY_READ),
}


def other_arithmetic(setting: str, where: str) -> Refused:
    """The refusal of a setting that means other arithmetic than b @ a."""
    reason, hint = REASONS[setting]
    problem, expected = f"{setting} is set: {reason}", "a plain or DoRA LoRA"
    return Refused(problem, expected=expected, where=where, hint=hint, code="AK301")


def completed(modules: Modules, config: Settings, where: str) -> tuple[list[AdapterModule], Json]:
    """The modules with all numbers of their factors, and the config of a standard LoRA.

    `where`: the path of the config. `Refused` for settings that PEFT does not combine, and for
    shapes that a variant does not have."""
    plain = {**config, NOISE: None} if config.get(NOISE) else dict(config)
    names = [name for name in INCOMPLETE if config.get(name)]
    if not names:
        return list(modules), plain
    hint = "restore the config that PEFT saved"
    errors = Problems(_problems(config, where), where=where, hint=hint, code="AK301")
    if len(both := [name for name in (*names, *EXCLUDED) if config.get(name)]) > 1:
        errors.add(" with ".join(both), "one of them: PEFT trains no such adapter")
    if strange := [m.path for m in modules if m.kind != FACTORS or m.embedding]:
        errors.add(f"{names[0]} of {listed(strange)}", "linear layers alone")
    errors.raise_all()
    if names == [QALORA]:
        found = [_pooled(module, config[SIZE]) for module in modules]
    else:
        found = list[AdapterModule]()
        for module in modules:
            with errors.collected():
                found.append(_in_blocks(module, config[BDLORA], where))
    errors.raise_all()
    # without r, so that the ranks and alphas of these modules are written
    return found, {key: value for key, value in plain.items() if key not in (*names, SIZE, "r")}


def _problems(config: Settings, where: str) -> list[AdapterkitError]:
    """Errors of the settings of both variants."""
    if config.get(QALORA):
        return check_settings({SIZE: POSITIVE_INT}, dict(config), where)
    table = config[BDLORA]
    if not isinstance(table, Mapping):
        return [invalid_setting(dict(config), BDLORA, "a table", where)]
    table = dict(table)
    return check_unknown_settings(table, BLOCKS, where) + check_settings(BLOCKS, table, where)


def _pooled(module: AdapterModule, size: int) -> AdapterModule:
    """QA-LoRA: a' (r, n) = (n / g) / g · a (r, n / g), each column g times.

    PEFT's forward gives a the means of groups of g inputs, times their number n / g. The factor is
    in alpha here, because a then keeps its dtype without rounding."""
    a = module.parts["a"]
    count = a.shape[1]
    parts = {**module.parts, "a": gathered(a, _repeated(count, size), 1)}
    return replace(module, parts=parts, alpha=module.alpha * count / size)


@cache
def _repeated(count: int, times: int) -> tuple[int, ...]:
    """0, ..., 0, 1, ..., 1, ...: one tuple for all modules of a width."""
    return tuple(index for index in range(count) for _ in range(times))


def _in_blocks(module: AdapterModule, settings: Mapping[str, Any], where: str) -> AdapterModule:
    """BD-LoRA: a or b, by the patterns in the module's name, is block-diagonal; the file has the
    blocks one below the other."""
    count, errors = settings["nblocks"], Problems(where=where, code="AK301")
    errors.hint = "restore the config that PEFT saved"
    roles = [
        role
        for role, key in SIDES.items()
        if any(pattern in module.name for pattern in settings.get(key) or ())
    ]
    if len(roles) > 1 or (settings.get("match_strict", True) and not roles):
        problem = f"{shown(module.path)} is in {'both' if roles else 'none'} of the lists of blocks"
        errors.fail(problem, f"one of {' and '.join(SIDES.values())}")
    if not roles:
        return module
    (role,) = roles
    part = module.parts[role]
    if part.shape[0] % count:
        problem = f"{role} {part.shape} of {shown(module.path)}"
        errors.fail(problem, f"rows for each of {count} blocks, as nblocks says")
    return replace(module, parts={**module.parts, role: _diagonal(part, count)})


def _diagonal(blocks: Expression, count: int) -> Expression:
    """A (rows, count · columns) with these blocks (rows, columns) on its diagonal."""
    rows = blocks.shape[0]
    each = [range(first, first + rows // count) for first in range(0, rows, rows // count)]
    return block_diagonal([gathered(blocks, own) for own in each], each, rows)
