"""Run a model one unit at a time: all batches go through a unit before the next one is read.

Each batch's pass is the model's own code on a thread of its own, which stops at each unit until all
batches are there. Then the unit's parameters are read from the shards, the batches go through it
one after the other, and the parameters are freed. The backward pass stops in the same way, in
reverse order: autograd runs the code between the units, and the units run again to get gradients.
"""

import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from adapterkit.core.engine.device import Mark
from adapterkit.core.errors import Refused, shown
from adapterkit.verbs.stats.data.masks import Masks, following
from adapterkit.verbs.stats.model.activations import Activations, ActivationStore, BatchOffloader
from adapterkit.verbs.stats.model.checkpointing import Call, apply, is_differentiable
from adapterkit.verbs.stats.model.coroutines import Coroutine
from adapterkit.verbs.stats.model.layers import OffloadedLayer, OffloadedLayers
from adapterkit.verbs.stats.model.stored_model import StoredModel


@dataclass
class Stop:
    """The request of a waiting pass: a unit's output, or the gradients of its inputs."""

    unit: OffloadedLayer
    is_backward: bool
    run: Callable[["LayerwiseSchedule"], Any]
    tensors: Any  # that wait
    context: contextvars.Context = field(default_factory=contextvars.copy_context)


class Pass(Coroutine):
    """One batch's pass through the model; `number`: of the batch."""

    def __init__(
        self,
        run: Callable[[], object],
        activations: Activations,
        masks: Masks | None,
        block: int,
        number: int,
    ):
        super().__init__(run)
        self.activations, self.masks = activations, masks
        self.block, self.number = block, number


@dataclass
class ResumePoint:
    """The answer with which a pass resumes once the mark is passed."""

    one: Pass
    answer: object
    mark: Mark


class PassReader:
    """Observer of the passes, one of which runs at a time; this one does nothing.

    `units`: None is the code between the units. `wanted`: the tensors that need gradients, for a
    pass in a unit; those of the code between are leaves of its graph."""

    gradients = False  # gradients are needed

    def visited(self, unit: OffloadedLayer) -> AbstractContextManager[object]:
        """A context in which a unit's parameters are in memory."""
        return nullcontext()

    def begin(self, one: Pass, unit: OffloadedLayer | None, is_backward: bool) -> None:
        """Called when a pass resumes."""

    def end(self, one: Pass, unit: OffloadedLayer | None, is_backward: bool) -> None:
        """Called when a pass has reached its next stop."""

    def wants(self, unit: OffloadedLayer) -> bool:
        """True if a unit has tensors that need gradients."""
        return False

    def wanted(self, one: Pass, unit: OffloadedLayer) -> Mapping[str, Tensor]:
        return {}

    def take(self, one: Pass, name: str, gradient: Tensor) -> None:
        raise AssertionError("no gradients are wanted")

    def record_input(self, unit: OffloadedLayer, args: tuple, kwargs: dict[str, Any]) -> None:
        """Called when a unit is called."""


@dataclass
class LayerwiseSchedule:
    """The passes of all batches.

    `stop_at`: the first unit that is not needed; a pass that reaches it ends. `rehearsal`: a
    context for each unit; if it yields True, all passes first go through the unit once without
    consequences."""

    stored: StoredModel
    units: OffloadedLayers
    reader: PassReader
    store: ActivationStore
    stop_at: OffloadedLayer | None
    step: Callable[[], None]  # one batch has gone through one unit
    rehearsal: Callable[[OffloadedLayer], AbstractContextManager[bool]] | None = None
    fixed: set[int] = field(default_factory=set)  # storages that are never emptied

    @cached_property
    def offloader(self) -> BatchOffloader:
        return BatchOffloader(self.stored.device)

    def run(
        self,
        batches: Sequence[tuple[int, Mapping[str, Tensor]]],
        loss: Callable[[Mapping[str, Tensor]], Tensor | None],
        masks: Sequence[Masks | None],
    ) -> None:
        """Run the passes of batches, each with its block's number. `loss` returns a batch's loss,
        whose gradients are computed too, or None."""
        with self.started(batches, loss, masks) as passes:
            while waiting := [one for one in passes if one.request is not None]:
                self.visit(next_unit(waiting), waiting)

    @contextmanager
    def started(
        self,
        batches: Sequence[tuple[int, Mapping[str, Tensor]]],
        loss: Callable[[Mapping[str, Tensor]], Tensor | None],
        masks: Sequence[Masks | None],
    ) -> Iterator[list[Pass]]:
        """The passes of batches at their first stops, as of `run`."""
        self._fix(tensor for _, batch in batches for tensor in batch.values())
        passes: list[Pass] = []
        for number, ((block, batch), mask) in enumerate(zip(batches, masks, strict=True)):
            rows = len(next(iter(batch.values())))
            activations = Activations(self.store, rows, self.fixed)
            run = functools.partial(_run, functools.partial(loss, batch), activations, mask)
            passes.append(Pass(run, activations, mask, block, number))
        threads = torch.get_num_threads()
        with ExitStack() as stack:
            stack.enter_context(self._stops())
            stack.callback(_close, passes)
            stack.callback(torch.set_num_threads, threads)
            stack.enter_context(self._refusals())
            for one in passes:
                self._go_on(one, None)
                torch.set_num_threads(threads)  # the pass has changed the default of new threads
            yield passes

    def _fix(self, others: Iterable[Tensor] = ()) -> None:
        """Protect the model's own tensors from emptying: parameters, buffers, tables in its
        attributes."""
        model = self.stored.model
        attributes = (value for module in model.modules() for value in vars(module).values())
        kept = (value for value in attributes if isinstance(value, Tensor))
        for tensor in (*model.parameters(), *model.buffers(), *kept, *others):
            if not tensor.is_meta:
                self.fixed.add(tensor.untyped_storage().data_ptr())

    def visit(self, unit: OffloadedLayer, waiting: Sequence[Pass]) -> None:
        """Run all passes that wait for a unit through it."""
        with self.reader.visited(unit):
            self.stored.load(unit.parameters, self.stored.device)
            before = set(self.fixed)
            self._fix()
            try:
                with self.stored.buffers_on_device(unit.module):
                    self._rehearse(waiting, unit)
                    self._go_through(waiting, unit)
            finally:
                self.fixed &= before
                self.stored.free(unit.parameters)

    def _rehearse(self, waiting: Sequence[Pass], unit: OffloadedLayer) -> None:
        """Run each pass through the unit, and return it to its former state."""
        if self.rehearsal is None:
            return
        with self.rehearsal(unit) as wanted:
            for one in waiting if wanted else ():
                stop: Stop | None = one.request
                if stop is None or stop.unit is not unit:
                    continue
                one.activations.restore()
                tensors = [t for t in tree_leaves(stop.tensors) if isinstance(t, Tensor)]
                before = [tensor._version for tensor in tensors]
                self.reader.begin(one, unit, False)
                stop.context.copy().run(stop.run, self)
                self.reader.end(one, unit, False)
                if before != [tensor._version for tensor in tensors]:
                    raise Refused(
                        f"{shown(unit.name)} changes its arguments",
                        expected="layers that can be run twice on the same inputs",
                        where=self.stored.base.name,
                        hint="collect statistics first, and give --stats\n"
                        "adapterkit stats BASE --data FILE --out stats.safetensors",
                        code="AK902",
                    )
                one.activations.park()

    def _go_through(self, waiting: Sequence[Pass], unit: OffloadedLayer) -> None:
        """Run each pass. Within a block, a GPU computes one pass while the host continues the
        previous one."""
        begun: ResumePoint | None = None
        for one in waiting:
            if one.request is None or one.request.unit is not unit:
                continue
            if begun is not None and begun.one.block != one.block:
                begun = self._end(begun, unit)
            last, begun = begun, self._begin(one)
            if last is not None:
                self._end(last, unit)
            if self.stored.device.type == "cpu":
                begun = self._end(begun, unit)
        if begun is not None:
            self._end(begun, unit)

    def _begin(self, one: Pass) -> ResumePoint:
        """Start a pass through its unit; a GPU may still be computing afterwards."""
        stop: Stop = one.request
        one.activations.restore()
        self.reader.begin(one, stop.unit, stop.is_backward)
        answer = stop.context.run(stop.run, self)
        self.reader.end(one, stop.unit, stop.is_backward)
        return ResumePoint(one, answer, Mark(self.stored.device))

    def _end(self, begun: ResumePoint, unit: OffloadedLayer) -> None:
        """Continue the pass to its next unit. If that is this one again, because the backward pass
        follows at once, run it here."""
        one = begun.one
        while True:
            begun.mark.wait()
            one.activations.track(begun.answer, is_output=True)
            self.step()
            answer, begun.answer = begun.answer, None
            self._go_on(one, answer)
            del answer
            if one.request is None or one.request.unit is not unit:
                return
            begun = self._begin(one)

    def _go_on(self, one: Pass, answer: object) -> None:
        """Run the code between two units."""
        self.reader.begin(one, None, False)
        one.resume(answer)
        self.reader.end(one, None, False)
        if one.request is not None and one.request.unit is self.stop_at:
            one.close()
        if one.request is None:
            one.activations.release()
        else:
            one.activations.track(one.request.tensors, one.request.is_backward)
            one.activations.park()

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """`Refused` for models whose code reads weights or activations that are not in memory."""
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
                expected="layers that are called, and pass on only their outputs",
                where=self.stored.base.name,
                hint="run the model whole: --whole-model",
                code="AK902",
            ) from error

    @contextmanager
    def _stops(self) -> Iterator[None]:
        """Let passes stop when they call a unit, inside the context."""
        units = [*self.units.outer, *self.units.inner]
        before = [vars(unit.module).get("forward") for unit in units]
        for unit in units:
            forward = unit.module.forward
            wrapper = functools.partial(self._call, unit, forward)
            unit.module.forward = functools.update_wrapper(wrapper, forward)
        try:
            yield
        finally:
            for unit, own in zip(units, before, strict=True):
                if own is None:
                    del unit.module.forward
                else:
                    unit.module.forward = own

    def _call(
        self, unit: OffloadedLayer, forward: Callable[..., Any], *args: object, **kwargs: object
    ) -> Any:
        """The replacement of a unit's forward."""
        one = Coroutine.current()
        if not isinstance(one, Pass):
            return forward(*args, **kwargs)  # within a unit

        def compute(schedule: LayerwiseSchedule) -> Any:
            with torch.no_grad(), following(one.masks):
                output = schedule.computed(unit, forward, (args, kwargs))
                return schedule.offloader.to_host(output)

        def recompute(call: Call, grads: tuple[Tensor | None, ...]) -> Any:
            run = functools.partial(_backward, one, unit, forward, call, grads)
            return one.stop(Stop(unit, True, run, grads))

        stop = Stop(unit, False, compute, (args, kwargs))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        needs = any(t.requires_grad for t in tensors) or self.reader.wants(unit)
        if torch.is_grad_enabled() and needs:
            return apply((args, kwargs), one.activations, lambda: one.stop(stop), recompute)
        return one.stop(stop)

    def computed(self, unit: OffloadedLayer, forward: Callable[..., Any], arguments: Any) -> Any:
        """A unit's output for arguments on the CPU; the unit is on its device."""
        before = tree_leaves(arguments)
        (args, kwargs), moved = self.offloader.to_device(arguments)
        self.reader.record_input(
            unit, args, kwargs
        )  # no hook has recorded it if it is a layer itself
        output = forward(*args, **kwargs)
        after = tree_leaves((args, kwargs))
        expected = [moved.get(id(leaf), leaf) for leaf in before]
        hands_on = len(after) != len(before) or any(
            a is not b for a, b in zip(after, expected, strict=True)
        )
        if hands_on and (moved or self.reader.gradients):
            raise Refused(
                f"{shown(unit.name)} changes its arguments to pass values on",
                expected="layers that pass on only their outputs",
                where=self.stored.base.name,
                hint="run the model whole: --whole-model",
                code="AK902",
            )
        return output


def _run(loss: Callable[[], Tensor | None], activations: Activations, masks: Masks | None) -> None:
    """The body of a pass."""
    torch.set_num_threads(1)  # else each pass would start a pool of threads for its little work

    def pack(tensor: Tensor) -> Tensor:
        activations.track(tensor)
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor), following(masks):
        value = loss()
    if value is not None:
        value.backward()


def _backward(
    one: Pass,
    unit: OffloadedLayer,
    forward: Callable[..., Any],
    call: Call,
    grads: tuple[Tensor | None, ...],
    schedule: LayerwiseSchedule,
) -> list[Tensor | None]:
    """Run a unit again to get the gradients of its inputs and of its wanted tensors."""
    weights = schedule.reader.wanted(one, unit)
    arguments, inputs = call.arguments()
    with torch.enable_grad():
        output = schedule.computed(unit, forward, arguments)
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
        if value is not None:
            schedule.reader.take(one, name, value)
    return list(values[: len(inputs)])


def next_unit(waiting: Sequence[Pass]) -> OffloadedLayer:
    """The unit to run next: the model's first in the forward pass, then the last one in the
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
