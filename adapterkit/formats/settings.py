"""The settings that a format keeps in a file beside the weights."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from adapterkit.adapters.declared import declared_settings, whole
from adapterkit.errors import Refused, listed
from adapterkit.formats.capabilities import OTHER_FORMAT
from adapterkit.formats.configs import filled
from adapterkit.formats.kinds import PLAIN
from adapterkit.formats.record import Module
from adapterkit.formats.schema import Format

LAYERS = ".layers."


def settings_of(
    form: Format, modules: Sequence[Module], config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The settings of modules under the file's names; None where the format has none.

    `config`: the source's. `Refused` for magnitudes of some modules only, which a file cannot say.
    """
    template = form.config.write
    if not template:
        return None
    ranked = [module for module in modules if module.kind in PLAIN]
    plain = [module.path for module in ranked if "magnitude" not in module.parts]
    dora = len(plain) < len(ranked)
    if dora and plain:
        raise Refused(
            f"magnitudes, but none for {listed(plain)}",
            expected=f"magnitudes of all modules or none: {form.title} says it once",
            where="--to",
            hint=OTHER_FORMAT,
        )
    names = sorted({module.name for module in modules})
    settings = declared_settings(
        {module.name: module.rank for module in ranked},
        {module.name: module.alpha for module in ranked},
    )
    scales = Counter(module.scale for module in ranked)
    values: dict[str, Any] = {
        "rank": settings["r"],
        "alpha": settings["lora_alpha"],
        "scale": whole(scales.most_common(1)[0][0]) if scales else 1,
        "rank_pattern": settings["rank_pattern"],
        "alpha_pattern": settings["alpha_pattern"],
        "modules": names,
        "suffixes": sorted({name.partition(LAYERS)[2].partition(".")[2] or name for name in names}),
        "base": config.get("base_model_name_or_path"),
        "dora": dora,
        "kind": "dora" if dora else "lora",
    }
    return filled(template, values)
