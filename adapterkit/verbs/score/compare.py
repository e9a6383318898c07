"""compare: ask a server and the files for log-probabilities of the same tokens, and find the
variant of the adapter that is nearest to what is served."""

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from adapterkit.core import dtypes
from adapterkit.core.adapter.peft import scan_adapter
from adapterkit.core.adapter.record import EMBEDDINGS, Adapter
from adapterkit.core.adapter.selection import selectable_names
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.commands import command
from adapterkit.core.engine.device import pick_device
from adapterkit.core.errors import AdapterkitError, Refused, advice, alternatives, listed, shown
from adapterkit.core.hints import with_paths
from adapterkit.core.inputs.sources import if_given, open_adapter, open_model
from adapterkit.core.lazy import Tensor
from adapterkit.core.options import files, parse_size
from adapterkit.core.records import Json
from adapterkit.core.system import quarter_of_memory
from adapterkit.verbs.score.compare_verb import Compare
from adapterkit.verbs.score.job import measured_texts
from adapterkit.verbs.score.run import run
from adapterkit.verbs.score.servers import LogProbs, Query, Server, connect
from adapterkit.verbs.score.variants import Variant, stored, with_adapters
from adapterkit.verbs.stats.data.records import IGNORED
from adapterkit.verbs.stats.data.samples import Sample, Samples
from adapterkit.verbs.stats.plan import LENGTH

VERSION = 1
SMALLEST = 1e-9  # of a probability: rounding makes sums of them differ by more
FLOOR = 1e-8  # of a divergence, below which rounding to float32 decides
LIMIT = 0.01  # divergence of a model that is served alone, above which it is another one
TEXTS = """\
The river rises in the hills north of the town and reaches the sea after forty miles.
Question: How many minutes are there in three hours? Answer: There are 180 minutes.
def mean(values): return sum(values) / len(values)  # fails for an empty list
Dear Ms. Miller, thank you for your letter. We will send the books on Monday.
In 1905 the company opened its second factory and hired two hundred workers.
To make the soup, cut the onions, fry them in butter and add a litre of water.
{"name": "Anna", "age": 31, "languages": ["English", "French"]}
She opened the window, because the room was warm and the birds had begun to sing.
"""
ATTENTION, MLP = ("attn", "attention"), ("mlp", "ffn", "feed_forward", "expert", "moe")


def compare_server(options: Compare) -> Json:
    """The document of `compare`."""
    server = connect(options.url, os.environ.get(options.api_key_env or ""))
    name, base = server.find(options.served)
    if options.adapter is not None and base is None:
        raise _no_adapter(server, name)
    folder = open_model(options.model)
    adapter = if_given(lambda text: open_adapter(text, folder, for_merge=True), options.adapter)
    with tempfile.TemporaryDirectory() as work:
        samples, notes = _samples(options, folder, server, Path(work))
        top = options.top or server.top
        asked = [Query(name, s.tokens, _positions(s), top) for s in samples.samples]
        names = [name] if adapter is None else [name, str(base)]
        served = [
            [row for query in asked for row in server.predictions(replace(query, name=one))]
            for one in names
        ]
        compared = Comparison(options, folder, adapter, samples, served, Path(work))
        found = compared.model() if adapter is None else compared.adapter()
    return {
        "compare": VERSION,
        "server": server.title,
        "url": options.url,
        "name": name,
        "base": None if adapter is None else base,
        **found,
        **advice("" if found["same"] else _next(options, server)),
        "texts": len(asked),
        "positions": len(served[0]),
        "top": top,
        "notes": notes,
    }


def _no_adapter(server: Server, name: str) -> Refused:
    adapters = [shown(one) for one, parent in server.parents.items() if parent is not None]
    expected = f"an adapter: {alternatives(name, adapters)}" if adapters else "a server with one"
    hint = "leave --adapter out to compare the model alone"
    hint = hint if adapters else f"start the server with the adapter, or {hint}"
    problem = f"{shown(name)!r} is a model, not an adapter"
    return server.connection.refused(problem, expected, hint)


def _next(options: Compare, server: Server) -> str:
    """The advice if something else is served."""
    if options.adapter is None or not server.engine:
        return ""
    check = {"for": server.engine, "base": "MODEL"}
    hint = "compare the adapter with the server's rules\n"
    return with_paths(hint + command("adapterkit check", "ADAPTER", **check), options)


def _samples(
    options: Compare, folder: Folder, server: Server, work: Path
) -> tuple[Samples, list[str]]:
    """The samples, with labels at the positions to ask for: all whose next token counts, or as many
    as the server is asked for, at equal distances; and notes on them."""
    data, builtin, own = files(options.data or work / "texts.txt"), [], work / "texts.txt"
    if not options.data:
        own.write_text(TEXTS, "utf-8")
        options = replace(options, samples=TEXTS.count("\n"))
        builtin = ["compared on built-in texts: an adapter for other texts may hardly act on them"]
    if server.longest and server.longest <= (options.length or LENGTH):
        options = replace(options, length=server.longest - 1)  # one more is drawn
    texts = measured_texts(stored(folder), data, options, work)
    samples = texts.samples
    if samples.has_decoder:
        problem, expected = f"{folder.name} has an encoder", "a model that continues a text"
        hint = "give a decoder model"
        raise Refused(problem, expected=expected, where=folder.label, hint=hint, code="AK902")
    every = [(n, at + 1) for n, s in enumerate(samples.samples) for at in _positions(s)]
    count = min(server.most, len(every))
    chosen = {every[len(every) * n // count] for n in range(count)}
    kept = []
    for n, sample in enumerate(samples.samples):
        labels = (x if (n, at) in chosen else IGNORED for at, x in enumerate(sample.labels))
        kept.append(replace(sample, labels=tuple(labels)))
    kept = [sample for sample in kept if _positions(sample)]
    return replace(samples, samples=kept), [*builtin, *texts.notes]


def _positions(sample: Sample) -> list[int]:
    """The positions whose next token counts."""
    return [at for at, label in enumerate(sample.labels[1:]) if label != IGNORED]


# -- what the files predict ------------------------------------------------------------------------


@dataclass(frozen=True)
class Guess:
    """A mistake that a server could make with an adapter."""

    words: str
    weight: float = 1.0
    drops: tuple[str, ...] = ()  # kinds of modules whose deltas it leaves out


@dataclass(frozen=True)
class Comparison:
    """Served predictions, of the adapter and then of its base, and the files to compare with."""

    options: Compare
    folder: Folder
    given: Folder | None  # the adapter's
    samples: Samples
    served: list[list[LogProbs]]
    work: Path

    def model(self) -> Json:
        """The findings on a model without an adapter."""
        (predicted,) = self.predicted([stored(self.folder)])
        kl = divergence(self.served[0], predicted)
        same = kl <= LIMIT
        words = f"is this model: {_yes(same)} (KL {_short(kl)} from the file)"
        found = {"acts": None, "same": same, "verdict": words, "nearest": None, "drops": []}
        return found | {"kl": {"file": kl}, "variants": []}

    def adapter(self) -> Json:
        """The findings on an adapter. The variants run only if what is served is not the adapter
        within the rounding of the server."""
        assert self.given is not None
        served, served_base = self.served
        without, own = self.predicted([stored(self.folder), self.variant(Guess(""))])
        kl = {
            "file": divergence(served, own),
            "base": divergence(served, without),
            "served_base": divergence(served, served_base),
            "noise": divergence(served_base, without),
            "effect": divergence(own, without),
        }
        rows: dict[Guess, float | None] = dict.fromkeys(guesses(scan_adapter(self.given)[0]))
        if kl["file"] > min(1.5 * max(kl["noise"], FLOOR), kl["effect"] / 100):
            possible: dict[Guess, Variant] = {}
            for guess in rows:
                # a merge refuses, for example, other weights than 1 of fully trained values
                with suppress(AdapterkitError):
                    possible[guess] = self.variant(guess)
            predicted = self.predicted(list(possible.values()))
            rows |= {g: divergence(served, p) for g, p in zip(possible, predicted, strict=True)}
        variants = [{"name": guess.words, "kl": value} for guess, value in rows.items()]
        return judged(kl, rows) | {"kl": kl, "variants": variants}

    def variant(self, guess: Guess) -> Variant:
        assert self.given is not None
        return with_adapters(self.folder, [(self.given, guess.weight)], exclude=guess.drops)

    def predicted(self, variants: Sequence[Variant]) -> list[list[LogProbs]]:
        """The log-probabilities, by each variant of the files, of all tokens that are served
        anywhere at the same position."""
        asked = [sorted(set().union(*its)) for its in zip(*self.served, strict=True)]
        starts = [0]
        for sample in self.samples.samples:
            starts.append(starts[-1] + len(_positions(sample)))
        found: list[list[LogProbs]] = [[{}] * len(asked) for _ in variants]

        def measure(own: list[LogProbs], number: int, logits: Tensor, *_: Any) -> None:
            for at, row in enumerate(logits.double().log_softmax(-1).cpu(), starts[number]):
                if not 0 <= asked[at][0] <= asked[at][-1] < len(row):
                    raise self._other_vocabulary(asked[at][-1], len(row))
                own[at] = dict(zip(asked[at], row[asked[at]].tolist(), strict=True))

        options = self.options
        run(
            variants,
            self.samples,
            [partial(measure, own) for own in found],
            device=pick_device(options.device),
            dtype=dtypes.torch_dtype(dtypes.parse(options.dtype or "fp32")),
            work=self.work,
            memory=parse_size(options.memory) if options.memory else quarter_of_memory(),
            step=lambda: options.progress(1),
        )
        return found

    def _other_vocabulary(self, token: int, count: int) -> Refused:
        return Refused(
            f"the server lists token id {token}",
            expected=f"ids from 0 to {count - 1}, the vocabulary of {self.folder.name}",
            where=self.options.url,
            hint="give the model that the server has loaded",
            code="AK910",
        )


def divergence(ours: Sequence[LogProbs], others: Sequence[LogProbs]) -> float:
    """The mean over positions of KL(P || Q) = Σ p·log(p/q) - p + q, P of `ours` and Q of `others`,
    over the tokens that both have and one bucket for all others: a lower bound of the divergence
    over all tokens (log-sum inequality). The last two terms cancel, except for rounding."""
    return sum(map(_divergence, ours, others)) / len(ours)


def _divergence(ours: LogProbs, others: LogProbs) -> float:
    both = ours.keys() & others.keys()
    p, q = ([math.exp(one[token]) for token in both] for one in (ours, others))
    pairs = [*zip(p, q, strict=True), (1 - sum(p), 1 - sum(q))]
    raised = ((max(x, SMALLEST), max(y, SMALLEST)) for x, y in pairs)
    return sum(x * math.log(x / y) - x + y for x, y in raised)


# -- what it means ---------------------------------------------------------------------------------


def guesses(adapter: Adapter) -> list[Guess]:
    """The mistakes that change this adapter: other weights and scales, and left-out modules."""
    weights: dict[float, list[str]] = {0.5: ["half its weight"], 2.0: ["twice its weight"]}
    for weight, words in _scales(adapter):
        weights.setdefault(round(weight, 6), []).append(words)
    found = [Guess(f"with {', or '.join(words)}", w) for w, words in weights.items() if w != 1]
    return found + [
        Guess(f"without the deltas of {', '.join(names)}", drops=names)
        for names in dict.fromkeys(_dropped(adapter))
    ]


def _scales(adapter: Adapter) -> Iterator[tuple[float, str]]:
    """Yield the factors of mistaken scales, if all modules have one rank and scale."""
    pairs = {adapter.rank_and_scale(adapter.pattern_name(lora)) for lora in adapter.loras}
    if len(pairs) == 1:
        ((rank, scale),) = pairs
        root, is_root = math.sqrt(rank), bool(adapter.config.get("use_rslora"))
        words = "alpha / r for alpha / sqrt(r)" if is_root else "alpha / sqrt(r) for alpha / r"
        yield (1 / root if is_root else root), words
        if scale:
            yield 1 / scale, f"scale 1 for {scale:g}"


def _dropped(adapter: Adapter) -> Iterator[tuple[str, ...]]:
    """Yield the kinds of modules, by the last component of their names, that an engine may drop
    together: embeddings and head, all but the attention, all but the MLP, each kind."""
    kinds: dict[str, str] = {}
    for name in sorted(selectable_names(adapter)):
        module = name.removesuffix(".weight").removesuffix(".bias")
        if not (last := module.rpartition(".")[2]).isdigit():
            kinds.setdefault(last, module)
    has = lambda name, words: any(word in name for word in words)
    sides = {kind for kind, name in kinds.items() if EMBEDDINGS.search(f"{name}.weight")}
    parts = [{k for k, name in kinds.items() if has(name, words)} for words in (ATTENTION, MLP)]
    groups = [sides, *(kinds.keys() - part for part in parts if part), *({k} for k in kinds)]
    for group in groups:
        if group and group != kinds.keys():
            yield tuple(sorted(group))


def judged(kl: Mapping[str, float], rows: Mapping[Guess, float | None]) -> Json:
    """Whether the adapter acts, whether it is this one, and what is nearest.

    The divergence between both bases is the noise of a server that rounds otherwise. It acts: the
    served divergence from the served base is above the noise and 1% of the adapter's own effect, or
    above a quarter of that. It is this one: no variant is nearer by more than half the noise, and
    it is within a quarter of the effect. It is another variant: the nearest one, if it is
    nearer than the base by a factor of 4, and within a quarter of the effect too."""
    noise, effect = max(kl["noise"], FLOOR), kl["effect"]
    acts = kl["served_base"] > max(min(max(noise, effect / 100), effect / 4), FLOOR)
    ran = {guess: value for guess, value in rows.items() if value is not None}
    best, least = min(ran.items(), key=lambda row: row[1], default=(None, math.inf))
    near, same, drops, why = None, None, [], ""
    if effect < FLOOR:
        why = "it cannot be decided, because the adapter changes nothing on these texts"
    elif kl["file"] <= min(least, kl["base"]) + noise / 2 and kl["file"] <= effect / 4:
        same, near = True, "the adapter"
    elif best is not None and 4 * max(least, noise / 2) < min(effect, kl["base"]):
        acts, same, near, drops = True, False, best.words, list(best.drops)
        why = f"it acts as this one {best.words}, KL {_short(least)} from that"
    elif not acts:
        same, near = False, "the base"
    elif noise > effect / 4:
        why = "it cannot be decided, because the served base is "
        why += f"KL {_short(noise)} from the file's, and the adapter changes it by {_short(effect)}"
    else:
        same, why = False, "it is another adapter, or on another base"
    left = listed(drops) if drops else "none" if same or near not in (None, "the base") else "all"
    left = "unknown" if near is None else left
    word = "undecided" if same is None else _yes(same)
    word = f"{word}, {why}" if why else word
    verdict = f"served adapter acts: {_yes(acts)}; is this adapter: {word}"
    verdict += f" (KL {_short(kl['file'])} from the file, {_short(kl['base'])} from the base)"
    return {
        "acts": acts,
        "same": same,
        "verdict": f"{verdict}; drops: {left}",
        "nearest": near,
        "drops": drops,
    }


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _short(value: float) -> str:
    return f"{value:.2g}".replace("e-0", "e-")


def compare_lines(found: Json) -> list[str]:
    """What the command prints."""
    lines = [found["verdict"]]
    if "noise" in found["kl"]:
        lines.append(f"noise: KL {_short(found['kl']['noise'])} of the served base from the file's")
    at = f"{found['positions']} positions of {found['texts']} texts, {found['top']} tokens at each"
    lines.append(f"compared: {at}; {found['server']} at {found['url']}")
    lines += [f"note: {one}" for one in found["notes"]]
    if found["hint"]:
        lines.append(f"hint: {found['hint']}\n  {found['command']}")
    return lines
