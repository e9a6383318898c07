"""GGUF model files seen as the checkpoint that they decode to: names, layouts, config and tokenizer as transformers reads them.

Blocks are decoded by the `gguf` package. What its names mean and what llama.cpp did to the layouts (q and k permuted for llama, 1
added to Gemma's norms, experts stacked) comes from transformers' own maps, of which it has two: a model on the meta device with
`TENSOR_PROCESSORS`, and for newer architectures conversion rules. What transformers would leave out without a word is refused.
"""

import contextlib
import json
import logging
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.gguf import Entry, GgufHeader, read_gguf
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Damaged, Refused, Unrecoverable, refuse_all, shown
from adapterkit.weights.names import Skeleton, tied_names
from adapterkit.weights.packed import Packed

COPY = "model.gguf"  # what transformers is shown: the header, and a hole in place of the data
PLAIN = {
    "BF16": "BF16",
    "F16": "F16",
    "F32": "F32",
}  # ggml's types that hold values, widest choice last
PROBED = 1 << 26  # values of a tensor up to which its layout is tried while planning
FREQUENCIES = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# keys of an architecture that say nothing that is not said elsewhere
NO_MATTER = (
    "vocab_size",
    "rope.dimension_count",
    "attention.key_length",
    "attention.value_length",
    "tensor_data_layout",
)
# what transformers' tables of some architectures lack, by the config's own name for it
FILLED = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


class Build(Protocol):
    """Puts a parameter together of its GGUF tensors; `read` decodes one by name, to an array, when it is wanted."""

    def __call__(self, read: Callable[[str], Any], /) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Gguf(Packed):
    """One parameter, of one GGUF tensor or of several (experts' gate and up)."""

    entries: tuple[Entry, ...]
    build: Build = field(compare=False)

    @property
    def read_only(self) -> str | None:
        return "GGUF"

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        import gguf
        import numpy as np

        entries = {entry.name: entry for entry in self.entries}

        def read(name: str) -> Any:
            kind, shape = gguf.GGMLQuantizationType(entries[name].kind), entries[name].shape
            values, width = gguf.GGML_QUANT_SIZES[kind]
            return gguf.dequantize(
                stored.pop(name).numpy().reshape(*shape[:-1], shape[-1] // values * width), kind
            )

        with np.errstate(all="ignore"):  # what is not finite is seen when it is written
            weight = self.build(read)
        if tuple(weight.shape) != self.shape:
            found = f"{shown(self.key)} comes out as {tuple(weight.shape)}"
            raise Unrecoverable(
                found,
                expected=str(self.shape),
                where=self.file,
                hint="convert it with llama.cpp's own tools",
            )
        return weight


class GgufModel(NamedTuple):
    """A GGUF file as a checkpoint of `Gguf` records, and the files of a model's folder that it stands for."""

    checkpoint: Checkpoint
    dtype: str  # what it is best written in: bf16 for blocks, whose own error is larger than the rounding; floats as they are
    model: Any  # transformers' own, without data
    texts: dict[str, bytes]  # the tokenizer's files
    notes: list[str]


def open_gguf(folder: Folder, name: str) -> GgufModel:
    """See a GGUF file as a checkpoint; `Refused` or `Damaged`, all at once, where that cannot be done in full."""
    gguf = _package()
    sizes = {
        int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items() if _decodes(gguf, kind)
    }
    header = read_gguf(folder, name, sizes)
    if header.metadata.get("split.count", 1) not in (0, 1):
        hint = "join them first: llama-gguf-split --merge FIRST OUT"
        raise Refused("one file of a split model", expected="a whole model", where=name, hint=hint)
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        path = Path(scratch, COPY)
        with path.open("wb") as file:
            file.write(header.raw)
            file.truncate(folder.files()[name])
        notes: list[str] = []
        reader = _Reader(folder, name, header, path, notes)
        checkpoint = reader.checkpoint()
        texts = _tokenizer(header, path, notes)
    kinds = {gguf.GGMLQuantizationType(entry.kind).name for entry in header.tensors}
    dtype = (
        next(kind for kind in PLAIN if kind in kinds or kind == "F32")
        if kinds <= PLAIN.keys()
        else "BF16"
    )
    return GgufModel(checkpoint, dtype, reader.model.model, texts, notes)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        found, hint = "the gguf package is not installed", "pip install 'adapterkit[gguf]'"
        raise Refused(
            found, expected="gguf 0.17 or later, which decodes the blocks", hint=hint
        ) from error
    return gguf


def _decodes(gguf: Any, kind: Any) -> bool:
    """Whether the package decodes a type to floats."""
    import numpy as np

    if kind.name not in ("F32", "F16"):
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except (NotImplementedError, KeyError):  # a kind that the package knows by name alone
            return False
    return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging as theirs

    before, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(before)
        if bars:
            theirs.enable_progress_bar()


class _Reader:
    """What transformers makes of a file's header."""

    def __init__(self, folder: Folder, name: str, header: GgufHeader, path: Path, notes: list[str]):
        self.folder, self.name, self.header, self.path, self.notes = (
            folder,
            name,
            header,
            path,
            notes,
        )
        self.entries = {entry.name: entry for entry in header.tensors}
        self.tried: dict[
            Any, tuple[int, ...] | None
        ] = {}  # kinds of parameters: the shape that they come out in

    def checkpoint(self) -> Checkpoint:
        self._check_counts()
        raw = self._raw_config()
        config = self._config(raw)
        shards = {self.name: self.header.header}
        self.model = Skeleton(
            Checkpoint(self.folder, shards, {}, None, None, config, {}), config["architectures"][0]
        )
        tensors = self._tensors(raw)
        return Checkpoint(self.folder, shards, tensors, None, None, config, {})

    def refuse(
        self, found: str, expected: str, hint: str = "use the original checkpoint instead"
    ) -> Refused:
        return Refused(found, expected=expected, where=self.name, hint=hint)

    def theirs(self, what: str, function: Callable[[], Any]) -> Any:
        """Run transformers' code on the header; any of it may fail on metadata that it does not expect."""
        import transformers

        try:
            return function()
        except (Exception, RecursionError) as error:
            found = f"transformers {transformers.__version__} cannot read the {what}: {type(error).__name__}: {shown(error)}"
            expected = f"an architecture that it knows, with its metadata; this is {shown(self.header.architecture)!r}"
            raise self.refuse(
                found, expected, "update transformers, or use the original checkpoint"
            ) from error

    def _check_counts(self) -> None:
        """Numbers of layers and experts decide how much is built before anything can be compared."""
        errors: list[AdapterkitError] = []
        for key, value in self.header.metadata.items():
            most = max(1000, len(self.entries)) if key.endswith("block_count") else 1 << 16
            if key.endswith(("block_count", "expert_count")) and (
                type(value) is not int or not 0 <= value <= most
            ):
                found = f"{shown(key)} = {shown(value)}"
                errors.append(
                    Damaged(
                        found,
                        expected=f"at most {most}",
                        where=self.name,
                        hint="download the file again",
                    )
                )
        heads = self.header.metadata.get("falcon.attention.head_count_kv", 1)
        if (
            self.header.architecture == "falcon" and heads != 1
        ):  # llama.cpp sorts their rows, transformers does not sort them back
            errors.append(
                self.refuse(f"falcon with {shown(heads)} groups of keys", "falcon with one")
            )
        refuse_all(errors)

    def _raw_config(self) -> dict[str, Any]:
        """The config as transformers reads it from the metadata."""

        def read() -> dict[str, Any]:
            archs = _conversion_rules()
            if self.header.architecture in archs:
                from transformers.integrations.gguf.gguf_config_mapping import (
                    GGUF_CONFIG_ARCHS,
                    get_gguf_config,
                )
                from transformers.integrations.gguf.reader import read_gguf_metadata

                if self.header.architecture in GGUF_CONFIG_ARCHS:
                    return get_gguf_config(*read_gguf_metadata(str(self.path)))
            from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

            return load_gguf_checkpoint(str(self.path), return_tensors=False)["config"]

        return self.theirs("config", read)

    def _config(self, raw: dict[str, Any]) -> dict[str, Any]:
        """config.json."""
        from transformers import AutoConfig

        given = {key: value for key, value in raw.items() if key != "_model_name_or_path"}
        defaults = self.theirs("config", lambda: AutoConfig.for_model(**given).to_dict())
        unread = self._unread()
        given |= {
            name: unread[key]
            for key, name in FILLED.items()
            if key in unread and name in defaults and name not in given
        }
        made = self.theirs("config", lambda: AutoConfig.for_model(**given))
        whole = self.theirs("config", lambda: json.loads(made.to_json_string(use_diff=False)))
        told = {
            *self.theirs("config", made.to_diff_dict),
            *given,
            "rope_parameters",
            "model_type",
            "tie_word_embeddings",
        }
        told -= {"_name_or_path", "dtype", "torch_dtype"}
        config = {key: _short(value) for key, value in whole.items() if key in told}
        if not config.get("architectures"):
            config["architectures"] = [self._class_name(str(config.get("model_type")))]
        self._scale_positions(config)
        lost = [
            key
            for key in unread
            if not key.startswith("rope.scal")
            and FILLED.get(key) not in config
            and key not in NO_MATTER
        ]
        if lost:
            self.notes.append(
                f"transformers' own defaults stand in the config for: {', '.join(map(shown, lost[:20]))}"
            )
        return config

    def _class_name(self, model_type: str) -> str:
        from transformers.models.auto import modeling_auto as known

        tables: Any = (
            known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        )
        for table in tables:
            if model_type in table:
                found = table[model_type]
                return found if isinstance(found, str) else found[0]
        raise self.refuse(
            f"no language model of type {shown(model_type)}",
            "an architecture that transformers knows",
        )

    def _unread(self) -> dict[str, Any]:
        """The architecture's own metadata that transformers makes nothing of."""
        if self.header.architecture in _conversion_rules():
            return {}  # those read all that they need, by name
        from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING as MAPPING

        prefix = self.header.architecture + "."
        tables = [
            table
            for kind, table in MAPPING["config"].items()
            if _plain(kind) == _plain(self.header.architecture)
        ]
        read = {key for table in tables for key, name in table.items() if name is not None}
        own = {
            key.removeprefix(prefix): value
            for key, value in self.header.metadata.items()
            if key.startswith(prefix)
        }
        return {key: value for key, value in own.items() if key not in read}

    def _scale_positions(self, config: dict[str, Any]) -> None:
        """The scaling of rotary positions, which transformers leaves out."""
        said = {
            key.removeprefix(self.header.architecture + ".rope."): value
            for key, value in self.header.metadata.items()
            if key.startswith(self.header.architecture + ".rope.scal")
        }
        kind = said.pop("scaling.type", None)
        factor = said.pop("scaling.factor", said.pop("scale_linear", None))
        original = said.pop("scaling.original_context_length", None)
        said.pop("scaling.finetuned", None)
        scaling: dict[str, Any] = {}
        if FREQUENCIES in self.entries:
            scaling = self._llama3(config)
        elif kind in ("linear", "yarn") or (kind is None and factor not in (None, 0.0, 1.0)):
            scaling = {"rope_type": kind or "linear", "factor": factor}
            if kind == "yarn" and original:
                scaling["original_max_position_embeddings"] = original
        elif kind not in (None, "none"):
            said["scaling.type"] = kind
        place = config.get("rope_parameters")
        if isinstance(place, dict) and isinstance(place.get("full_attention"), dict):
            place = place["full_attention"]  # Gemma scales these layers only
        fits = isinstance(place, dict) and (
            not scaling or type(factor) is float or "low_freq_factor" in scaling
        )
        if said or (scaling and not fits):
            found = ", ".join(
                f"{shown(key)} = {shown(value)}" for key, value in {**said, **scaling}.items()
            )
            raise self.refuse(
                f"positions scaled by rope.{found}", "linear or yarn by a factor, or as Llama 3's"
            )
        if scaling and isinstance(place, dict):
            place.update({key: _short(value) for key, value in scaling.items()})

    def _llama3(self, config: dict[str, Any]) -> dict[str, Any]:
        """Llama 3's scaling, of which a file has the factors only: they are looked at, and made again from the settings."""
        import numpy as np

        entry = self.entries[FREQUENCIES]
        place = config.get("rope_parameters")
        theta = place.get("rope_theta") if isinstance(place, dict) else None
        factors = np.ones(0)
        if entry.kind == 0 and entry.stop - entry.start < 1 << 16:
            factors = np.frombuffer(
                self.folder.read(self.name, entry.start, entry.stop), dtype="<f4"
            ).astype(np.float64)
        if (
            len(factors)
            and isinstance(theta, int | float)
            and theta > 0
            and np.isfinite(factors).all()
        ):
            wave = 2 * math.pi * float(theta) ** (np.arange(len(factors)) / len(factors))
            most, old = float(factors.max()), LLAMA3["original_max_position_embeddings"]
            low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
            smooth = np.clip((old / wave - low) / (high - low), 0, 1)
            if most > 0 and np.allclose(1 / ((1 - smooth) / most + smooth), factors, rtol=1e-4):
                return {"rope_type": "llama3", "factor": most, **LLAMA3}
        raise self.refuse(f"{FREQUENCIES} of an unknown rule", "the factors of Llama 3")

    # --- tensors ----------------------------------------------------------------------------------------------------

    def _tensors(self, raw: dict[str, Any]) -> dict[str, TensorSpec]:
        """The model's parameters, each of its GGUF tensors; refused where either side has something left over."""
        archs = _conversion_rules()
        ways = (
            self._by_rules(archs[self.header.architecture])
            if self.header.architecture in archs
            else self._by_map(raw)
        )
        state, errors = {name: tuple(value.shape) for name, value in self.model.state.items()}, []
        groups: dict[str, list[Entry]] = {}
        unknown = []
        for entry in self.header.tensors:
            key = ways.target(entry.name)
            if key in state:
                groups.setdefault(key, []).append(entry)
            elif key is not None and self._dropped(key):
                self.notes.append(
                    f"left out, as transformers has no such part: {shown(entry.name)}"
                )
            elif entry.name != FREQUENCIES:
                unknown.append(entry.name)
        if unknown:
            found = f"{len(unknown)} tensors that transformers has no place for: {', '.join(map(shown, unknown[:6]))}"
            errors.append(self.refuse(found, f"the tensors of {self.model.class_name}"))
        twins = tied_names(self.model.model)
        missing = [
            k
            for k in state
            if k not in groups and not any(twin in groups for twin in twins.get(k, ()))
        ]
        if missing := [
            key for key in missing if not self._ignored(key, "_keys_to_ignore_on_load_missing")
        ]:
            found = f"nothing for {len(missing)} parameters: {', '.join(map(shown, missing[:6]))}"
            errors.append(
                Damaged(
                    found,
                    expected=f"all of {self.model.class_name}",
                    where=self.name,
                    hint="download the file again",
                )
            )
        tensors: dict[str, TensorSpec] = {}
        for key in state:
            if key in groups:
                one = self._record(
                    key,
                    state[key],
                    groups[key],
                    ways.build(key, [entry.name for entry in groups[key]]),
                )
                tensors[key] = one
                errors += self._layout_errors(one)
        refuse_all(errors[:20])
        return tensors

    def _record(self, key: str, shape: tuple[int, ...], entries: list[Entry], build: Build) -> Gguf:
        parts = tuple(
            TensorSpec(e.name, "U8", (e.stop - e.start,), self.name, e.start, e.stop)
            for e in entries
        )
        place = {"file": self.name, "start": parts[0].start, "stop": parts[0].stop}
        return Gguf(
            key=key,
            dtype="F32",
            shape=shape,
            parts=parts,
            entries=tuple(entries),
            build=build,
            **place,
        )

    def _layout_errors(self, one: Gguf) -> list[AdapterkitError]:
        """Whether the parameter comes out in its shape: tried on zeros, once for each kind; the largest ones are only counted, and
        seen when they are decoded."""
        shapes = tuple(entry.shape for entry in one.entries)
        total = sum(math.prod(shape) for shape in shapes)
        fits = total == math.prod(one.shape)
        if fits and total <= PROBED:
            kind = (re.sub(r"\d+", "#", one.key), shapes)
            if kind not in self.tried:
                self.tried[kind] = _shape_of_zeros(one)
            fits = self.tried[kind] == one.shape
        if fits:
            return []
        found = f"{', '.join(f'{shown(e.name)} {e.shape}' for e in one.entries)}"[:500]
        hint = "download the file again"
        return [
            Damaged(
                found,
                expected=f"what {shown(one.key)} {one.shape} is made of",
                where=self.name,
                hint=hint,
            )
        ]

    def _dropped(self, key: str) -> bool:
        return self._ignored(key, "_keys_to_ignore_on_load_unexpected")

    def _ignored(self, key: str, rule: str) -> bool:
        return any(
            re.search(pattern, key) for pattern in getattr(self.model.model, rule, None) or ()
        )

    def _by_map(self, raw: dict[str, Any]) -> "_Map":
        def make() -> "_Map":
            from transformers import modeling_gguf_pytorch_utils as theirs

            processor = theirs.TENSOR_PROCESSORS.get(
                self.header.architecture, theirs.TensorProcessor
            )(config=raw)
            return _Map(processor, theirs.get_gguf_hf_weights_map(self.model.model, processor))

        return self.theirs("names", make)

    def _by_rules(self, rules: Callable[[Any], list]) -> "_Rules":
        return self.theirs("names", lambda: _Rules(rules(self.model.model.config)))


def _shape_of_zeros(one: Gguf) -> tuple[int, ...] | None:
    import numpy as np

    shapes = {entry.name: entry.shape for entry in one.entries}
    try:
        with np.errstate(all="ignore"):
            return tuple(one.build(lambda name: np.broadcast_to(np.float32(0), shapes[name])).shape)
    except Exception:  # transformers' code, on shapes that it does not expect
        return None


class _Map:
    """transformers' older way: a map of names, and a processor of arrays."""

    def __init__(self, processor: Any, names: Mapping[str, str]):
        self.processor, self.names = processor, names

    def target(self, name: str) -> str | None:
        """The parameter that a GGUF tensor is, or is a part of: stacks of experts have no `.weight`."""
        return self.names.get(name) or self.names.get(name.removesuffix(".weight"))

    def build(self, key: str, names: list[str]) -> Build:
        def build(read: Callable[[str], Any]) -> Tensor:
            tensors: dict[str, Tensor] = {}
            for name in names:
                how = {"tensor_key_mapping": self.names, "parsed_parameters": {"tensors": tensors}}
                made = self.processor.process(weights=read(name), name=name, **how)
                if made.name in self.names:
                    tensors[self.names[made.name]] = _tensor(made.weights)
            return tensors[key]

        return build


class _Rules:
    """transformers' newer way: renames, then at most one converter of tensors."""

    def __init__(self, rules: list):
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def renamed(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(name, self.renamings, self.converters)

    def target(self, name: str) -> str | None:
        return self.renamed(name)[0]

    def build(self, key: str, names: list[str]) -> Build:
        patterns = {
            name: pattern for name in names if (pattern := self.renamed(name)[1]) is not None
        }
        converter = next(
            (c for c in self.converters if set(patterns.values()) & set(c.source_patterns)), None
        )
        if converter is None:
            return lambda read: _tensor(read(names[0]))
        # in the order of the rule's sources, gate before up
        ordered = sorted(patterns, key=lambda name: converter.source_patterns.index(patterns[name]))

        def build(read: Callable[[str], Any]) -> Tensor:
            work = deepcopy(converter)
            for name in ordered:
                work.add_tensor(key, name, patterns[name], _tensor(read(name)))  # pyright: ignore[reportArgumentType]
            made: Any = work.convert(key)[key]
            return made[0] if isinstance(made, list) else made

        return build


def _tensor(array: Any) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _conversion_rules() -> Mapping[str, Any]:
    """Architectures that transformers reads by conversion rules, where it has them."""
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:  # an older one, that has the other way only
        return {}
    return GGUF_ARCHS


def _plain(architecture: str) -> str:
    return architecture.replace("_", "").replace("-", "")


def _short(value: Any) -> Any:
    """Floats of a header are float32: 9.999999747378752e-06 is 1e-05."""
    import numpy as np

    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_short(inner) for inner in value]
    if isinstance(value, float) and math.isfinite(value) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def kept_wide(model: Any, key: str, dtype: str) -> bool:
    """Whether transformers loads a parameter in float32 whatever the model's dtype."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    parts = {
        *strict,
        *((getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == "F16" else ()),
    }
    return any(f".{part}." in f".{key}." for part in parts)


def _tokenizer(header: GgufHeader, path: Path, notes: list[str]) -> dict[str, bytes]:
    """The files of the tokenizer that transformers makes of the metadata; none, with a note, where it cannot."""
    from transformers import AutoTokenizer

    if "tokenizer.ggml.model" not in header.metadata:
        notes.append("no tokenizer in the file")
        return {}
    out = path.parent / "tokenizer"
    try:
        AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        ).save_pretrained(str(out))
    except (Exception, RecursionError) as error:
        kind = shown(header.metadata["tokenizer.ggml.model"])
        notes.append(
            f"WARNING: no tokenizer, as transformers cannot make one of kind {kind}: {shown(error)}"
        )
        return {}
    texts = {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.is_file()}
    if "tokenizer_config.json" in texts:
        said = json.loads(texts["tokenizer_config.json"])
        said = {
            key: value
            for key, value in said.items()
            if key not in ("is_local", "local_files_only", "name_or_path")
        }
        texts["tokenizer_config.json"] = (
            json.dumps(said, indent=2, ensure_ascii=False) + "\n"
        ).encode()
    return texts
