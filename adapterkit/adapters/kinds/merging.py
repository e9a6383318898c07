"""Read an adapter whose deltas depend on the base's weights, for a merge by rows."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from adapterkit.adapters.kinds.common import AdaptedModule, Kind, RowDelta, read_kind
from adapterkit.adapters.kinds.dora_deltas import module_weight
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.commands import CHECK_BASE
from adapterkit.core.errors import Refused, shown
from adapterkit.core.registry import member
from adapterkit.core.weights.names import Names
from adapterkit.core.weights.parameters import Parameter, StoredParameter


@dataclass(frozen=True)
class ModuleOfRows:
    """A module of such an adapter, until its weight in the base is known."""

    kind: type[Kind]
    adapter: Adapter
    module: str
    parts: dict[str, TensorSpec]

    @property
    def name(self) -> str:
        """The type, as PEFT writes it."""
        return self.kind.name.upper()

    @property
    def embedding(self) -> bool:
        """True if the module is an embedding."""
        return any("embedding" in part for part in self.parts)

    def on(self, names: Names) -> Iterator[tuple[Parameter, RowDelta]]:
        """Yield the changes of the module's weight, and of its bias if it changes too. `Refused` if
        the shapes do not fit, or a weight is stored in pieces."""
        config = self.adapter.config
        fan_in_fan_out = bool(config.get("fan_in_fan_out"))
        weight = module_weight(
            names, self.module, embedding=self.embedding, fan_in_fan_out=fan_in_fan_out
        )
        delta = self.kind.from_module(
            AdaptedModule(self.adapter, self.module, self.parts, {}, weight)
        )
        assert isinstance(delta, RowDelta)
        if delta.turned != weight.transposed:
            raise Refused(
                f"{self.name} of {shown(self.module)}, whose weight is stored (in, out)",
                expected="layers whose weight is (out, in): PEFT has no others of this type",
                where=self.adapter.label,
                hint=CHECK_BASE,
                code="AK401",
            )
        yield self._whole(weight.parameter), delta
        bias = names.parameter(f"{self.module}.bias") if delta.scales_bias else None
        if bias is not None:
            stored = StoredParameter.of(bias, names.base.tensors)
            yield self._whole(bias), replace(cast(Any, delta), weight=stored)

    def _whole(self, parameter: Parameter) -> Parameter:
        if not parameter.is_whole:
            raise Refused(
                f"{self.name} of {shown(parameter.name)}, which the base stores in pieces, or "
                "within another tensor",
                expected="a weight that is one stored tensor",
                where=self.adapter.label,
                hint="save the model once with transformers (from_pretrained, save_pretrained) and "
                "use that as the base",
                code="AK406",
            )
        return parameter


def read_rows(folder: Folder, number: int, name: str) -> Adapter:
    """An adapter of the type with that name, whose record has `merges_rows`. `Refused` with all
    problems of its config and keys."""
    kind = member("kinds", name)
    adapter, tensors = read_kind(kind, folder, number)
    tensors.pop("")
    bias = adapter.config.get("bias") or "none"
    config = adapter.config | {"bias": "lora_only" if bias.endswith("_only") else bias}
    modules = (ModuleOfRows(kind, adapter, *one) for one in tensors.items())
    return replace(adapter, config=config, others=tuple(modules))
