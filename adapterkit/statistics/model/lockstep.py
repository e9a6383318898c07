"""A model run one part at a time: all batches go through a part before the next one is read.

Each batch's pass is the model's own code on a thread of its own, which stops at each unit until all
batches are there. Then the unit's parameters are read from the shards, the batches go through it
one after the other, and the parameters are forgotten. The backward pass stops in the same way, in
the other order: autograd runs the code between the units, and the units run again to get gradients.
"""

import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from adapterkit.engines.device import Mark
from adapterkit.errors import Refused, shown
from adapterkit.statistics.data.masks import Masks, following
from adapterkit.statistics.model.activations import Activations, ActivationStore
from adapterkit.statistics.model.checkpointing import Call, apply, is_differentiable
from adapterkit.statistics.model.coroutines import Coroutine
from adapterkit.statistics.model.hooks import SumsWatch
from adapterkit.statistics.model.layers import Unit, Units
from adapterkit.statistics.model.shuttle import Shuttle
from adapterkit.statistics.model.stored_model import StoredModel
from adapterkit.statistics.sums_files import Collected, Ledger, Tally


@dataclass
class Stop:
    """What a pass waits for: a unit's output, or the gradients of its inputs."""

    unit: Unit
    is_backward: bool
    run: Callable[["Lockstep", Collected | None], Any]
    tensors: Any  # that wait
    context: contextvars.Context = field(default_factory=contextvars.copy_context)


class Pass(Coroutine):
    """One batch's pass through the model."""

    def __init__(
        self, run: Callable[[], object], activations: Activations, masks: Masks | None, block: int
    ):
        super().__init__(run)
        self.activations, self.masks, self.block = activations, masks, block


@dataclass
class Begun:
    """What a pass goes on with once the mark is passed."""

    one: Pass
    answer: object
    mark: Mark


class Visit:
    """What is collected of a unit while the batches go through it: `sums` in the forward pass,
    `gradients` in the backward pass, begun when they are first asked for."""

    def __init__(self, ledger: Ledger, unit: Unit):
        self.ledger, self.unit = ledger, unit

    @cached_property
    def sums(self) -> Tally | None:
        return self.ledger.sums(self.unit)

    @cached_property
    def gradients(self) -> Tally | None:
        return self.ledger.gradients(self.unit)

    def close(self) -> None:
        for tally in vars(self).values():
            if isinstance(tally, Tally):
                tally.close()


@dataclass
class Lockstep:
    """The passes of all batches.

    `targets`: the layers whose statistics are collected. `stop_at`: a unit from which on nothing is
    of interest; a pass that comes to it ends.
    """

    stored: StoredModel
    units: Units
    watch: SumsWatch
    targets: Sequence[str]
    room: ActivationStore
    stop_at: Unit | None
    ledger: Ledger
    outside: Tally | None  # of layers outside the units
    gradients: bool  # whether they are collected
    step: Callable[[], None]  # one batch has gone through one unit
    fixed: set[int] = field(default_factory=set)  # storages that are never emptied

    @cached_property
    def shuttle(self) -> Shuttle:
        return Shuttle(self.stored.device)

    def run(
        self,
        batches: Sequence[tuple[int, Mapping[str, Tensor]]],
        loss: Callable[[Mapping[str, Tensor]], Tensor | None],
        masks: Sequence[Masks | None],
    ) -> None:
        """Run the passes of batches, each with its block's number; `loss` gives a batch's, whose
        gradients are computed too, or None."""
        self._fix(tensor for _, batch in batches for tensor in batch.values())
        passes: list[Pass] = []
        for (block, batch), mask in zip(batches, masks, strict=True):
            rows = len(next(iter(batch.values())))
            activations = Activations(self.room, rows, self.fixed)
            run = functools.partial(_run, functools.partial(loss, batch), activations, mask)
            passes.append(Pass(run, activations, mask, block))
        threads = torch.get_num_threads()
        with ExitStack() as stack:
            stack.enter_context(self._stops())
            stack.callback(_close, passes)
            stack.callback(torch.set_num_threads, threads)
            for weight in self.weights("").values() if self.gradients else ():
                weight.requires_grad_()
                stack.callback(weight.requires_grad_, False)
            stack.enter_context(self._refusals())
            for one in passes:
                self._go_on(one, None)
                torch.set_num_threads(threads)  # the pass has changed the default of new threads
            while waiting := [one for one in passes if one.request is not None]:
                self._visit(_next(waiting), waiting)

    def _fix(self, others: Iterable[Tensor] = ()) -> None:
        """Never empty the model's own tensors: parameters, buffers, tables in its attributes."""
        model = self.stored.model
        attributes = (value for module in model.modules() for value in vars(module).values())
        kept = (value for value in attributes if isinstance(value, Tensor))
        for tensor in (*model.parameters(), *model.buffers(), *kept, *others):
            if not tensor.is_meta:
                self.fixed.add(tensor.untyped_storage().data_ptr())

    def weights(self, unit: str) -> dict[str, nn.Parameter]:
        """Weights of the targets in a unit, or of those outside all units."""
        modules = [
            name
            for name in self.targets
            if (f"{name}.".startswith(f"{unit}.") if unit else self.units.unit_of(name) is None)
        ]
        return {name: self.stored.model.get_submodule(name).weight for name in modules}

    def _visit(self, unit: Unit, waiting: Sequence[Pass]) -> None:
        """All passes that wait for a unit go through it."""
        visit = Visit(self.ledger, unit)
        self.stored.load(unit.parameters, self.stored.device)
        before = set(self.fixed)
        self._fix()
        try:
            with self.stored.buffers_on_device(unit.module):
                self._go_through(waiting, visit)
        finally:
            self.fixed &= before
            self.stored.free(unit.parameters)
        visit.close()

    def _go_through(self, waiting: Sequence[Pass], visit: Visit) -> None:
        """Each pass; of one block a GPU computes one while the host goes on with the one before."""
        begun: Begun | None = None
        for one in waiting:
            if one.request is None or one.request.unit is not visit.unit:
                continue
            if begun is not None and begun.one.block != one.block:
                begun = self._end(begun, visit)
            last, begun = begun, self._begin(one, visit)
            if last is not None:
                self._end(last, visit)
            if self.stored.device.type == "cpu":
                begun = self._end(begun, visit)
        if begun is not None:
            self._end(begun, visit)

    def _begin(self, one: Pass, visit: Visit) -> Begun:
        """A pass goes through the unit that it waits for, as far as a GPU is concerned."""
        stop: Stop = one.request
        one.activations.restore()
        tally = visit.gradients if stop.is_backward else visit.sums
        collected = None if tally is None else tally.of(one.block)
        sums = None if collected is None or stop.is_backward else collected.sums
        self.watch.masks, self.watch.sums = one.masks, sums
        answer = stop.context.run(stop.run, self, collected)
        if sums is not None:
            sums.settle()
        return Begun(one, answer, Mark(self.stored.device))

    def _end(self, begun: Begun, visit: Visit) -> None:
        """The pass goes on to the next unit that it waits for. Where that is this one again, as
        where the backward pass follows at once, it goes through it here."""
        one = begun.one
        while True:
            begun.mark.wait()
            one.activations.track(begun.answer, is_output=True)
            self.step()
            answer, begun.answer = begun.answer, None
            self._go_on(one, answer)
            del answer
            if one.request is None or one.request.unit is not visit.unit:
                return
            begun = self._begin(one, visit)

    def _go_on(self, one: Pass, answer: object) -> None:
        """The code between two units."""
        outside = None if self.outside is None else self.outside.of(one.block)
        self.watch.masks = one.masks
        self.watch.sums = None if outside is None else outside.sums
        one.resume(answer)
        if outside is not None:
            outside.sums.settle()
            for name, weight in self.weights("").items():
                if weight.grad is not None:
                    outside.add_gradient(name, weight.grad)
                    weight.grad = None
        if one.request is not None and one.request.unit is self.stop_at:
            one.close()
        if one.request is None:
            one.activations.forget()
        else:
            one.activations.track(one.request.tensors, one.request.is_backward)
            one.activations.park()

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """`Refused` for models whose code reads what is not in memory."""
        try:
            yield
        except (RuntimeError, NotImplementedError) as error:
            name = type(self.stored.model).__name__
            if "meta" in str(error):
                problem = f"code around the layers of {name} reads their weights"
            elif "not allocated yet" in str(error):
                problem = f"code of {name} keeps activations of one batch for others"
            else:
                raise
            raise Refused(
                problem,
                expected="layers that are called, and hand on what they return",
                where=self.stored.base.name,
                hint="run the model whole: --whole",
            ) from error

    @contextmanager
    def _stops(self) -> Iterator[None]:
        """Passes stop where a unit is called."""
        units = [*self.units.outer, *self.units.inner]
        self.watch.stops = {unit.module for unit in units}
        for unit in units:
            forward = unit.module.forward
            wrapper = functools.partial(self._call, unit, forward)
            unit.module.forward = functools.update_wrapper(wrapper, forward)
        try:
            yield
        finally:
            for unit in units:
                del unit.module.forward

    def _call(
        self, unit: Unit, forward: Callable[..., Any], *args: object, **kwargs: object
    ) -> Any:
        """What a unit's forward is meanwhile."""
        one = Coroutine.current()
        if not isinstance(one, Pass):
            return forward(*args, **kwargs)  # within a unit

        def compute(lockstep: Lockstep, collected: Collected | None) -> Any:
            with torch.no_grad(), following(one.masks):
                output = lockstep.computed(unit, forward, (args, kwargs))
                return lockstep.shuttle.to_host(output)

        def recompute(call: Call, grads: tuple[Tensor | None, ...]) -> Any:
            run = functools.partial(_backward, unit, forward, call, grads)
            return one.stop(Stop(unit, True, run, grads))

        stop = Stop(unit, False, compute, (args, kwargs))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        needs = any(t.requires_grad for t in tensors) or bool(self.weights(unit.name))
        if torch.is_grad_enabled() and needs:
            return apply((args, kwargs), one.activations, lambda: one.stop(stop), recompute)
        return one.stop(stop)

    def computed(self, unit: Unit, forward: Callable[..., Any], arguments: Any) -> Any:
        """A unit's output, of arguments on the CPU; the unit is on its device."""
        before = tree_leaves(arguments)
        (args, kwargs), moved = self.shuttle.to_device(arguments)
        self.watch.see(unit.name, args, kwargs)  # no hook has, if it is a layer itself
        output = forward(*args, **kwargs)
        after = tree_leaves((args, kwargs))
        expected = [moved.get(id(leaf), leaf) for leaf in before]
        hands_on = len(after) != len(before) or any(
            a is not b for a, b in zip(after, expected, strict=True)
        )
        if hands_on and (moved or self.gradients):
            raise Refused(
                f"{shown(unit.name)} changes its arguments to hand something on",
                expected="layers that hand on what they return",
                where=self.stored.base.name,
                hint="run the model whole: --whole",
            )
        return output


def _run(loss: Callable[[], Tensor | None], activations: Activations, masks: Masks | None) -> None:
    """The code of a pass."""
    torch.set_num_threads(1)  # else each pass has a set of threads for the little it does itself

    def pack(tensor: Tensor) -> Tensor:
        activations.track(tensor)
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor), following(masks):
        value = loss()
    if value is not None:
        value.backward()


def _backward(
    unit: Unit,
    forward: Callable[..., Any],
    call: Call,
    grads: tuple[Tensor | None, ...],
    lockstep: Lockstep,
    collected: Collected | None,
) -> list[Tensor | None]:
    """Run a unit again to get the gradients of its inputs, and of its targets' weights."""
    weights = lockstep.weights(unit.name) if collected is not None else {}
    for weight in weights.values():
        weight.requires_grad_()
    arguments, inputs = call.arguments()
    with torch.enable_grad():
        output = lockstep.computed(unit, forward, arguments)
    outputs = [leaf for leaf in tree_leaves(output) if is_differentiable(leaf)]
    pairs = [
        (value, grad.to(value.device))
        for value, grad in zip(outputs, grads, strict=True)
        if grad is not None and value.requires_grad
    ]
    wanted = [*inputs, *weights.values()]
    if not pairs or not wanted:
        return [None] * len(inputs)
    values = torch.autograd.grad(
        [value for value, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True
    )
    for name, value in zip(weights, values[len(inputs) :], strict=True):
        if value is not None and collected is not None:
            collected.add_gradient(name, value)
    return list(values[: len(inputs)])


def _next(waiting: Sequence[Pass]) -> Unit:
    """The unit to run next: the first of the model in the forward pass, then the last one in the
    backward pass."""
    stops: list[Stop] = [one.request for one in waiting]
    forward = [stop.unit for stop in stops if not stop.is_backward]
    if forward:
        return min(forward, key=lambda unit: unit.order)
    return max((stop.unit for stop in stops), key=lambda unit: unit.order)


def _close(passes: Sequence[Pass]) -> None:
    for one in passes:
        if not one.is_done:
            one.close()
