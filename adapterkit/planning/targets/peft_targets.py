"""Where PEFT can put factors on a model, or a trained copy in a module's place."""

import re
from bisect import bisect_right
from functools import cached_property
from typing import Any

from adapterkit.adapters.record import EMBEDDINGS
from adapterkit.planning.outputs.extracted_adapter import prefixes
from adapterkit.weights.bypassed import (
    ATTENTION,
    classes_of,
    is_bypassed,
    is_taken_for_experts,
)
from adapterkit.weights.linear import is_linear
from adapterkit.weights.names import Names
from adapterkit.weights.parameters import Parameter

LAYERS = ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d")  # classes of modules with factors
PARAMETRIZED = "ParametrizationList"  # torch's: cannot be replaced by a copy
EXPERTS = re.compile("expert", re.IGNORECASE)


class FactorTargets:
    """Answers by the classes of a model's modules, or by names where transformers does not know
    the model."""

    def __init__(self, names: Names):
        self.names = names
        self.model: Any = None if names.model is None else names.model.model
        self._reversed_parameters = sorted(name[::-1] for name in names.all())

    @cached_property
    def modules(self) -> list[str]:
        """The names of all modules."""
        if self.model is None:
            return sorted({path for name in self.names.all() for path in prefixes(name)[:-1]})
        return [name for name, _ in self.model.named_modules() if name]

    @cached_property
    def _reversed_modules(self) -> list[str]:
        return sorted(module[::-1] for module in self.modules)

    @property
    def auto_mapping(self) -> dict[str, str] | None:
        """The model's class, as PEFT's config has it; None where it is not known."""
        if self.model is None:
            return None
        cls = type(self.model)
        return {"base_model_class": cls.__name__, "parent_library": cls.__module__}

    def of(self, name: str, parameter: Parameter) -> str | None:
        """The target of factors on a parameter: its module, itself, or none."""
        module, _, leaf = name.rpartition(".")
        axes, classes = len(parameter.shape), self._class_names(module)
        if axes < 2 or 0 in parameter.shape:
            return None
        if not classes:
            is_layer = leaf == "weight" and axes == 2 and not EMBEDDINGS.search(name)
            return module if is_layer else None
        if parameter.tied or any(part in cls for cls in classes for part in ("Embedding", "Norm")):
            return None
        if ATTENTION in classes:
            return None
        if any(cls in LAYERS for cls in classes):
            if leaf != "weight" or (axes > 2 and self.names.groups(module) != 1):
                return None
            if is_bypassed(self.names, module):
                return None
            return name if axes == 2 and self._is_replaced_layer(module) else module
        if not self._is_wrappable(module, name):
            return None
        if EXPERTS.search(f"{module} {' '.join(classes)}"):
            return name if axes == 2 or (axes == 3 and parameter.shape[0] > 1) else None
        return name if axes == 2 and 1 not in parameter.shape else None

    def _is_replaced_layer(self, module: str) -> bool:
        """Whether PEFT does not see a layer in a module of a layer's class: one with a forward of
        its own (Llama 4's router is a Linear that gives a tuple), or one that it renames."""
        return not is_linear(self.model.get_submodule(module)) or is_taken_for_experts(
            self.names.base.config.get("model_type"), module
        )

    def _is_wrappable(self, module: str, name: str) -> bool:
        """Whether PEFT can wrap a module for one of its parameters.

        The wrapper is called with the first argument by position and has none of the module's
        attributes: the worse, the more there is in the module."""
        submodule = self.model.get_submodule(module)
        own = dict(submodule.named_parameters(recurse=False))
        size = sum(parameter.numel() for parameter in own.values())
        size_inside = sum(parameter.numel() for parameter in submodule.parameters()) - size
        is_suffix = _is_suffix_of_any("." + name, self._reversed_parameters)
        return name.rpartition(".")[2] in own and not is_suffix and size_inside <= size

    def is_embedding_or_head(self, name: str) -> bool:
        """Whether a parameter is of the input embedding or of the output layer."""
        if self.model is None:
            return bool(EMBEDDINGS.search(name))
        module = self.model.get_submodule(name.rpartition(".")[0])
        ends = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        return any(end is not None and module is end for end in ends)

    def can_be_copied(self, module: str, names: list[str]) -> bool:
        """Whether PEFT can put a trained copy in a module's place and find it again: these are all
        its parameters, and no other module's name ends with its name."""
        if not module or PARAMETRIZED in self._class_names(module):
            return False
        if _is_suffix_of_any(module, self._reversed_modules):
            return False
        if self.model is None:
            inside = [name for name in self.names.all() if name.startswith(f"{module}.")]
            return all(name in names for name in inside)
        state = self.model.get_submodule(module).state_dict()
        return {f"{module}.{key}" for key in state} == set(names)

    def _class_names(self, module: str) -> list[str]:
        """A module's class and its bases; none where the model was not built."""
        return [cls.__name__ for cls in classes_of(self.names, module)]


def _is_suffix_of_any(suffix: str, reversed_names: list[str]) -> bool:
    """Whether another name ends with this one; `reversed_names`: all, reversed, sorted."""
    at = bisect_right(reversed_names, suffix[::-1])
    return at < len(reversed_names) and reversed_names[at].startswith(suffix[::-1])
