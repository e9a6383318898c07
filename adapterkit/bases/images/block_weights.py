"""Weights of the blocks of an image model, in the forms in use: numbers and presets of
sd-webui-lora-block-weight and of ComfyUI's Inspire Pack, prefixes of names in ComfyUI's nodes,
nested settings of diffusers' `set_adapters`."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from adapterkit.adapters.formats.image_model import SingleFileModel, with_parts
from adapterkit.adapters.formats.library import architectures, single_file_format
from adapterkit.adapters.formats.modules.names import names_of
from adapterkit.adapters.formats.schema import BlockSchema
from adapterkit.bases.images.pipeline import Pipeline
from adapterkit.core.checkpoint.folder import read_small
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.checkpoint.strict import nested_json
from adapterkit.core.errors import Problems, Refused, did_you_mean, listed, shown
from adapterkit.core.options import finite
from adapterkit.core.records import Json

LBW = "--lbw"
REST = "REST"  # in lists: the modules of no block
UNET = "unet"
SIDES = {"down": "down_blocks", "up": "up_blocks"}
ATTENTION = re.compile(r"(\w+\.\d+|mid_block)\.attentions\.(\d+)\.")
SELECTED, FILTER = "selected_blocks", "layer_filter"  # of WanVideoWrapper's node
LETTERS = frozenset("AaBbRrUu")
MOST_BYTES = 1 << 20  # of a file of weights
Factor = Callable[["ModuleNames"], float | None]


@dataclass(frozen=True)
class ModuleNames:
    """A module of a base: its component, its name in the loaded model, and its publisher's name."""

    part: str
    model: str
    original: str
    component: str  # the component's name in the architecture


class ModelNames:
    """The modules of a base by all of their names."""

    def __init__(self, base: Checkpoint | Pipeline):
        self.base = base

    @cached_property
    def architecture(self) -> str | None:
        """The family of an image model; None for other bases."""
        base = self.base
        if isinstance(base, Pipeline):
            base = base.denoiser and with_parts(base.denoiser)
        return base.architecture if isinstance(base, SingleFileModel) else None

    @property
    def parts(self) -> Sequence[str]:
        return [*self.base.parts] if isinstance(self.base, (SingleFileModel, Pipeline)) else []

    @property
    def denoiser(self) -> str:
        """The architecture's name for its denoiser."""
        return next(iter(single_file_format().components(self.architecture)))

    def of(self, module: str) -> list[ModuleNames]:
        """The model's modules behind one module of the base: several if the file fuses them, none
        outside the components."""
        if isinstance(self.base, SingleFileModel):
            found = self.base.found(module)
            pairs = [(part, part, names.models(match)) for part, names, match in found]
        else:
            assert isinstance(self.base, Pipeline)
            part, _, name = module.partition(".")
            own = self.base.parts.get(part)
            # both denoisers of Wan 2.2 are transformers
            pairs = [(part, self.denoiser if own and own.is_denoiser else part, [name])]
        return [self._named(part, component, one) for part, component, m in pairs[:1] for one in m]

    def _named(self, part: str, component: str, model: str) -> ModuleNames:
        named = names_of(str(self.architecture), component, "original").named(model)
        return ModuleNames(part, model, named[1] if named else model, component)

    def all(self, part: str) -> Iterator[ModuleNames]:
        """The modules of a component."""
        if isinstance(self.base, SingleFileModel):
            modules = sorted(self.base.modules)
        else:
            assert isinstance(self.base, Pipeline)
            keys = self.base.part(part).as_base.tensors
            modules = dict.fromkeys(f"{part}.{key.rpartition('.')[0]}" for key in keys)
        return (one for module in modules for one in self.of(module) if one.part == part)


@dataclass(frozen=True)
class BlockWeights:
    """The factors of an adapter's weight, by module."""

    names: ModelNames
    of_module: Factor  # None: the module is in no block
    text: str

    @staticmethod
    def of(text: str, names: ModelNames) -> "BlockWeights":
        """Parse a preset, a list of numbers or JSON settings for a base; `Refused` if invalid, or
        unsuitable for the base."""
        if names.architecture is None:
            raise _unknown_family(None)
        make = _of_settings if text.lstrip().startswith("{") else _of_numbers
        return BlockWeights(names, make(text, names), text)

    def factor(self, module: str) -> float | None:
        """The factor on a module; `Refused` if it fuses modules with different factors."""
        factors = {self.of_module(one) for one in self.names.of(module)} or {None}
        if len(factors) > 1:
            raise Refused(
                f"{LBW}: {shown(module)} of the file fuses modules with different weights",
                expected="one weight for all modules that the file fuses",
                where="options",
                hint="give weights of blocks, or merge into the pipeline of diffusers",
                code="AK101",
            )
        return factors.pop()


def inlined(text: str) -> str:
    """The text of an option with the contents of the file that it names, `[N:]FILE[:PRESET]`."""
    number = re.match(r"\d+:", text)
    head, rest = text[: number.end()] if number else "", text[number.end() :] if number else text
    if rest.lstrip().startswith("{"):
        return text
    path, name = (rest, "") if os.path.isfile(rest) else (rest.rpartition(":")[0], None)
    if not path or not os.path.isfile(path):
        if re.search(r"\.(txt|json)(:|$)", rest):
            hint = "check the path"
            raise Refused(
                f"{LBW}: no such file: {shown(rest)}", where="options", hint=hint, code="AK101"
            )
        return text
    content = _content(path)
    if content.lstrip().startswith("{"):
        return head + content
    name = rest.rpartition(":")[2] if name is None else ""
    presets = _presets(content)
    if name not in presets:
        raise Refused(
            f"{LBW}: {shown(path)} has no preset {shown(name)!r}",
            expected=f"{path}:NAME, of its {len(presets)} presets: {listed(list(presets))}",
            where="options",
            hint=did_you_mean([name], presets) or "name one of them",
            code="AK101",
        )
    return head + presets[name]


def _content(path: str) -> str:
    try:
        return read_small(path, MOST_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise Refused(
            f"{LBW}: {shown(path)}: {shown(error)}",
            expected="lines NAME:NUMBERS, or settings in JSON",
            where="options",
            hint="give a file of weights of blocks",
            code="AK101",
        ) from error


def _presets(content: str) -> dict[str, str]:
    """The presets of a file, one `NAME:NUMBERS` per line, last of a name; # and @ begin other
    lines."""
    lines = (line.strip() for line in content.splitlines())
    pairs = (line.split(":") for line in lines if ":" in line and line[0] not in "#@")
    return {name.strip(): numbers.strip() for name, numbers, *_ in pairs}


def _unknown_family(name: str | None) -> Refused:
    known = ", ".join(name for name, one in architectures().items() if one.blocks.lists)
    return Refused(
        f"{LBW} with {'a model of ' + name if name else 'this base'}",
        expected=f"a model of {known}, in one file or as a pipeline",
        where="options",
        hint="give --weight-for REGEX=W" + " or prefixes of names in JSON" * bool(name),
        code="AK101",
    )


# ---- numbers -----------------------------------------------------------------------------------


def _of_numbers(text: str, names: ModelNames) -> Factor:
    """The weight of each block from a preset or a list; blocks missing from a list have none."""
    words = architectures()[str(names.architecture)].blocks
    if not words.lists:
        raise _unknown_family(names.architecture)
    weights = _weights_of(text, words)

    def factor(one: ModuleNames) -> float | None:
        block = _block(one, words)
        if block is None:
            return weights.get(REST)
        return weights.get(block, weights.get(block.rstrip("0123456789"), 0.0))

    return factor


def _block(one: ModuleNames, words: BlockSchema) -> str | None:
    name = f"{one.component}.{one.original}"
    for pattern, word in words.names.items():
        if found := re.fullmatch(pattern, name):
            return word + "".join(f"{int(number):02}" for number in found.groups())
    return None


def _weights_of(text: str, words: BlockSchema) -> dict[str, float]:
    numbers = [number.strip() for number in words.presets.get(text, text).split(",")]
    values = [finite(number) for number in numbers]
    blocks: Sequence[str] = words.lists.get(str(len(values)), "").split()
    if None in values or not blocks:
        lengths = f"{' or '.join(words.lists)} numbers"
        known = ", ".join(words.presets)
        hint = f"for {next(iter(words.lists.values()))}"
        if letters := sorted(LETTERS & {*numbers}):
            hint = f"give numbers for {', '.join(letters)}, which only a node sets"
        raise Refused(
            f"{LBW} {shown(text)!r}" + f": {len(values)} numbers" * (None not in values),
            expected=f"{known}, or {lengths}" if known else lengths,
            where="options",
            hint=did_you_mean([text], words.presets) or hint,
            code="AK101",
        )
    pairs = zip(blocks, values, strict=True)
    return {name: value for block, value in pairs if value is not None for name in block.split(",")}


# ---- settings in JSON --------------------------------------------------------------------------


def _of_settings(text: str, names: ModelNames) -> Factor:
    """Factors by component, as in diffusers' `set_adapters`, or by prefixes of names."""
    try:
        settings = nested_json(text)
    except ValueError as error:
        raise _wrong(f"no JSON: {shown(error)}", "an object", "check the file") from error
    if not isinstance(settings, dict):
        raise _wrong(f"a JSON {type(settings).__name__}", "an object", "check the file")
    is_nested = any(isinstance(value, (dict, list)) for value in settings.values())
    if SELECTED in settings:
        return _of_selected(settings, names)
    known = {part for one in architectures().values() for part in one.components}
    if is_nested or {*settings} & {*names.parts, *known}:
        return _of_parts(settings, names)
    return _of_prefixes(settings, names)


def _wrong(problem: str, expected: str, hint: str) -> Refused:
    return Refused(f"{LBW}: {problem}", expected=expected, where="options", hint=hint, code="AK101")


def _number(value: object, where: str) -> float:
    number = float(value) if isinstance(value, bool) else finite(value)
    if number is None or isinstance(value, str):
        raise _wrong(f"{shown(where)} is {shown(json.dumps(value))}", "a number", "give a number")
    return number


def _of_prefixes(settings: Json, names: ModelNames, default: float | None = None) -> Factor:
    """The weight of the longest prefix of a module's original name, as in ComfyUI's nodes:
    `double_blocks.0.`, `input_blocks.1.`, `middle_block.`."""
    weights = {prefix: _number(value, prefix) for prefix, value in settings.items()}
    modules = [one for part in names.parts for one in names.all(part)]
    originals = [f"{one.original}." for one in modules if one.component == names.denoiser]
    _check_used(weights, originals, str.startswith)
    ordered = sorted(weights, key=len, reverse=True)

    def factor(one: ModuleNames) -> float | None:
        fits = (prefix for prefix in ordered if f"{one.original}.".startswith(prefix))
        prefix = next(fits, None) if one.component == names.denoiser else None
        return default if prefix is None else weights[prefix]

    return factor


def _of_selected(settings: Json, names: ModelNames) -> Factor:
    """The blocks that a node selects; others, and names that its filter matches, get weight 0."""
    wrong = {*settings} - {SELECTED, FILTER}
    if wrong or not isinstance(settings[SELECTED], dict):
        raise _wrong(
            f"{listed(sorted(wrong))}", f"{SELECTED}, {FILTER}", "copy the settings of the node"
        )
    words = [word.strip() for word in str(settings.get(FILTER) or "").split(",")]
    inside = _of_prefixes(settings[SELECTED], names, 0.0)
    return lambda one: 0.0 if any(w in one.original for w in words if w) else inside(one)


def _of_parts(settings: Json, names: ModelNames) -> Factor:
    """A number for each component, for the denoiser optionally one per block; the default is 1."""
    if unknown := sorted({*settings} - {*names.parts}):
        hint = "leave them out"
        raise _wrong(f"no parts {listed(unknown)}", f"some of {', '.join(names.parts)}", hint)
    by_part: dict[str, float | Mapping[str, float]] = {}
    for part, value in settings.items():
        if value is None:
            continue
        if not isinstance(value, dict):
            by_part[part] = _number(value, part)
        elif part == UNET:
            by_part[part] = _of_unet(value, names)
        else:
            weights = {word: _number(one, word) for word, one in value.items()}
            _check_used(weights, [one.model for one in names.all(part)], str.__contains__)
            by_part[part] = weights

    def factor(one: ModuleNames) -> float:
        weights = by_part.get(one.part, 1.0)
        if not isinstance(weights, Mapping):
            return weights
        # as diffusers does: the first whose name is in the module's;
        # resnets and samplers get the weight of the attention with their number
        inside = next((weight for name, weight in weights.items() if name in one.model), None)
        words = one.model.split(".")
        if inside is not None or len(words) < 4:
            return 1.0 if inside is None else inside
        return weights.get(f"{words[0]}.{words[1]}.attentions.{words[3]}", 1.0)

    return factor


def _of_unet(settings: Json, names: ModelNames) -> dict[str, float]:
    """The weight of each attention of a U-Net, by its name, from {"down": {"block_1": [1, 0.5]},
    "mid": 1, "up": 0.5}; the default is 1."""
    found = {m[0] for one in names.all(UNET) if (m := ATTENTION.match(one.model))}
    count = Counter(place.partition(".attentions.")[0] for place in found)
    errors, weights = Problems(where="options", code="AK101"), {}
    hint = f"the blocks with attentions are {', '.join(sorted(count))}"
    if unknown := sorted({*settings} - {*SIDES, "mid"}):
        errors.add(f"{LBW}: unet: {listed(unknown)}", "down, mid, up", hint)
    own = {"mid_block": settings.get("mid", 1.0)}
    for side, name in SIDES.items():
        value = settings.get(side, 1.0)
        blocks = {block: value for block in count if block.startswith(name)}
        if isinstance(value, dict):
            given = {f"{name}.{k.removeprefix('block_')}": v for k, v in value.items()}
            if wrong := sorted({*given} - {*count}):
                expected = "block_N, of a block with attentions"
                errors.add(f"{LBW}: unet: {side}: {listed(wrong)}", expected, hint)
            blocks = {block: given.get(block, 1.0) for block in blocks}
        own |= blocks
    for block, value in own.items():
        values = value if isinstance(value, list) else [value]
        values = values * count[block] if len(values) == 1 else values
        if len(values) != count[block]:
            expected = f"one, or {count[block]}"
            errors.add(f"{LBW}: unet: {len(values)} weights of {block}", expected, hint)
            continue
        with errors.collected():
            for number, one in enumerate(values):
                weights[f"{block}.attentions.{number}"] = _number(one, block)
    errors.raise_all()
    return weights


def _check_used(
    weights: Mapping[str, float], modules: Sequence[str], fits: Callable[[str, str], bool]
) -> None:
    unused = [word for word in weights if not any(fits(module, word) for module in modules)]
    if unused:
        hint = f"names are for example {listed(modules)}"
        raise _wrong(f"no module matches {listed(unused)}", "names of the base's modules", hint)


def with_files(lbw: Iterable[str]) -> tuple[str, ...]:
    """The option's texts with the contents of their files; `Refused` with all unreadable ones."""
    errors, texts = Problems(), []
    for text in lbw:
        with errors.collected():
            texts.append(inlined(text))
    errors.raise_all()
    return tuple(texts)
