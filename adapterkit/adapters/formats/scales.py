"""Scales in files: read from tensors, settings or metadata, and written there or folded into b."""

import json
from functools import cached_property

from adapterkit.adapters.formats.capabilities import word_of
from adapterkit.adapters.formats.files.configs import fields
from adapterkit.adapters.formats.files.templates import words_of
from adapterkit.adapters.formats.modules.kinds import FACTORS, KINDS
from adapterkit.adapters.formats.modules.parts import rank_of
from adapterkit.adapters.formats.modules.record import AdapterModule, Modules
from adapterkit.adapters.formats.modules.tensors import from_spec
from adapterkit.adapters.formats.modules.uniform_rank import is_float32, shared_number, with_scale
from adapterkit.adapters.formats.schema import Format
from adapterkit.core import dtypes
from adapterkit.core.adapter.adapter_config import DeclaredScales, declared_settings
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.strict import strict_json
from adapterkit.core.errors import Damaged, Refused, shown
from adapterkit.core.options import finite
from adapterkit.core.records import Json, Settings
from adapterkit.core.weights.plan_reader import PlanReader

SETTINGS = {  # PEFT's words for a config's values
    "rank": "r", "alpha": "lora_alpha", "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern", "rslora": "use_rslora",
}  # fmt: skip


class Scales:
    """The alphas of a file's modules; scale = alpha / rank."""

    def __init__(
        self,
        format: Format,
        metadata: Settings,
        config: Settings,
        alpha: float | None,  # if the format does not store it
        reader: PlanReader,
        where: str,
    ):
        self.format, self.asked, self.reader, self.where = format, alpha, reader, where
        self.metadata, self.config = metadata, config
        self.declares = False  # whether the file says an alpha itself

    def alpha(self, component: str, name: str, rank: int, stored: TensorSpec | None) -> float:
        """A module's alpha. `Refused` if the file has none and no default applies, or if it
        declares another rank than the tensors have."""
        words = self.format.scale
        if stored is not None:
            self.declares = True
            number = self.number(stored)
            if number == 0 and words.place == "tensor":
                raise Refused(
                    f"{shown(stored.key)} is 0",
                    expected="another number: the trainers take the rank for it, ComfyUI takes 0",
                    where=self.where,
                    hint="write the alpha that was meant into the file",
                    code="AK504",
                )
            return number
        if words.place == "metadata" and component in self._declared:
            self.declares = True
            return self._declared_alpha(self._declared[component], rank, name, words.key)
        if words.place == "shared":
            value = words_of(self.format.metadata.write, self.metadata).get(words.means)
            if value:  # 0 counts as missing
                number = finite(value)
                if number is None:
                    raise Refused(
                        f"{words.means} is {shown(repr(value))} in the metadata",
                        expected="a finite number",
                        where=self.where,
                        hint="use the file as it was saved",
                        code="AK504",
                    )
                return number * (rank if words.means == "scale" else 1)
        is_older = self.asked is not None and self.older is not None
        if words.place == "config" and words.means in self.settings and not is_older:
            self.declares = True
            return self._declared_alpha(self._configured, rank, name, "the config")
        if self.asked is not None:
            return self.asked
        if words.default == "ask":
            raise Refused(
                f"{self.format.title} does not store alpha",
                expected="--alpha A, as in training (the scale is alpha / rank)",
                where=self.where,
                hint="give --alpha",
                code="AK504",
            )
        if words.default == "rank":
            return float(rank)
        return float(words.default) * (rank if words.means == "scale" else 1)

    def _declared_alpha(self, scales: DeclaredScales, rank: int, name: str, place: str) -> float:
        """The alpha of a module; `Refused` if its tensors have another rank than declared."""
        declared, alpha = scales.alpha_of(name)
        if declared != rank:
            raise Refused(
                f"{shown(name)} has rank {rank} in the file",
                expected=f"rank {declared}, as {place} says",
                where=self.where,
                hint="use the file as it was saved",
                code="AK303",
            )
        return alpha

    def number(self, stored: TensorSpec) -> float:
        """The one number of a tensor; `Refused` for another shape."""
        if stored.shape not in ((), (1,)):
            raise Refused(
                f"{shown(stored.key)} has shape {stored.shape}",
                expected="one number",
                where=self.where,
                hint="save the adapter again",
                code="AK504",
            )
        if type(stored) is TensorSpec and stored.dtype in dtypes.NUMBERS:
            return self.reader.number(stored)
        return float(from_spec(stored).value(self.reader).double().reshape(()))

    @cached_property
    def settings(self) -> Json:
        return fields(self.config, dict(self.format.config.read), self.where)

    @property
    def older(self) -> float | None:
        """The alpha that older versions of a tool computed from a scale and an alpha; newer ones
        use the scale alone. None unless the settings have both."""
        has_both = self.format.scale.means == "scale" and {"alpha", "scale"} <= self.settings.keys()
        return self.settings["scale"] * self.settings["alpha"] if has_both else None

    @property
    def notes(self) -> list[str]:
        """A note if older versions of the tool meant another alpha."""
        if self.older is None or self.asked is not None:
            return []
        return [
            f"the scale is {self.settings['scale']:g}, as {self.format.title} reads it now; "
            f"trained by {self.format.scale.older}, it was that times alpha / rank: "
            f"--alpha {self.older:g}"
        ]

    @cached_property
    def _configured(self) -> DeclaredScales:
        """The settings in the config file."""
        values = {
            SETTINGS[word]: value for word, value in self.settings.items() if word in SETTINGS
        }
        if self.format.scale.means == "scale":
            values["lora_alpha"] = self.settings["scale"] * values.get("r", 1)
        return DeclaredScales(values, self.where)

    @cached_property
    def _declared(self) -> dict[str, DeclaredScales]:
        """The settings in the metadata, by component."""
        key = self.format.scale.key
        if key not in self.metadata:
            return {}
        try:
            settings = strict_json(self.metadata[key].encode())
            if not isinstance(settings, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise Damaged(
                f"{key} in the metadata is not JSON: {shown(error)}",
                expected="settings by component",
                where=self.where,
                hint="use the file as it was saved",
                code="AK204",
            ) from error
        tables: dict[str, Json] = {}
        for path, value in settings.items():
            component, _, name = path.partition(".")
            tables.setdefault(component, {})[name] = value
        return {
            component: DeclaredScales(table, f"{self.where}: {key}")
            for component, table in tables.items()
        }


def place_scales(
    modules: Modules, format: Format, *, same_format: bool
) -> tuple[list[AdapterModule], dict[str, float], Json]:
    """The modules to write, with scales folded into b if needed; and the alphas by module and the
    metadata that declare the other scales. `same_format`: the source has the same format."""
    words = format.scale
    if words.place == "metadata":
        loras = [module for module in modules if module.kind == FACTORS]
        if any(module.scale != 1 for module in loras):
            return list(modules), {}, {words.key: _declaration(loras, words.without)}
    if words.place == "shared":
        number, placed = shared_number(modules, words.means)
        pairs = zip(modules, placed, strict=True)
        ratios = {own.path: own.scale / same.scale for own, same in pairs if same is not own}
        return placed, ratios, {words.means: number}
    if words.place == "config":
        return list(modules), {}, {}
    folded = {m.path: m.scale for m in modules if not is_scaled(m, format, same_format)}
    return [with_scale(m, 1.0) if m.path in folded else m for m in modules], folded, {}


def _declaration(modules: Modules, without: str) -> str:
    """The settings of each component, in JSON; names that begin with `without` by their ends."""
    settings: Json = {}
    for component in sorted({module.component for module in modules}):
        own = [module for module in modules if module.component == component]
        table = declared_settings(
            {m.name.removeprefix(without): m.rank for m in own},
            {m.name.removeprefix(without): m.alpha for m in own},
            use_dora=any("magnitude" in m.parts for m in own),
            lora_bias=any("bias" in m.parts for m in own),
        )
        if any(without and m.name.startswith(without) for m in own):
            for patterns in ("rank_pattern", "alpha_pattern"):
                table[patterns] = {k.removeprefix("^"): v for k, v in table[patterns].items()}
        settings |= {f"{component}.{name}": value for name, value in table.items()}
    return json.dumps(settings, indent=2, sort_keys=True)


def has_alpha(module: AdapterModule, format: Format, same_format: bool) -> bool:
    """True if a file in the format has a tensor for the module's alpha. `same_format`: the source
    has the same format, so its alphas are kept instead of folded."""
    is_kept = same_format and format.scale.place == "none" and module.stored_alpha is not None
    is_written = format.scale.place == "tensor" or is_kept
    return is_written and "alpha" in format.kinds[word_of(module, format)]


def is_scaled(module: AdapterModule, format: Format, same_format: bool) -> bool:
    """True if a file in the format stores this module's scale; otherwise it is folded."""
    if not KINDS[module.kind].scaled or module.scale == 1:
        return True
    if rank_of(module.kind, module.parts) is None:
        return False
    stored = module.stored_alpha
    is_stored = stored is not None and stored.number == module.alpha != 0
    # a tensor says an alpha of the source, or a float32 but 0, for which trainers take the rank
    if format.scale.place == "tensor" and not (is_stored or is_float32(module.alpha)):
        return False
    return format.scale.place == "config" or has_alpha(module, format, same_format)
