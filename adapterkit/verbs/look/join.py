"""Match an adapter with its base as merge does."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import WARNING, Problems, Refused
from adapterkit.core.inputs.base_door import read_checkpoint
from adapterkit.core.weights.detect import check_not_quantized

if TYPE_CHECKING:
    from adapterkit.core.weights.parameters import Parameter


@dataclass
class Join:
    """A base, and the parameter of each of the adapter's modules in it, by (module, depth)."""

    base: Checkpoint
    parameters: "dict[tuple[str, int], Parameter]" = field(default_factory=dict)
    experts: dict[tuple[str, int], int | None] = field(default_factory=dict)


def join(adapter: Adapter, on: Folder, problems: Problems) -> Join:
    """Match the adapter with the base as merge does; merge's refusals are added to `problems`."""
    from adapterkit.core.merge.changes import collect_changes, other_base
    from adapterkit.core.merge.job import MergeState
    from adapterkit.core.merge.verb import MergeOptions

    base = read_checkpoint(on)
    check_not_quantized(base)
    # a norm is the same in either layout of experts
    state = MergeState(base, [adapter], [1.0], MergeOptions(expert_layout="peft-0.19"))
    collect_changes(state)
    problems += state.errors
    # a local copy may have any name
    names = [] if "repo" in on.origin else other_base(state, adapter)
    found = [note.removeprefix(WARNING) for note in state.notes if note not in names]
    problems += [Refused(note, where=adapter.label, code="AK202") for note in found]
    joined = Join(state.base)
    for change in state.changes.values():
        for factors in change.additions:
            at = factors.module, factors.depth
            joined.parameters[at] = change.parameter
            joined.experts[at] = factors.experts
    return joined
