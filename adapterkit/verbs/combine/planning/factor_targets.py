"""Decide which parameters of a stored model PEFT can give factors, and which modules it can
copy."""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import cached_property
from typing import Any

from adapterkit.core.adapter.record import EMBEDDINGS
from adapterkit.core.weights.layers import ATTENTION, is_bypassed
from adapterkit.core.weights.names import Names
from adapterkit.core.weights.parameters import Parameter
from adapterkit.verbs.combine.tasks.difference import prefixes
from adapterkit.verbs.shared.targets import CONVOLUTIONS, embeddings_of, why_not_on_layer

LAYERS = ("Linear", "Conv1D", *CONVOLUTIONS)  # classes of modules with factors
PARAMETRIZED = "ParametrizationList"  # torch's: cannot be replaced by a copy
EXPERTS = re.compile("expert", re.IGNORECASE)


class FactorTargets:
    """Targets by the classes of a model's modules, or by names if transformers does not know the
    model."""

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
        """The model's class, as PEFT's config has it; None if unknown."""
        if self.model is None:
            return None
        cls = type(self.model)
        return {"base_model_class": cls.__name__, "parent_library": cls.__module__}

    def of(self, name: str, parameter: Parameter) -> str | None:
        """The target of factors on a parameter: its module, the parameter itself, or None."""
        module, _, leaf = name.rpartition(".")
        axes, classes = len(parameter.shape), self._class_names(module)
        if axes < 2 or 0 in parameter.shape:
            return None
        if not classes:
            # with four or more axes a convolution; with three perhaps a stack
            is_layer = leaf == "weight" and axes != 3 and not self._is_looked_up(name)
            return module if is_layer else None
        if parameter.tied or any(part in cls for cls in classes for part in ("Embedding", "Norm")):
            return None
        if ATTENTION in classes:
            return None
        if any(cls in LAYERS for cls in classes):
            is_grouped = axes > 2 and self.names.groups(module) != 1
            if leaf != "weight" or is_grouped or is_bypassed(self.names, module):
                return None
            # Llama 4's router, a Linear that returns a tuple, is a parameter, as PEFT renames it
            is_layer = not why_not_on_layer(self.names, module, self.model.get_submodule(module))
            return module if axes > 2 or is_layer else name
        if not self._is_wrappable(module, name):
            return None
        if EXPERTS.search(f"{module} {' '.join(classes)}"):
            return name if axes == 2 or (axes == 3 and parameter.shape[0] > 1) else None
        return name if axes == 2 and 1 not in parameter.shape else None

    def _is_looked_up(self, name: str) -> bool:
        """True for the name of an embedding or a head. In image models, names that the family's
        rules list are layers."""
        is_layer = self.names.base.names_layer(name.rpartition(".")[0])
        return not is_layer and EMBEDDINGS.search(name) is not None

    def _is_wrappable(self, module: str, name: str) -> bool:
        """True if PEFT can wrap a module for one of its parameters.

        The wrapper passes the first argument by position and has none of the module's attributes,
        so a module with much inside is likely to break."""
        submodule = self.model.get_submodule(module)
        own = dict(submodule.named_parameters(recurse=False))
        size = sum(parameter.numel() for parameter in own.values())
        size_inside = sum(parameter.numel() for parameter in submodule.parameters()) - size
        is_suffix = _is_suffix_of_any("." + name, self._reversed_parameters)
        return name.rpartition(".")[2] in own and not is_suffix and size_inside <= size

    def is_embedding_or_head(self, name: str) -> bool:
        """True for a parameter of the input embedding or of the output layer."""
        if self.model is None:
            return bool(EMBEDDINGS.search(name))
        module = self.model.get_submodule(name.rpartition(".")[0])
        return any(module is end for end in embeddings_of(self.model))

    def can_be_copied(self, module: str, names: list[str]) -> bool:
        """True if PEFT can replace a module with a trained copy and find it again: these are all
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
        """A module's class and its bases; none if the model was not built."""
        return [cls.__name__ for cls in self.names.classes(module)]


def _is_suffix_of_any(suffix: str, reversed_names: list[str]) -> bool:
    """True if another name ends with this one; `reversed_names`: all names, reversed, sorted."""
    at = bisect_right(reversed_names, suffix[::-1])
    return at < len(reversed_names) and reversed_names[at].startswith(suffix[::-1])
