"""Look up names of the loaded model's parameters, and the tensors that store them.

An adapter names modules of the loaded model; a checkpoint's keys can differ (renames, experts
stored one by one, fused projections). Usually they are the same, and then nothing is imported. If
they may differ, the model is built on the meta device (`Skeleton`), and transformers' own
conversion tables give the stored tensors of each parameter."""

import importlib.util
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import AdapterkitError, Refused, shown
from adapterkit.core.weights.parameters import Parameter, extent, identity_slot, known_slots

if TYPE_CHECKING:
    from torch import nn

    from adapterkit.core.weights.skeleton import Skeleton

# PEFT's task types
HEADS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
LANGUAGE = "language_model."  # its prefix in a vision-language model
IN_PROJ = re.compile(r"(?<=\.in_proj)\.(weight|bias)$")  # parameters of MultiheadAttention itself
TRANSPOSED = "Conv1D"  # GPT-2's linear layer, whose weight is (in, out)


def plain_names(config: dict) -> bool:
    """Return whether transformers' sources prove that a model's keys are its parameters' names and
    no layer is transposed.

    Two files are read as text, not imported: the conversion tables, which would name the model type
    or the architecture, and the model's own code, which would name `Conv1D`."""
    types = set(_model_types(config))
    package = _transformers_folder()
    if not types or package is None:
        return False
    table = package / "conversion_mapping.py"
    text = table.read_text(encoding="utf-8") if table.exists() else ""
    names = types | set(map(str, config.get("architectures") or ()))
    if not text or any(f'"{name}"' in text for name in names):
        return False
    codes = [_code(kind) for kind in types]
    return all(code and TRANSPOSED not in code for code in codes)


def mentions_weight(config: dict, module: str) -> bool:
    """Return whether the code of a model's types uses the weight of a module of that name, whether
    or not it also calls it. The files are not imported."""
    weight = re.compile(rf"\.{re.escape(module.rpartition('.')[2])}\.weight\b")
    return any(weight.search(_code(kind)) for kind in _model_types(config))


@cache
def _code(model_type: str) -> str:
    """The text of transformers' modeling files for a model type; empty if there are none."""
    package = _transformers_folder()
    if package is None or not re.fullmatch(r"[\w-]{1,100}", model_type, re.ASCII):
        return ""
    files = sorted((package / "models" / model_type.replace("-", "_")).glob("modeling_*.py"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def _transformers_folder() -> Path | None:
    spec = importlib.util.find_spec("transformers")  # does not import it
    return Path(spec.origin).parent if spec and spec.origin else None


def _model_types(config: dict) -> list[str]:
    types = [config["model_type"]] if isinstance(config.get("model_type"), str) else []
    for value in config.values():
        if isinstance(value, dict) and "model_type" in value:
            types += _model_types(value)
    return types


@dataclass
class Names:
    """Look up the parameters of the model that a checkpoint is loaded as.

    `wanted` are the parameters that an adapter names, `task` is the one it was trained for. They
    select the class of the architecture's family, because a base saved without a head is often
    trained with one."""

    base: Checkpoint
    wanted: tuple[str, ...] = ()
    task: str | None = None
    trained_class: str | None = None  # auto_mapping's, looked up in transformers only
    build_model: bool = False  # even if all names match directly: for ties, classes, orientations
    notes: list[str] = field(default_factory=list)
    text_only: bool = False  # the base is the language model of a possible vision-language model
    of_diffusers: bool = False  # models of diffusers are built, too
    whole: bool = False  # stored names are the model's: it is built for other names, and for layers

    @property
    def label(self) -> str:
        """The base's name, for messages."""
        return self.base.name

    @cached_property
    def plain(self) -> bool:
        """True if transformers' sources prove that keys are names and no layer is transposed."""
        return plain_names(self.base.config)

    @cached_property
    def model(self) -> "Skeleton | None":
        """The model without data; None if names match directly, or transformers does not know
        it."""
        return self._skeleton() if self.needs_model else None

    @property
    def needs_model(self) -> bool:
        """True if names do not match directly, or the caller needs more than names."""
        direct = all(name in self.base.tensors for name in self.wanted)
        return not direct or self.build_model or not self.plain

    def _skeleton(self) -> "Skeleton | None":
        """The candidate class with the most wanted parameters."""
        from adapterkit.core.weights.skeleton import Skeleton

        if not (self.base.config.get("model_type") or self._diffusers_class()):
            return None
        best, problem = None, None
        for class_name in self._candidates():
            try:
                model = Skeleton(self.base, class_name)
            except AdapterkitError as error:
                problem = problem or error
                continue
            known = sum(name in model.state for name in self.wanted)
            if best is None or known > best[0]:
                best = (known, model)
            if known == len(self.wanted):
                break
        if best is None and problem is not None:
            self.notes.append(str(problem))
        return best[1] if best else None

    def _diffusers_class(self) -> list[str]:
        from adapterkit.core.weights.skeleton import OF_DIFFUSERS

        name = self.base.config.get(OF_DIFFUSERS) if self.of_diffusers else None
        return [name] if isinstance(name, str) else []

    def _candidates(self) -> list[str]:
        if self._diffusers_class():
            return self._diffusers_class()
        names = [str(a) for a in self.base.config.get("architectures") or ()]
        names += [self.trained_class] if self.trained_class else []
        names += [HEADS[self.task]] if self.task in HEADS else []
        return list(dict.fromkeys([*names, "AutoModel"]))

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of that name, or None. A stored key of exactly that name counts as one.

        `Refused` if it is stored through a conversion that does more than move elements."""
        is_stored = self.whole and name in self.base.tensors
        if not is_stored and self.model is not None:
            if name in self.model.unreadable:
                raise self.model.unreadable[name]
            if name in self.model.parameters:
                return self.model.parameters[name]
        spec = self.base.tensors.get(name)
        if spec is not None:
            return Parameter(name, spec.shape, (identity_slot(name, spec.shape),))
        # a layer that the model has in another form
        if slots := known_slots(self.base).get(name):
            return Parameter(name, extent(slots), slots)
        own = IN_PROJ.sub(r"_\1", name)
        if own in self.base.tensors:
            return self.parameter(own)
        found = self.model.by_old_name(name) if self.model is not None else None
        if found is None and self.text_only and LANGUAGE in name:
            return self.parameter(name.replace(LANGUAGE, "", 1))
        return found

    def all(self) -> Collection[str]:
        """Names of all stored parameters."""
        model = None if self.whole else self.model
        return self.base.tensors if model is None else model.parameters

    def module(self, name: str) -> "nn.Module | None":
        """A module of the model; None if it does not exist, or the model was not built."""
        return None if self.model is None else self.model.module(name)

    def classes(self, module: str) -> tuple[type, ...]:
        """A module's class and its bases; none if it is not known."""
        layer = self.module(module)
        return () if layer is None else type(layer).__mro__

    def layer(self, module: str) -> str | None:
        """The class name of a module ('Linear', 'Conv1D', ...); None if it is not known."""
        return next((cls.__name__ for cls in self.classes(module)), None)

    def transposed(
        self, module: str, *, fan_in_fan_out: bool = False, square: bool = False, where: str = ""
    ) -> bool:
        """Return whether a layer's weight is stored (in, out), by its class.

        For a model that transformers does not know, an adapter's `fan_in_fan_out` decides. That
        setting is one for the whole model, which may mix both layouts. Therefore a `square` weight,
        whose shape fits both, is refused."""
        if self.plain:
            return False
        if classes := self.classes(module):
            return any(cls.__name__ == TRANSPOSED for cls in classes)
        if fan_in_fan_out and square:
            raise Refused(
                f"the square weight of {shown(module)} may be stored (in, out): "
                "fan_in_fan_out is set",
                expected="a model that transformers knows, or weights that are not square",
                where=where,
                hint="update transformers",
                code="AK405",
            )
        return fan_in_fan_out

    def transposed_experts(self, module: str) -> bool:
        """Return whether the matrices of a module's stacks are (in, out), by its class."""
        return bool(getattr(self.module(module), "is_transposed", False))

    def groups(self, module: str) -> int:
        """The number of groups of a convolution; 1 if it is not known."""
        return int(getattr(self.module(module), "groups", 1))

    def children(self, module: str) -> list[str] | None:
        """Names of a module's own parameters in the order of its code; None if it is not known."""
        layer = self.module(module)
        if layer is None:
            return None
        return [name for name, _ in layer.named_parameters(recurse=False)]
