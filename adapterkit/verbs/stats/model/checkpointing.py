"""Calls of a model's modules whose gradients are computed by running them again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from adapterkit.verbs.stats.model.activations import Activations, Saved


@dataclass
class Call:
    """A call of a module whose arguments can be restored.

    `leaves`: those of the arguments, tensors with their values at the call."""

    leaves: list[Any]
    spec: TreeSpec
    needs: list[bool]  # the leaf needs a gradient
    output_spec: TreeSpec | None = None
    outputs: tuple[Any, ...] = ()  # leaves that are no tensors with gradients
    is_tensor: tuple[bool, ...] = ()

    @classmethod
    def of(cls, arguments: object, activations: Activations) -> tuple["Call", list[Tensor]]:
        """A call, and its tensors that need gradients."""
        leaves, spec = tree_flatten(arguments)
        needs = [isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves]
        saved = [activations.save(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = [leaf for leaf, needed in zip(leaves, needs, strict=True) if needed]
        return cls(saved, spec, needs), inputs

    def arguments(self) -> tuple[Any, list[Tensor]]:
        """The arguments, and among them the leaves of a new graph in the order of the inputs."""
        leaves = [leaf.tensor() if isinstance(leaf, Saved) else leaf for leaf in self.leaves]
        for number, needed in enumerate(self.needs):
            if needed:
                leaves[number] = leaves[number].detach().requires_grad_()
        inputs = [leaf for leaf, needed in zip(leaves, self.needs, strict=True) if needed]
        # a module may change its input in place, which is forbidden for a leaf
        with torch.enable_grad():
            leaves = [
                leaf.clone() if needed else leaf
                for leaf, needed in zip(leaves, self.needs, strict=True)
            ]
        return tree_unflatten(leaves, self.spec), inputs


def is_differentiable(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


class Recomputed(Function):
    """A module as one node of the graph: `forward()` returns its output, `backward(grads)` the
    gradients of the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        forward: Callable[[], Any],
        backward: Callable[[Call, tuple[Tensor | None, ...]], list[Tensor | None]],
        anchor: Tensor,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.run = call, backward
        ctx.set_materialize_grads(False)
        leaves, call.output_spec = tree_flatten(forward())
        call.is_tensor = tuple(map(is_differentiable, leaves))
        call.outputs = tuple(
            None if is_tensor else leaf
            for leaf, is_tensor in zip(leaves, call.is_tensor, strict=True)
        )
        # an input that is handed through needs a node of its own
        return tuple(
            leaf.view_as(leaf) if any(leaf is one for one in inputs) else leaf
            for leaf, is_tensor in zip(leaves, call.is_tensor, strict=True)
            if is_tensor
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, ctx.call = ctx.call, None
        return None, None, None, None, *ctx.run(call, grads)


def apply(
    arguments: object,
    activations: Activations,
    forward: Callable[[], Any],
    backward: Callable[[Call, tuple[Tensor | None, ...]], list[Tensor | None]],
) -> Any:
    """The output of a module, as a node of the graph."""
    call, inputs = Call.of(arguments, activations)
    anchor = torch.zeros((), requires_grad=True)  # without inputs of a graph there is one from here
    tensors = iter(Recomputed.apply(call, forward, backward, anchor, *inputs))
    assert call.output_spec is not None
    leaves = [
        next(tensors) if is_tensor else leaf
        for leaf, is_tensor in zip(call.outputs, call.is_tensor, strict=True)
    ]
    call.outputs = ()
    return tree_unflatten(leaves, call.output_spec)
