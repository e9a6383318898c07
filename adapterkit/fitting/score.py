"""fit --score: one weight for each adapter by any number that a program prints of a candidate."""

import hashlib
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from adapterkit.adapters.weights_file import (
    NamedAdapter,
    WeightsBase,
    WeightsFile,
    named_adapter,
    write_weights,
)
from adapterkit.checkpoint.fingerprint import fingerprint
from adapterkit.checkpoint.spec import open_checkpoint
from adapterkit.errors import AdapterkitError, Failed, Problems
from adapterkit.fitting.journal import Journal
from adapterkit.fitting.plan import adapters_of, check_out
from adapterkit.kernels.cma import Cma
from adapterkit.options import finite
from adapterkit.planning.inputs.sources import open_model
from adapterkit.records import Json
from adapterkit.verbs.combine import Combine
from adapterkit.verbs.fit import WeightFit

MOST = 8  # adapters: of more the search needs too many evaluations
STEP = 0.3  # of the first generation's weights
DIGITS = 4  # of a candidate's weights, which are written as they were scored
PLACE = "{}"  # of the candidate in the command
TAIL = 400  # characters of what a program that failed printed last


def _digest(options: WeightFit) -> str:
    """What files say of the command, which may hold secrets."""
    return hashlib.sha256(str(options.score).encode()).hexdigest()


@dataclass
class Search:
    """Weights by CMA-ES, each candidate scored once: `scores` are those so far, in order."""

    score: Callable[[Sequence[float]], float]  # the larger the better
    journal: Journal
    evaluations: int
    scores: list[tuple[list[float], float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[list[float], float]:
        """The first of the best candidates."""
        return max(self.scores, key=lambda one: one[1])

    def run(self, start: Sequence[float], low: float, high: float, seed: int) -> None:
        """The start, then generations until the evaluations are used up."""
        self._of(torch.tensor(start).double().clamp(low, high))
        cma = Cma(torch.tensor(start), STEP, low, high, seed)
        while self.evaluations > len(self.scores):
            points = (cma.ask() * 10**DIGITS).round() / 10**DIGITS
            room = self.evaluations - len(self.scores)
            values = [-self._of(point) for point in points[:room]]
            if len(values) == len(points):
                cma.tell(points, torch.tensor(values).double())

    def _of(self, point: Tensor) -> float:
        compute = lambda: [torch.tensor(self.score(point.tolist())).double()]
        (value,) = self.journal.of("score", point, compute, [()])
        self.scores.append((point.tolist(), float(value)))
        return float(value)


def search_weights(options: WeightFit) -> Json:
    """Search weights by a program and write the best; what is said of them. Where the program fails
    the best so far are written, and the error says so."""
    out, errors = Path(options.out), Problems()
    with errors.collected():
        check_out(out, options.overwrite or options.resume)
    base = open_model(options.base)
    folders, names, start = adapters_of(options, base, errors)
    command = _command(options, len(folders), errors)
    errors.raise_all()
    adapters = [named_adapter(n, f) for n, f in zip(names, folders, strict=True)]
    with tempfile.TemporaryDirectory(prefix="adapterkit-") as work:
        candidate = Candidate(options, names, command, Path(work))
        candidate.combination(start).plan()  # every refusal, before the program runs
        known = WeightsBase(base.name, fingerprint(open_checkpoint(base)))
        document: Json = {"fit": 1, "out": str(out), "score": options.score, "notes": []}
        if options.dry_run:
            totals = {"evaluations": options.evaluations, "weights_per_adapter": len(folders)}
            return document | {"totals": totals}
        job = {"score": _digest(options), "adapters": [dict(one.files) for one in adapters]}
        job |= {"base": known.fingerprint, "start": start, "seed": options.seed}
        journal = Journal.beside(out, job | {"bounds": list(options.limits)}, options.resume)
        search = Search(candidate.score, journal, options.evaluations)
        try:
            search.run(start, *options.limits, options.seed)
        except AdapterkitError as error:
            if search.scores:
                weights, score = _write(search, adapters, known, options)
                error.hint += f"; the best so far, {score:g} with {weights}, is in {out}"
            raise
        weights, score = _write(search, adapters, known, options)
        journal.close()
    rows = [{"weights": weights, "score": value} for weights, value in search.scores]
    return document | {"evaluations": rows, "best": {"weights": weights, "score": score}}


def _write(
    search: Search, adapters: Sequence[NamedAdapter], base: WeightsBase, options: WeightFit
) -> tuple[list[float], float]:
    """Write the best weights so far; these, and their score."""
    weights, score = search.best
    about = {"score_sha256": _digest(options), "best": score, "start": search.scores[0][1]}
    about |= {"evaluations": len(search.scores), "seed": options.seed}
    file = WeightsFile(tuple(adapters), tuple(weights), {}, "adapter", base, about)
    write_weights(file, options.out)
    return weights, score


def _command(options: WeightFit, count: int, errors: Problems) -> list[str]:
    """The program's words; what is wrong with them, or the adapters, joins the errors."""
    words: list[str] = []
    with suppress(ValueError):  # a quotation without end
        words = shlex.split(str(options.score))
    if not any(PLACE in word for word in words):
        errors.add(
            f"--score {options.score!r}",
            f"a command with {PLACE}, where the candidate's folder goes",
            f'e.g. --score "evaluate {PLACE}"',
            where="options",
        )
    if not 2 <= count <= MOST:
        problem, hint = f"{count} adapters", "combine some of them first, or fit to data"
        errors.add(problem, f"2 to {MOST}", hint, where="--score")
    return words


@dataclass
class Candidate:
    """What the program is given: the adapters' sum with some weights, exact, in a folder."""

    options: WeightFit
    names: Sequence[str]
    words: Sequence[str]
    work: Path

    def combination(self, weights: Sequence[float]) -> Combine:
        return Combine(
            adapters=list(zip(self.names, weights, strict=True)),
            base=self.options.base,
            out=self.work / "candidate",
            hash="none",
            overwrite=True,
        )

    def score(self, weights: Sequence[float]) -> float:
        """The last number that the program prints; `Failed` where it fails, or prints none."""
        self.combination(weights).run()
        place = str(self.work / "candidate")
        words = [word.replace(PLACE, place) for word in self.words]
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise _failed(f"{words[0]}: {error.strerror}", weights, "a program") from error
        if done.returncode:
            said = done.stderr.strip()[-TAIL:] or done.stdout.strip()[-TAIL:]
            raise _failed(f"exit status {done.returncode}: {said}", weights, "exit status 0")
        numbers = [number for word in done.stdout.split() if (number := _number(word)) is not None]
        if not numbers:
            said = done.stdout.strip()[-TAIL:] or "nothing"
            raise _failed(f"no number in what it printed: {said}", weights, "a finite number")
        self.options.progress(1)
        return numbers[-1]


def _number(word: str) -> float | None:
    """The finite number that a word is, also behind a name (`acc=0.7`, `acc:0.7`) or before a
    comma."""
    return finite(re.split(r"[=:]", word)[-1].strip(",;()[]{}\"'"))


def _failed(problem: str, weights: Sequence[float], expected: str) -> Failed:
    return Failed(
        f"weights {', '.join(f'{weight:g}' for weight in weights)}: {problem}",
        expected=f"{expected} from the program",
        where="--score",
        hint="correct the program, then run it again with --resume",
    )
