"""Fill in and read the templates of a format: metadata and settings of a file.

A template of metadata is a number, or a text with words in braces; `{word}` alone is the value
itself.
"""

import re
from collections import Counter
from collections.abc import Iterable

from adapterkit.adapters.formats.capabilities import OTHER_FORMAT
from adapterkit.adapters.formats.files import configs
from adapterkit.adapters.formats.modules.kinds import PLAIN
from adapterkit.adapters.formats.modules.parts import rank_of
from adapterkit.adapters.formats.modules.record import AdapterModule, Modules
from adapterkit.adapters.formats.schema import Format
from adapterkit.core.adapter.adapter_config import as_int, declared_settings
from adapterkit.core.errors import Refused, listed
from adapterkit.core.records import Json, Settings

WORD = re.compile(r"\{(\w+)\}")
LAYERS = ".layers."
VARIOUS = "Dynamic"  # as sd-scripts writes it when it resizes


def filled(templates: Settings, values: Settings) -> Json:
    """The metadata; keys whose words have no value are left out."""
    metadata: Json = {}
    for key, template in templates.items():
        words = WORD.findall(template) if isinstance(template, str) else []
        if any(values.get(word) is None for word in words):
            continue
        whole = words and template == f"{{{words[0]}}}"
        if not words or whole:
            metadata[key] = values[words[0]] if whole else template
        else:
            metadata[key] = WORD.sub(lambda match: str(values[match[1]]), template)
    return metadata


def words_of(templates: Settings, metadata: Settings) -> Json:
    """The values of words in this metadata, from the templates that it matches."""
    values: Json = {}
    for key, template in templates.items():
        words = WORD.findall(template) if isinstance(template, str) else []
        if not words or key not in metadata:
            continue
        if template == f"{{{words[0]}}}":
            values[words[0]] = metadata[key]
            continue
        pattern = re.escape(template)
        for word in words:
            pattern = pattern.replace(re.escape(f"{{{word}}}"), f"(?P<{word}>.+)")
        match = re.fullmatch(pattern, str(metadata[key]))
        values |= match.groupdict() if match else {}
    return values


def words_for(facts: Settings, modules: Iterable[AdapterModule]) -> Json:
    """The words of templates: facts, words derived from a base's Hub id, and the rank and alpha
    that all modules share: VARIOUS if they differ, None if no module has any."""
    words: Json = {}
    if (base := facts.get("base")) is not None:
        words = {"bases": 1, "base_name": base.rpartition("/")[2]}
    words |= facts
    own = [m for m in modules if rank_of(m.kind, m.parts) is not None]
    for word, values in (("rank", {m.rank for m in own}), ("alpha", {m.alpha for m in own})):
        words[word] = str(*values) if len(values) == 1 else VARIOUS if values else None
    return words


def settings_of(format: Format, modules: Modules, config: Settings) -> Json | None:
    """The settings of modules under the file's names; None if the format has none.

    `config` is the source's. `Refused` if only some modules have magnitudes: a file cannot say so.
    """
    template = format.config.write
    if not template:
        return None
    ranked = [module for module in modules if module.kind in PLAIN]
    plain = [module.path for module in ranked if "magnitude" not in module.parts]
    dora = len(plain) < len(ranked)
    if dora and plain:
        raise Refused(
            f"the adapter has magnitudes, but none for {listed(plain)}",
            expected=f"magnitudes of all modules or none: {format.title} has one setting for all",
            where="--to",
            hint=OTHER_FORMAT,
            code="AK503",
        )
    names = sorted({module.name for module in modules})
    settings = declared_settings(
        {module.name: module.rank for module in ranked},
        {module.name: module.alpha for module in ranked},
    )
    scales = Counter(module.scale for module in ranked)
    values: Json = {
        "rank": settings["r"],
        "alpha": settings["lora_alpha"],
        "scale": as_int(scales.most_common(1)[0][0]) if scales else 1,
        "rank_pattern": settings["rank_pattern"],
        "alpha_pattern": settings["alpha_pattern"],
        "modules": names,
        "suffixes": sorted({name.partition(LAYERS)[2].partition(".")[2] or name for name in names}),
        "base": config.get("base_model_name_or_path"),
        "dora": dora,
        "kind": "dora" if dora else "lora",
    }
    return configs.filled(template, values)
