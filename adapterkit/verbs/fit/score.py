"""fit --score: one weight per adapter, chosen by a number that a program prints for a candidate."""

import hashlib
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from adapterkit.core.checkpoint.fingerprint import fingerprint
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.errors import AdapterkitError, Failed, Problems
from adapterkit.core.inputs.sources import open_model
from adapterkit.core.inputs.weights_file import (
    NamedAdapter,
    WeightsBase,
    WeightsFile,
    named_adapter,
)
from adapterkit.core.options import Progress, finite, no_progress
from adapterkit.core.plan import Plan, TaskResult
from adapterkit.core.records import Json
from adapterkit.kernels.cma import Cma
from adapterkit.verbs.combine.records.combine import Combine
from adapterkit.verbs.fit.collection import Evaluations, FittedWeights, WeightsCollection
from adapterkit.verbs.fit.plan import TEXT, adapters_of
from adapterkit.verbs.fit.verb import WeightFit
from adapterkit.verbs.shared.joined_values import delta_problems, read_all

MOST = 8  # adapters: of more the search needs too many evaluations
STEP = 0.3  # of the first generation's weights
DIGITS = 4  # of a candidate's weights, written with the digits that were scored
PLACE = "{}"  # of the candidate in the command
TAIL = 400  # last characters of a failed program's output


def _digest(options: WeightFit) -> str:
    """A hash of the command, which may contain secrets, for the files."""
    return hashlib.sha256(str(options.score).encode()).hexdigest()


@dataclass
class Search:
    """Weights by CMA-ES, each candidate scored once: `scores` holds the scores so far, in order."""

    score: Callable[[Sequence[float]], float]  # the larger the better
    evaluated: Evaluations
    evaluations: int
    scores: list[tuple[list[float], float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[list[float], float]:
        """The first of the best candidates."""
        return max(self.scores, key=lambda one: one[1])

    def run(self, start: Sequence[float], low: float, high: float, seed: int) -> None:
        """Score the start, then generations until the evaluations are used up."""
        self._of(torch.tensor(start).double().clamp(low, high))
        cma = Cma(torch.tensor(start), STEP, low, high, seed)
        while self.evaluations > len(self.scores):
            points = (cma.ask() * 10**DIGITS).round() / 10**DIGITS
            left = self.evaluations - len(self.scores)
            values = [-self._of(point) for point in points[:left]]
            if len(values) == len(points):
                cma.tell(points, torch.tensor(values).double())

    def _of(self, point: Tensor) -> float:
        compute = lambda: [torch.tensor(self.score(point.tolist())).double()]
        (value,) = self.evaluated.of("score", point, compute, [()])
        self.scores.append((point.tolist(), float(value)))
        return float(value)


@dataclass(frozen=True)
class ScoreCollection(WeightsCollection):
    """A search of weights by a program, which gets a folder with the exact weighted sum of the
    adapters."""

    options: WeightFit
    adapters: list[NamedAdapter]
    base: WeightsBase
    names: Sequence[str]
    words: Sequence[str]
    start: list[float]

    @property
    def about(self) -> Json:
        return {"score": self.options.score}

    def totals(self, budget: int) -> dict[str, int]:
        adapters = len(self.adapters)
        return {"evaluations": self.options.evaluations, "weights_per_adapter": adapters}

    def made(self, plan: Plan, work: Path, device: torch.device, progress: Progress) -> TaskResult:
        """The best weights; if the program fails, the error names the best so far."""
        options = self.options
        with tempfile.TemporaryDirectory(prefix="adapterkit-") as folder:
            score = partial(self.score, Path(folder) / "candidate", progress)
            search = Search(score, Evaluations(work), options.evaluations)
            try:
                search.run(self.start, *options.limits, options.seed)
            except AdapterkitError as error:
                if search.scores:
                    weights, best = search.best
                    error.hint += (
                        f"; the best so far, {best:g} with {weights}, is written by "
                        f"--resume --evaluations {len(search.scores)}"
                    )
                raise
        rows = [{"weights": weights, "score": score} for weights, score in search.scores]
        (weights, score), first = search.best, rows[0]["score"]
        about = {"score_sha256": _digest(options), "best": score, "start": first}
        about |= {"evaluations": len(rows), "seed": options.seed}
        best = {"weights": weights, "score": score}
        document = {"evaluations": rows, "best": best, "notes": []}
        file = WeightsFile(tuple(self.adapters), tuple(weights), {}, "adapter", self.base, about)
        return FittedWeights.result(file, document)

    def combination(self, weights: Sequence[float], out: Path) -> Combine:
        adapters = list(zip(self.names, weights, strict=True))
        return Combine(
            adapters=adapters, base=self.options.base, out=out, hash="none", overwrite=True
        )

    def score(self, out: Path, progress: Progress, weights: Sequence[float]) -> float:
        """The last number that the program prints; `Failed` if it fails, or prints none."""
        self.combination(weights, out).run()
        words = [word.replace(PLACE, str(out)) for word in self.words]
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise _failed(f"{words[0]}: {error.strerror}", weights, "a program") from error
        if done.returncode:
            printed = done.stderr.strip()[-TAIL:] or done.stdout.strip()[-TAIL:]
            raise _failed(f"exit status {done.returncode}: {printed}", weights, "exit status 0")
        numbers = [number for word in done.stdout.split() if (number := _number(word)) is not None]
        if not numbers:
            printed = done.stdout.strip()[-TAIL:] or "nothing"
            raise _failed(f"no number in its output: {printed}", weights, "a finite number")
        progress(1)
        return numbers[-1]


def plan_search(options: WeightFit) -> Plan:
    """The plan of a search, or `Refused`."""
    errors, folder = Problems(), open_model(options.base)
    folders, names, start = adapters_of(options, folder, errors)
    command = _command(options, len(folders), errors)
    read = read_all(folders)
    errors += (error for one in read if one.base_change for error in delta_problems(one))
    errors.raise_all()
    adapters = [named_adapter(n, f) for n, f in zip(names, folders, strict=True)]
    base = open_checkpoint(folder)
    known, own = WeightsBase(folder.name, fingerprint(base)), replace(options, progress=no_progress)
    search = ScoreCollection(own, adapters, known, names, command, start)
    search.combination(start, Path("candidate")).plan()  # every refusal, before the program runs
    # without `evaluations`: a resumed search may have more of them, or fewer
    recipe = {"score": _digest(options), "weights": start}
    recipe |= {"seed": options.seed, "bounds": list(options.limits)}
    return search.plan(options, recipe, base, read, TEXT)


def _command(options: WeightFit, count: int, errors: Problems) -> list[str]:
    """The program's words; problems with them, or with the adapters, join the errors."""
    words: list[str] = []
    with suppress(ValueError):  # a quotation without end
        words = shlex.split(str(options.score))
    if not any(PLACE in word for word in words):
        errors.add(
            f"--score {options.score!r}",
            f"a command with {PLACE}, which stands for the candidate's folder",
            f'e.g. --score "evaluate {PLACE}"',
            where="options",
            code="AK904",
        )
    if not 2 <= count <= MOST:
        problem, hint = f"{count} adapters", "combine some of them first, or fit to data"
        errors.add(problem, f"2 to {MOST}", hint, where="--score", code="AK904")
    return words


def _number(word: str) -> float | None:
    """The finite number in a word, also after a name (`acc=0.7`, `acc:0.7`) or before a comma."""
    return finite(re.split(r"[=:]", word)[-1].strip(",;()[]{}\"'"))


def _failed(problem: str, weights: Sequence[float], expected: str) -> Failed:
    return Failed(
        f"weights {', '.join(f'{weight:g}' for weight in weights)}: {problem}",
        expected=f"{expected} from the program",
        where="--score",
        hint="correct the program, then run it again with --resume",
        code="AK905",
    )
