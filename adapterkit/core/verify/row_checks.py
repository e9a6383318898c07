"""Check an output in float64: sampled rows are recomputed from the inputs and compared."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from adapterkit.core.checkpoint.folder import FinishedFolder, Folder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.engine.file_threads import in_order
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import Damaged, Failed, Problems, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.output.journal import ShardResult
from adapterkit.core.plan import OutputFile, Plan, Step
from adapterkit.core.receipt import AGAIN, read_receipt
from adapterkit.core.records import Json
from adapterkit.core.system import cores
from adapterkit.core.tasks.common import SomeOutputs
from adapterkit.core.tasks.quantize import (
    CompensatedStep,
    EncodedStep,
    before_rounding,
    plainly_encoded,
)
from adapterkit.core.tasks.rows import (
    EditedTensor,
    RequantizedWeight,
    StoredRows,
    arithmetic,
    rounded,
)
from adapterkit.core.verify.file_checks import check_file, check_files, stored_tensors
from adapterkit.core.weights.codec import QuantizedWeight, decode_checked
from adapterkit.kernels.quant.stochastic import Draws, Zeros

FEW = 3  # wrong tensors that are listed one by one
THREADS = 4  # that recompute; each may need memory for a whole weight
Specs = dict[str, TensorSpec]  # by key
CHUNK = 1 << 18  # elements that are float64 at a time
# relative to a row's largest magnitude: the error of arithmetic in that many bytes
SLACK = {4: 2.0**-20, 8: 2.0**-44}
SLACK_OF_SUMS = 2.0**-16  # relative to a tensor's, for sums of errors of all columns
# if several scales are equally good: the values whose errors are compared, and the allowed ratio
PIECE_OF_ROW, NEAR = 256, 1.1


class RowCheck:
    """The check of `merge --verify`, of the finished folder or of each file before it leaves for
    the Hub, with the sum of its results."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.result: Json = {}

    def __call__(self, folder: Path) -> None:
        out = FinishedFolder(folder)
        self.result = check_files(out, read_receipt(out)) | check_rows(out, self.plan)

    def check_file(self, folder: Path, plan: Plan, result: ShardResult) -> None:
        """Check the one file of this plan."""
        out = FinishedFolder(folder)
        check_file(out, result.file, result.sha256, result.marks, lambda done: None)
        seen = {"files": 1, "bytes": result.size, **check_rows(out, plan)}
        sums = {name: self.result.get(name, 0) + count for name, count in seen.items()}
        self.result = sums | {"hash": "sha256" if result.sha256 else "none"}


def check_rows(out: Folder, plan: Plan, hint: str = AGAIN) -> Json:
    """Recompute rows of every changed tensor from the inputs in float64, and return the number of
    rows and tensors. `Damaged` lists every error."""
    checks = [(check, shard.file) for shard in plan.shards for check in _checks(shard)]
    files = dict.fromkeys(file for _, file in checks)
    own = {file: {s.key: s for s in stored_tensors(out, file)} for file in files}
    every = {key: spec for each in own.values() for key, spec in each.items()}
    # a weight may have tensors in two files, and a pipeline's models tensors with one name
    specs = {file: every | each for file, each in own.items()}
    with Sources(plan.folders, dict(plan.identities)) as sources, Sources((out,), {}) as written:
        inputs, stored = (
            LocalReader(files, torch.device("cpu"), torch.float64) for files in (sources, written)
        )

        def run(one: tuple[_TensorCheck, str]) -> RowsChecked:
            check, file = one
            torch.set_num_threads(1)  # this thread's
            with torch.inference_mode():
                return check.run(inputs, stored, specs[file])

        threads = torch.get_num_threads()
        try:
            results = list(in_order(run, checks, min(THREADS, cores())))
        finally:
            torch.set_num_threads(threads)
    pairs = zip(checks, results, strict=True)
    wrong = [(c, r.wrong) for (c, _), r in pairs if r.wrong is not None]
    if len(wrong) > FEW:
        raise _many(wrong, len(checks), out.label, hint)
    Problems(
        [
            Damaged(
                each.text,
                expected=check.expected,
                where=shown(check.step.key),
                hint=hint,
                code="AK607",
            )
            for check, each in wrong
        ]
    ).raise_all()
    rows = sum(result.rows for result in results)
    if checks and not rows:
        raise Failed(
            "no row was recomputed: every changed tensor is empty",
            where=out.label,
            hint="check the base and the adapters",
            code="AK607",
        )
    return {"rows": rows, "tensors": len(checks)}


class Wrong(NamedTuple):
    """The first wrong value of a tensor, and the largest error."""

    text: str
    by: float = math.inf


def _many(
    wrong: "list[tuple[_TensorCheck, Wrong]]", checked: int, where: str, hint: str
) -> Damaged:
    """Return one error for many wrong tensors, with the worst of them."""
    worst = sorted(wrong, key=lambda pair: -pair[1].by)[:FEW]
    texts = [f"{shown(check.step.key)} by {each.by:.3g} ({each.text})" for check, each in worst]
    problem = f"{len(wrong)} of {checked} tensors are not what the inputs give, the worst: "
    expected = worst[0][0].expected
    return Damaged(
        problem + "; ".join(texts), expected=expected, where=where, hint=hint, code="AK607"
    )


class RowsChecked(NamedTuple):
    """The result for one tensor: the number of recomputed rows, and the first wrong value."""

    rows: int
    wrong: Wrong | None = None


def _checks(shard: OutputFile) -> Iterator["_TensorCheck"]:
    """Yield a check of every tensor that a file does not copy."""
    yield from (FloatCheck(step) for step in shard.steps if not step.copied)
    for task in shard.tasks:
        task = task.task if isinstance(task, SomeOutputs) else task
        if isinstance(task, EditedTensor):
            yield FloatCheck(task.step)
        elif isinstance(task, RequantizedWeight):
            yield CodeCheck(task.step, task.packed)
        elif isinstance(task, CompensatedStep):
            yield CompensatedCheck(task.step, task.format)
        elif isinstance(task, EncodedStep):
            yield EncodedCheck(task.step, task.format)
        elif not task.copied:
            raise TypeError(f"{shown(task.name)}: no check of a {type(task).__name__}")


@dataclass(frozen=True)
class FloatCheck:
    """A check of a tensor of floats: its first row, the last, and one between."""

    step: Step
    expected = "W + Σ weight·scale·b@a, rounded"

    def run(self, inputs: LocalReader, written: LocalReader, specs: Specs) -> RowsChecked:
        """Check the output; `inputs` are the plan's, in float64, `written` the output's, `specs`
        its tensors."""
        step, origin = self.step, SampledRows(self.step, inputs)
        for row in origin.sample:
            exact = origin.edited(row, row + 1)
            stored = written.rows(specs[step.key], (origin.height, origin.width), row, row + 1)
            # rounding never swaps two values, whatever it draws: the exact sum of a merge
            # is between these
            slack, position = (
                exact.abs().amax() * SLACK[arithmetic(step).itemsize],
                row * origin.width,
            )
            low, high = (rounded(exact + by, step, position).double() for by in (-slack, slack))
            bad = ~((low <= stored) & (stored <= high))
            if bool(bad.any()):
                return RowsChecked(
                    len(origin.sample),
                    _difference(bad, stored, rounded(exact, step, position), row),
                )
        return RowsChecked(len(origin.sample))


@dataclass(frozen=True)
class CodeCheck:
    """A check of a weight in a quantized format: the slices with its first row, the last, and one
    between; the whole weight if its scales depend on all of it."""

    step: Step
    packed: QuantizedWeight
    expected = "W + Σ weight·scale·b@a, encoded"

    def run(self, inputs: LocalReader, written: LocalReader, specs: Specs) -> RowsChecked:
        origin = SampledRows(self.step, inputs)
        after = _stored_parts(self.packed, written, specs)
        alone = (
            self.step.draws is not None or self.packed.split_nested(origin.parts)[0] is self.packed
        )
        ranges = (
            sorted({origin.range_of(row) for row in origin.sample})
            if alone
            else [(0, origin.height)]
        )
        wrong = (self._wrong(origin, after, first, last) for first, last in ranges)
        return RowsChecked(
            sum(last - first for first, last in ranges), next(filter(None, wrong), None)
        )

    def _wrong(
        self, origin: "SampledRows", after: dict[str, Tensor], first: int, last: int
    ) -> Wrong | None:
        """Return the first wrong value of these rows."""
        record, before = origin.narrow(origin.parts, first, last)
        exact = origin.exact(first, last)
        slack = exact.abs().amax(1, keepdim=True) * SLACK[arithmetic(self.step).itemsize]
        written = origin.narrow(after, first, last)[1]
        stored = decode_checked(record, written).view(exact.shape)
        if bool(((exact - stored).abs() <= slack).all()) and torch.equal(
            stored, decode_checked(record, before).view(exact.shape)
        ):
            return None  # what does not change keeps its bytes
        draws = self.step.draws and self.step.draws.at(first * origin.width)
        encoded = lambda w: record.encode_keeping_scales(before, _value(record, w), draws)
        expected = encoded(exact)
        for key, part in expected.items():
            if part is before[key] and not torch.equal(part, written[key]):
                return Wrong(
                    f"{shown(key)} is not the base's, though it does not depend on the weight's "
                    "values"
                )
        return _wrong(record, written, exact, slack, expected, encoded, draws, first)


@dataclass(frozen=True)
class CompensatedCheck:
    """A check of a whole tensor rounded with compensation: each element's value before rounding
    follows from the exact weight and the stored values."""

    step: Step
    packed: QuantizedWeight | None  # the format, if it is written in one
    expected = "W + Σ weight·scale·b@a, rounded with compensation"

    def run(self, inputs: LocalReader, written: LocalReader, specs: Specs) -> RowsChecked:
        origin, compensation = SampledRows(self.step, inputs), self.step.compensation
        assert compensation is not None
        exact = origin.exact(0, origin.height)
        after = self._parts(written, specs)
        stored = self._stored(after).view(exact.shape).double()
        slack, count = float(exact.abs().amax()) * SLACK_OF_SUMS, origin.height
        original = origin.rows(0, origin.height)
        same = self.packed is not None and torch.equal(stored, original)
        if same and float((exact - original).abs().amax()) <= slack:
            return RowsChecked(count)  # what does not change keeps its bytes
        turn = (lambda m: m.T) if compensation.by_columns else (lambda m: m)
        before = turn(before_rounding(inputs, compensation, turn(exact), turn(stored)))
        low = high = value = self._rounded(origin, exact, before, after).double()
        bad = (stored - value).abs() > slack
        if bool(bad.any()):  # values near a boundary, or with a scale near one
            for by in (-slack, slack):
                for shifted in (before + by, before - by):
                    other = self._rounded(origin, exact + by, shifted, after).double()
                    low, high = torch.minimum(low, other), torch.maximum(high, other)
            bad = ~((low - slack <= stored) & (stored <= high + slack))
        if self.packed is not None and self.packed.searches_scales:
            plain = plainly_encoded(self.packed, self.step, origin.parts, exact)
            bad |= ~_as_near(self.packed, after, exact, torch.tensor(slack), [plain], None)
        return RowsChecked(count, _difference(bad, stored, value, 0) if bool(bad.any()) else None)

    def _parts(self, written: LocalReader, specs: Specs) -> dict[str, Tensor]:
        if self.packed is None:
            return {self.step.key: written.tensor(specs[self.step.key])}
        return _stored_parts(self.packed, written, specs)

    def _stored(self, after: dict[str, Tensor]) -> Tensor:
        if self.packed is None:
            return after[self.step.key]
        return decode_checked(self.packed, after)

    def _rounded(
        self, origin: "SampledRows", exact: Tensor, before: Tensor, after: dict[str, Tensor]
    ) -> Tensor:
        """Return `before` rounded to nearest, in a format with the scales of the exact weight; with
        the stored scales if several may be equally good."""
        if self.packed is None:
            return rounded(before, self.step)
        plain = after
        if not self.packed.searches_scales:
            plain = plainly_encoded(self.packed, self.step, origin.parts, exact)
        return _nearest(self.packed, plain, before)


@dataclass(frozen=True)
class EncodedCheck:
    """A check of a whole tensor that is stored in another format than its source."""

    step: Step
    packed: QuantizedWeight
    expected = "W + Σ weight·scale·b@a, encoded"

    def run(self, inputs: LocalReader, written: LocalReader, specs: Specs) -> RowsChecked:
        origin = SampledRows(self.step, inputs)
        exact = origin.exact(0, origin.height)
        after = _stored_parts(self.packed, written, specs)
        slack = exact.abs().amax(1, keepdim=True) * SLACK[arithmetic(self.step).itemsize]
        expected, draws = self._encoded(exact), self.step.draws
        wrong = _wrong(self.packed, after, exact, slack, expected, self._encoded, draws)
        return RowsChecked(origin.height, wrong)

    def _encoded(self, exact: Tensor) -> dict[str, Tensor]:
        """Return the encoding of the exact values."""
        value = _value(self.packed, exact)
        tensors = self.packed.encode(value)
        if self.step.draws is not None:
            tensors = self.packed.encode_keeping_scales(tensors, value, self.step.draws)
        return tensors


def _stored_parts(packed: QuantizedWeight, written: LocalReader, specs: Specs) -> dict[str, Tensor]:
    return {part.key: written.view(None).tensor(specs[part.key]) for part in packed.parts}


def _decoded(packed: QuantizedWeight, stored: dict[str, Tensor], exact: Tensor) -> Tensor:
    return decode_checked(packed, stored).view(exact.shape).double()


def _wrong(
    packed: QuantizedWeight,
    after: dict[str, Tensor],
    exact: Tensor,
    slack: Tensor,
    expected: dict[str, Tensor],
    encoded: Callable[[Tensor], dict[str, Tensor]],
    draws: Draws | None,
    first: int = 0,
) -> Wrong | None:
    """Return the first value outside the range of the exact one's encodings within `slack`, because
    an encoder never swaps two values. If scales are searched, equally good ones may be stored: then
    the encodings with these count."""
    stored, value = (_decoded(packed, parts, exact) for parts in (after, expected))

    def outside(values: list[Tensor]) -> Tensor:
        low, high = torch.stack(values).amin(0) - slack, torch.stack(values).amax(0) + slack
        return ~((low <= stored) & (stored <= high))

    bad, each = outside([value]), [expected]
    if bool(bad.any()):
        each += [encoded(exact + by) for by in (-slack, slack)]
        bad = outside([_decoded(packed, parts, exact) for parts in each])
    if bool(bad.any()) and packed.searches_scales:
        again = [_with_scales(packed, after, exact + by, draws) for by in (0, -slack, slack)]
        bad &= outside(again) | ~_as_near(packed, after, exact, slack, each, draws)
    return _difference(bad, stored, value, first) if bool(bad.any()) else None


def _with_scales(
    packed: QuantizedWeight, stored: dict[str, Tensor], weight: Tensor, draws: Draws | None
) -> Tensor:
    """Return a weight as encoded with the stored scales, decoded."""
    if draws is None:
        return _nearest(packed, stored, weight).double()
    return _decoded(packed, packed.encode_rounded(stored, _value(packed, weight), draws), weight)


def _nearest(
    packed: QuantizedWeight, stored: dict[str, Tensor], weight: Tensor
) -> Tensor:  # float32, as weight
    """Return the nearest values to a weight with the stored scales."""
    value, round_column = _value(packed, weight), packed.column_rounder(stored)
    turned = packed.transposed and value.dim() > 1
    value = value.transpose(-2, -1) if turned else value
    matrix = value.reshape(-1, value.shape[-1])
    if packed.searches_scales:
        result = round_column(matrix.contiguous(), None).view(value.shape)
    else:
        columns = matrix.T.contiguous()
        rounded = [round_column(w, number) for number, w in enumerate(columns)]
        result = torch.stack(rounded, 1).view(value.shape)
    return (result.transpose(-2, -1) if turned else result).reshape(weight.shape)


def _as_near(
    packed: QuantizedWeight,
    after: dict[str, Tensor],
    exact: Tensor,
    slack: Tensor,
    expected: list[dict[str, Tensor]],
    draws: Draws | None,
) -> Tensor:  # bool
    """Return which values are in pieces of rows whose stored scales are as near to the exact
    values as an encoding's: of two scales with nearly the same error, either may have been
    found. Scales are searched by the errors of nearest codes; with draws they are chosen by the
    expected errors."""
    each = math.gcd(packed.row_width, PIECE_OF_ROW)
    sums = lambda x: x.expand_as(exact).reshape(-1, each).sum(1, keepdim=True)
    near = torch.zeros(exact.numel() // each, 1, dtype=torch.bool)
    for sampled in {False, draws is not None}:
        error, *others = (sums(_squares(packed, one, exact, sampled)) for one in (after, *expected))
        near |= error <= torch.stack(others).amax(0) * NEAR + sums(slack.square())
    return near.expand(-1, each).reshape(exact.shape)


def _squares(
    packed: QuantizedWeight, stored: dict[str, Tensor], exact: Tensor, sampled: bool
) -> Tensor:
    """Return (value - exact)² with the stored scales; the expected one if codes are sampled."""
    near = _with_scales(packed, stored, exact, None) - exact
    if not sampled:
        return near.square()
    product = near * (_with_scales(packed, stored, exact, Zeros(0)) - exact)
    return torch.where(product < 0, -product, near.square())  # no neighbor beyond the ends


def _value(packed: QuantizedWeight, weight: Tensor) -> Tensor:
    return weight.float().view(packed.shape)


_TensorCheck = FloatCheck | CodeCheck | CompensatedCheck | EncodedCheck


def _difference(bad: Tensor, stored: Tensor, expected: Tensor, row: int) -> Wrong:
    """Return the first of the bad values; `row` is the tensor's row where they begin."""
    at, column = divmod(int(bad.flatten().nonzero()[0]), bad.shape[1])
    by = float((stored.double() - expected.double()).abs()[bad].nan_to_num(math.inf).max())
    text = (
        f"row {row + at}, column {column}: {float(stored[at, column])!r}, not "
        f"{float(expected[at, column])!r}"
    )
    return Wrong(text, by)


class SampledRows(StoredRows):
    """The rows that a step starts from, in float64, and the same rows after its edits."""

    def __init__(self, step: Step, inputs: LocalReader):
        super().__init__(step, inputs, CHUNK, torch.float64, keeps=True)
        last = self.height - 1
        self.sample = sorted({0, self.height // 2, last}) if math.prod(step.shape) else []

    def range_of(self, row: int) -> tuple[int, int]:
        return self.ranges[bisect_right(self.ranges, row, key=lambda each: each[0]) - 1]

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Split rows [first, last) into pieces, none of them across two ranges."""
        most = max(1, CHUNK // max(self.width, 1))
        while first < last:
            stop = min(first + most, self.range_of(first)[1], last)
            yield first, stop
            first = stop

    def exact(self, first: int, last: int) -> Tensor:
        """Return rows after the edits."""
        return torch.cat([self.edited(*piece) for piece in self.pieces(first, last)])

    def rows(self, first: int, last: int) -> Tensor:
        if not isinstance(self.source, QuantizedWeight):
            return self.inputs.rows(self.source, (self.height, self.width), first, last)
        pieces = []
        while first < last:
            low, high = self.range_of(first)
            pieces.append(self.decode(low, high)[first - low : last - low].double())
            first = high
        return torch.cat(pieces)

    def edited(self, first: int, last: int) -> Tensor:
        rows = self.rows(first, last)
        for edit in self.edits:
            edit.apply(rows, first)
        return rows
