"""compare: ask a server and the files for log-probabilities of the same tokens, and find the
variant of the adapter that is nearest to what is served."""

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterkit.core.adapter.peft import scan_adapter
from adapterkit.core.adapter.record import EMBEDDINGS, Adapter
from adapterkit.core.adapter.selection import selectable_names
from adapterkit.core.calls import with_paths
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.commands import command
from adapterkit.core.engine.device import pick_device
from adapterkit.core.errors import AdapterkitError, Refused, advice, alternatives, listed, shown
from adapterkit.core.inputs.sources import if_given, open_adapter, open_model
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.options import files
from adapterkit.core.records import Json
from adapterkit.verbs.score.compare_verb import Compare
from adapterkit.verbs.score.run import run
from adapterkit.verbs.score.servers import CODE, LogProbs, Server, connect
from adapterkit.verbs.score.variants import Variant, stored, with_adapters
from adapterkit.verbs.stats.data.records import IGNORED, Record, draw_records
from adapterkit.verbs.stats.data.samples import Sample, Samples
from adapterkit.verbs.stats.model.stored_model import StoredModel
from adapterkit.verbs.stats.plan import samples_of

VERSION = 1
SMALLEST = 1e-9  # of a probability: rounding makes sums of them differ by more
FLOOR = 1e-8  # of a divergence, below which rounding to float32 decides
LIMIT = 0.01  # divergence of a model that is served alone, above which it is another one
MEMORY = 1 << 30  # bytes of activations in memory
TEXTS = (
    "The river rises in the hills north of the town and reaches the sea after forty miles.",
    "Question: How many minutes are there in three hours? Answer: There are 180 minutes.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Dear Ms. Miller, thank you for your letter. We will send the books on Monday.",
    "In 1905 the company opened its second factory and hired two hundred workers.",
    "To make the soup, cut the onions, fry them in butter and add a litre of water.",
    '{"name": "Anna", "age": 31, "languages": ["English", "French"]}',
    "She opened the window, because the room was warm and the birds had begun to sing.",
)
ATTENTION, MLP = ("attn", "attention"), ("mlp", "ffn", "feed_forward", "expert", "moe")


@dataclass(frozen=True)
class Question:
    """A sample that a server is asked about, with labels at the asked positions alone."""

    sample: Sample
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Guess:
    """A mistake that a server could make with an adapter."""

    words: str
    weight: float = 1.0
    drops: tuple[str, ...] = ()  # kinds of modules whose deltas it leaves out


def compare_server(options: Compare) -> Json:
    """The document of `compare`."""
    key = os.environ[options.api_key_env] if options.api_key_env else None
    server = connect(options.url, key)
    name, base = server.find(options.served)
    if options.adapter is not None and base is None:
        raise _no_adapter(server, name)
    folder = open_model(options.model)
    adapter = if_given(lambda path: open_adapter(path, folder, for_merge=True), options.adapter)
    with tempfile.TemporaryDirectory() as work:
        own = stored(folder)
        samples, notes = _samples(options, own, Path(work))
        if server.longest is not None:
            samples, notes = _cut(samples, server.longest - 1, notes)
        questions = list(_questions(samples, server.most))
        top = options.top or server.top
        names = (name,) if adapter is None else (base or "", name)
        served = {one: _asked(server, one, questions, top) for one in names}
        compared = Comparison(options, folder, adapter, questions, samples, served, Path(work))
        found = compared.adapter(name, base or "") if adapter else compared.model(name, own)
    return {
        "compare": VERSION,
        "server": server.title,
        "url": options.url,
        "name": name,
        "base": base if adapter else None,
        **found,
        **advice("" if found["same"] else _next(options, server)),
        "texts": len(questions),
        "positions": sum(len(one.positions) for one in questions),
        "top": top,
        "notes": notes,
    }


def _no_adapter(server: Server, name: str) -> Refused:
    adapters = [shown(one) for one, parent in server.parents.items() if parent is not None]
    expected = f"an adapter: {alternatives(name, adapters)}" if adapters else "a server with one"
    hint = "leave --adapter out to compare the model alone"
    hint = hint if adapters else f"start the server with the adapter, or {hint}"
    problem, where = f"{shown(name)!r} is a model, not an adapter", server.connection.url
    return Refused(problem, expected=expected, where=where, hint=hint, code=CODE)


def _next(options: Compare, server: Server) -> str:
    """The advice if something else is served."""
    if options.adapter is None or not server.engine:
        return ""
    check = {"for": server.engine, "base": "MODEL"}
    hint = "compare the adapter with the server's rules\n"
    return with_paths(hint + command("adapterkit check", "ADAPTER", **check), options)


# -- what is asked ---------------------------------------------------------------------------------


def _samples(options: Compare, variant: Variant, work: Path) -> tuple[Samples, list[str]]:
    """The samples, by the model's tokenizer, and notes on them."""
    records, notes = [Record("text", {"text": text}, "a built-in text") for text in TEXTS], []
    if options.data:
        drawn = draw_records(files(options.data), options.samples, options.seed)
        records, notes = drawn.records, drawn.notes
    with Sources(variant.folders, {}) as sources:
        model = StoredModel(variant.base, sources, torch.device("cpu"), buffers=False).model
    (samples,) = samples_of(variant.tokenizer(work), model, [records], options.length)
    if samples.has_decoder:
        raise Refused(
            f"{type(model).__name__} has an encoder and a decoder",
            expected="a model that continues a text",
            where=variant.folders[0].label,
            hint="give a decoder model",
            code="AK902",
        )
    builtin = "compared on built-in texts: an adapter for other texts may hardly act on them"
    return samples, [*notes, *samples.notes, *([] if options.data else [builtin])]


def _cut(samples: Samples, length: int, notes: list[str]) -> tuple[Samples, list[str]]:
    """Samples of at most `length` tokens, and the notes with one on those that were longer."""
    count = sum(len(one.tokens) > length for one in samples.samples)
    cut = [replace(s, tokens=s.tokens[:length], labels=s.labels[:length]) for s in samples.samples]
    about = f"{count} texts are cut to {length} tokens, because the server's context ends there"
    return replace(samples, samples=cut), [*notes, about] if count else notes


def _questions(samples: Samples, most: int) -> Iterator[Question]:
    """Yield what to ask: all positions whose next token counts, or `most` of them, at equal
    distances."""
    own = [[n for n, x in enumerate(s.labels[1:]) if x != IGNORED] for s in samples.samples]
    total = sum(map(len, own))
    if not total:
        raise Refused(
            "no token of these samples has one before it",
            expected="samples of two tokens or more",
            where="--data",
            hint="give longer texts",
            code="AK901",
        )
    count = min(most, total)
    chosen, before = {total * n // count for n in range(count)}, 0
    for sample, positions in zip(samples.samples, own, strict=True):
        asked = [at for n, at in enumerate(positions, before) if n in chosen]
        before += len(positions)
        if asked:
            counts = {at + 1 for at in asked}
            labels = (x if n in counts else IGNORED for n, x in enumerate(sample.labels))
            yield Question(replace(sample, labels=tuple(labels)), tuple(asked))


def _asked(server: Server, name: str, questions: Iterable[Question], top: int) -> list[LogProbs]:
    """The served log-probabilities at all positions."""
    return [
        one
        for question in questions
        for one in server.predictions(name, question.sample.tokens, question.positions, top)
    ]


# -- what the files predict ------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Served predictions by name, and the files that they are compared with."""

    options: Compare
    folder: Folder
    given: Folder | None  # the adapter's
    questions: list[Question]
    samples: Samples
    served: dict[str, list[LogProbs]]
    work: Path

    def model(self, name: str, own: Variant) -> Json:
        """The findings on a model without an adapter."""
        kl = divergence(self.served[name], self.predicted(own))
        same = kl <= LIMIT
        words = f"is this model: {_yes(same)} (KL {_short(kl)} from the file)"
        found = {"acts": None, "same": same, "verdict": words, "nearest": None, "drops": []}
        return found | {"kl": {"file": kl}, "variants": []}

    def adapter(self, name: str, base: str) -> Json:
        """The findings on an adapter. The variants run only if what is served is not the adapter
        within the rounding of the server."""
        served, served_base = self.served[name], self.served[base]
        without, own = self.predicted(stored(self.folder)), self.predicted(self.variant(Guess("")))
        kl = {
            "file": divergence(served, own),
            "base": divergence(served, without),
            "served_base": divergence(served, served_base),
            "noise": divergence(served_base, without),
            "effect": divergence(own, without),
        }
        assert self.given is not None
        rows: dict[Guess, float | None] = dict.fromkeys(guesses(scan_adapter(self.given)[0]))
        if kl["file"] > min(1.5 * max(kl["noise"], FLOOR), kl["effect"] / 100):
            rows = {guess: self.distance(guess, served) for guess in rows}
        variants = [{"name": guess.words, "kl": value} for guess, value in rows.items()]
        return judged(kl, rows) | {"kl": kl, "variants": variants}

    def variant(self, guess: Guess) -> Variant:
        assert self.given is not None
        return with_adapters(self.folder, [(self.given, guess.weight)], exclude=guess.drops)

    def distance(self, guess: Guess, served: list[LogProbs]) -> float | None:
        """The divergence of what is served from a variant; None if a merge refuses it, for example
        because fully trained values have no other weight than 1."""
        try:
            variant = self.variant(guess)
        except AdapterkitError:
            return None
        return divergence(served, self.predicted(variant))

    def predicted(self, variant: Variant) -> list[LogProbs]:
        """The log-probabilities, by a variant of the files, of all tokens that are served anywhere
        at the same position."""
        asked = [sorted(set().union(*its)) for its in zip(*self.served.values(), strict=True)]
        starts = [0]
        for question in self.questions:
            starts.append(starts[-1] + len(question.positions))
        found: list[LogProbs] = [{}] * len(asked)

        def measure(number: int, logits: Tensor, labels: Tensor, *_: Any) -> None:
            for at, row in enumerate(logits.double().log_softmax(-1).cpu(), starts[number]):
                ids = asked[at]
                _check_ids(ids, len(row), self.folder, self.options.url)
                found[at] = dict(zip(ids, row[ids].tolist(), strict=True))

        samples = Samples([one.sample for one in self.questions], self.samples.pad, [])
        device = pick_device(self.options.device)
        how: Json = {"device": device, "dtype": torch.float32, "work": self.work, "memory": MEMORY}
        run(variant, samples, measure, step=lambda: self.options.progress(1), **how)
        return found


def _check_ids(ids: Sequence[int], vocabulary: int, folder: Folder, url: str) -> None:
    if ids[-1] >= vocabulary or ids[0] < 0:
        raise Refused(
            f"the server lists token id {ids[-1]}",
            expected=f"ids from 0 to {vocabulary - 1}, the vocabulary of {folder.name}",
            where=url,
            hint="give the model that the server has loaded",
            code=CODE,
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
    it is within a quarter of the effect. It is another variant: that is nearer than the file and,
    by a factor of 4, than the base."""
    noise, effect = max(kl["noise"], FLOOR), kl["effect"]
    acts = kl["served_base"] > max(min(max(noise, effect / 100), effect / 4), FLOOR)
    ran = {guess: value for guess, value in rows.items() if value is not None}
    best, least = min(ran.items(), key=lambda row: row[1], default=(None, math.inf))
    near, same, drops, why = None, None, [], ""
    if effect < FLOOR:
        why = "it cannot be decided, because the adapter changes nothing on these texts"
    elif kl["file"] <= min(least, kl["base"]) + noise / 2 and kl["file"] <= effect / 4:
        same, near = True, "the adapter"
    elif best is not None and 4 * max(least, noise / 2) < min(effect, kl["base"], 4 * kl["file"]):
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
