"""Print results on the command line: tables of inspect and diff, lines of a receipt."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import starmap
from statistics import median

from adapterkit.core import dtypes
from adapterkit.core.errors import advised, shown
from adapterkit.core.receipt import kept_shares
from adapterkit.core.records import Json
from adapterkit.verbs.look.heatmaps import NUMBER, blocks, heatmaps_of, module_label

MAX_PROBLEMS = 20  # kinds of problems that are listed; all of them are in the JSON
# dotted ones, and numbers
NAMES = re.compile(r"(?<!\S)\S[^\s.]*+\.\S+|\d+")
MAX_ROWS = 20  # that are listed one by one
GROUP = ["modules", "count", "kind", "rank", "alpha", "scale"]
MODULE = ["module", "rank", "scale", "trained", "norm", "relative", "effective_rank"]
PART = ["part", "class", "parameters", "bytes", "dtypes", "quantization"]
CHANGED = ["changed", "", "relative", "max abs", "cosine", "differ", "rank"]


def inspect_table(result: Json, all_modules: bool = False, width: int = 100) -> str:
    """inspect's result as lines for a terminal of that width; `all_modules`: one per line."""
    lines = [f"{result['kind']} {shown(result['name'])}"]
    metrics = _metrics(result) + (_adapter_metrics(result) if result["kind"] == "adapter" else [])
    lines += [f"  {name:16} {shown(text)}" for name, text in metrics if text]
    modules = result["modules"]
    if modules:
        lines += ["", *_inspect_columns(GROUP, result["groups"])]
    if modules and result["statistics"]:
        related = any(module["relative"] is not None for module in modules)
        names = [name for name in MODULE if related or name != "relative"]
        table = _inspect_columns(names, modules) if all_modules else []
        lines += ["", *(table or blocks(heatmaps_of({"": result}), width))]
        lines += ["", result["intruders"]] if "intruders" in result else []
    elif modules:
        reason = (
            "from the Hub without --download" if "repo" in result["origin"] else "with --headers"
        )
        lines += ["", f"norms and effective ranks: not read {reason}"]
    if "parts" in result:
        lines += ["", *_align([PART, *starmap(_part_cells, result["parts"].items())], left=2)]
    return "\n".join([*lines, "", *_problem_lines(result["problems"])])


def adapters_table(result: Json) -> str:
    """inspect's result for several adapters as lines."""
    adapters, pairs = result["adapters"], result["pairs"]
    own = [["adapter", "modules", "norm", "kept in a sum", "problems"]]
    for one, kept in zip(adapters, pairs["sum"]["retention"], strict=True):
        norms = [module["norm"] for module in one["modules"] if module["norm"] is not None]
        count, norm, problems = len(one["modules"]), math.hypot(*norms), len(one["problems"])
        own.append([shown(one["name"]), str(count), f"{norm:.4g}", _share(kept), str(problems)])
    two = [["", "", "cosine", "opposed signs", "by chance"]]
    for i, j in itertools.combinations(range(len(adapters)), 2):
        cosine, names = pairs["cosines"][i][j], [shown(adapters[n]["name"]) for n in (i, j)]
        chance = None if cosine is None else math.acos(max(-1.0, min(cosine, 1.0))) / math.pi
        text = "-" if cosine is None else f"{cosine:.3f}"
        two.append([*names, text, _share(pairs["opposed"][i][j]), _share(chance)])
    advice = result["advice"]
    lines = [*_align(own, left=1), "", *_align(two, left=2), "", advice["reason"]]
    return "\n".join(lines + [f"try: {advice['command']}"] * bool(advice["command"]))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _part_cells(name: str, result: Json) -> list[str]:
    classes = (result["architecture"] or {}).get("classes") or [""]
    kinds = ", ".join(result["dtypes"])
    found = (result["quantization"] or {}).get("found", "")
    sizes = [f"{result['parameters']:,}", f"{result['bytes']:,}"]
    return [shown(name), shown(classes[0]), *sizes, kinds, shown(found)]


def diff_table(document: Json) -> list[str]:
    """diff's document as lines: a table of the changes, - (only A has it), + (only B has it),
    settings."""
    lines, rows = [], document["changed"]
    if rows:
        lines = _align([CHANGED, *map(_diff_cells, _worst(rows))], left=2)
    for sign, side in (("-", "removed"), ("+", "added")):
        texts = [
            f"{row['name']}  {_sides(row | {'why': side, 'a': row, 'b': row})}"
            for row in document[side]
        ]
        lines += [f"{sign} {text}" for text in grouped(texts)]
    return lines + [_setting_text(row) for row in document["config"]]


def _worst(rows: list[Json]) -> list[Json]:
    """For more rows than a screen shows: the row that differs most of each kind of layer, its name
    with the number of rows that it represents."""
    if len(rows) <= MAX_ROWS:
        return rows
    kinds: dict[str, list[Json]] = {}
    for row in rows:
        kinds.setdefault(NUMBER.sub(".*", f"{row['name']} {_sides(row)}"), []).append(row)
    worst = []
    for alike in kinds.values():
        row = max(alike, key=lambda row: row["relative_error"] or 0)
        more = f" (worst of {len(alike)} layers)" if len(alike) > 1 else ""
        worst.append(row | {"name": row["name"] + more})
    return worst


def grouped(texts: Sequence[str]) -> list[str]:
    """The texts; if they exceed a screen, those that differ only in numbers appear once, with a
    count."""
    if len(texts) <= MAX_ROWS:
        return list(texts)
    counts = Counter(NUMBER.sub(".*", text) for text in texts)
    lines = [f"{text} ({count})" if count > 1 else text for text, count in counts.items()]
    more = len(lines) - MAX_ROWS
    return lines[:MAX_ROWS] + ([f"and {more} more kinds; --json lists all"] if more > 0 else [])


def _align(rows: list[list[str]], left: int) -> list[str]:
    """Rows as lines with aligned columns: the first `left` columns to the left, others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        padded = [cell.ljust(n) if i < left else cell.rjust(n) for i, (cell, n) in cells]
        lines.append("  ".join(padded).rstrip())
    return lines


def fit_table(document: Json) -> list[str]:
    """A fit's losses on held-out samples, its steps and weights; for a dry run, its sizes."""
    notes = [f"note: {note}" for note in document["notes"]]
    if "best" in document:
        return _search_table(document)
    if "losses" not in document:
        totals = document["totals"].items()
        return [*_align([[n.replace("_", " "), f"{v:,}"] for n, v in totals], 1), *notes]
    steps = {step["per"]: step for step in document["steps"]}
    table = [["held out, nats per token", *document["files"], "value", ""]]
    for row in document["losses"]:
        step, text = steps.get(row["row"]), ""
        if step is not None:
            verdict = "kept" if step["kept"] else "not kept"
            text = f"{step['gain']:+.4f} ± {step['error']:.4f}, {verdict}"
        name = f"a weight for each {row['row']}" if step else row["row"]
        values = [f"{value:.4f}" for value in (*row["files"], row["value"])]
        table.append([name, *values, text])
    spread = [["weights", "mean", "spread", "least", "most"]]
    for one in document["spread"]:
        values = (one[name] for name in ("mean", "std", "low", "high"))
        spread.append([one["adapter"], *(f"{value:.3f}" for value in values)])
    written = document["written"]
    what = "the start" if written["per"] == "start" else f"weights for each {written['per']}"
    last = f"{document['out']}: {what}; {written['reason']}"
    return [*_align(table, 1), "", *_align(spread, 1), "", last, *notes]


def score_table(document: Json) -> list[str]:
    """The losses of models, the least first, and their distances from a reference."""
    data, against = document["data"], document["against"]
    texts = [f"{data['tokens']:,} tokens of {data['samples']:,} samples, nats per token"]
    texts += [f"KL from {against}"] if against else []
    notes = [f"note: {note}" for note in document["notes"]]
    return [*_align(score_cells(document), 1), "", "; ".join(texts), *notes]


def score_cells(document: Json) -> list[list[str]]:
    """The heads and rows of a table of scores."""
    against = document["against"]
    far = ["KL per token", "same top 1"] if against else []
    table = [["", "loss", "95 %", "perplexity", *far, "more than the best"]]
    for row in document["rows"]:
        loss, more = row["loss"], row.get("more")
        cells = [f"{loss['value']:.4f}", _within(loss), f"{row['perplexity']:.4g}"]
        if against:
            cells += [f"{row['kl']['value']:.3g}", f"{row['same_top1']:.2%}"]
        text = "" if more is None else f"{more['value']:+.4f}"
        text += ", within noise" if more is not None and more["within_noise"] else ""
        table.append([row["model"], *cells, text])
    return table


def _within(estimate: Json) -> str:
    if estimate["low"] is None:
        return "-"
    return f"± {(estimate['high'] - estimate['low']) / 2:.4f}"


def _search_table(document: Json) -> list[str]:
    """The best candidates of a search so far."""
    table, best = [["evaluation", "score", "weights"]], float("-inf")
    for number, one in enumerate(document["evaluations"], 1):
        if one["score"] > best:
            best = one["score"]
            weights = ", ".join(f"{weight:g}" for weight in one["weights"])
            table.append([str(number), f"{best:g}", weights])
    last = f"{document['out']}: the best of {len(document['evaluations'])} evaluations"
    return [*_align(table, 0), "", last]


def _metrics(result: Json) -> list[tuple[str, str]]:
    """(name, text) of all kinds of results; those with an empty text are not printed."""
    count = len(result["shards"])
    kinds = ", ".join(f"{name} {size['parameters']:,}" for name, size in result["dtypes"].items())
    is_known = kinds or result["readable"]
    parameters = f"{result['parameters']:,}" if is_known else "not known"
    architecture, tied, quantization = (
        result[key] or {} for key in ("architecture", "tied", "quantization")
    )
    names = [*architecture.get("classes", []), architecture.get("model_type")]
    metrics = [
        ("architecture", ", ".join(str(name) for name in names if name)),
        ("parameters", parameters + (f" ({kinds})" if kinds else "")),
        ("bytes", f"{result['bytes']:,} in {count} file{'s' if count != 1 else ''}"),
        ("quantization", quantization.get("found", "none" if result["kind"] == "base" else "")),
    ]
    if tied:
        setting = {True: "yes", False: "no", None: "the config does not say"}[tied["config"]]
        head = f"a head is {'' if tied['head_stored'] else 'not '}stored"
        metrics.append(("tied", f"{setting}; {head}"))
    if result["kind"] == "base":
        loads = result["loads"]
        unknown = "not known: missing parameters were not looked for"
        metrics.append(("loads as", loads["class"] if loads else unknown))
    return metrics


def _adapter_metrics(result: Json) -> list[tuple[str, str]]:
    saved = result["modules_to_save"]
    layout = [str(result[key]) for key in ("format", "peft_type", "peft_version") if result[key]]
    flags = [
        f"{name} {value}"
        for name, value in result["flags"].items()
        if value not in (None, False, "none", [])
    ]
    tokens = [f"{entry['module']} ({len(entry['rows'])} rows)" for entry in result["tokens"]]
    return [
        ("format", " ".join(layout)),
        ("base", str(result["base"] or "not said")),
        ("flags", ", ".join(flags)),
        ("modules_to_save", ", ".join(map(str, saved)) if isinstance(saved, list) else str(saved)),
        ("replaced", ", ".join(result["replaced"])),
        ("trained tokens", ", ".join(tokens)),
    ]


def _inspect_columns(names: list[str], rows: list[Json]) -> list[str]:
    titles = [name.replace("_", " ") for name in names]
    return _align([titles, *([_inspect_cell(row, name) for name in names] for row in rows)], left=1)


def _inspect_cell(row: Json, name: str) -> str:
    value = module_label(row) if name == "module" else row[name]
    if value is None:
        return "?"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else shown(value)


def _problem_lines(problems: list[dict[str, str]]) -> list[str]:
    """Problems in their four parts. Among those that differ only in dotted names and numbers, the
    first is listed and the others are counted."""
    kinds: dict[str, list[dict[str, str]]] = {}
    for problem in problems:
        kinds.setdefault(NAMES.sub("#", problem["problem"]), []).append(problem)
    lines = [f"problems: {len(problems) or 'none'}"]
    for first, *others in list(kinds.values())[:MAX_PROBLEMS]:
        found = f"{first['where']}: {first['problem']}" if first["where"] else first["problem"]
        parts = [f"{found} [{first['code']}]"]
        parts += [f"expected: {first['expected']}"] if first["expected"] else []
        parts += [advised(first)] if first["hint"] else []
        lines.append("- " + "\n  ".join(parts))
        lines += [f"  and {len(others)} more like it"] if others else []
    more = len(kinds) - MAX_PROBLEMS
    return lines + ([f"and {more} more kinds of problems; --json lists all"] if more > 0 else [])


def _setting_text(row: Json) -> str:
    a = "not set" if row["change"] == "added" else shown(repr(row["a"]))
    b = "not set" if row["change"] == "removed" else shown(repr(row["b"]))
    return f"{shown(row['name'])}: {a} -> {b}" + ("" if row["decides"] else "  (does not count)")


def _diff_cells(row: Json) -> list[str]:
    share = row["differing"]
    return [
        row["name"],
        _sides(row),
        _error_text(row),
        "-" if row["max_abs"] is None else f"{row['max_abs']:.2e}",
        "-" if row["cosine"] is None else f"{row['cosine']:.6f}",
        "-" if share is None else f"{share:.2%}" if share >= 1e-4 else f"{share:.0e}",
        _rank_text(row["rank"]),
    ]


def _sides(row: Json) -> str:
    """Kind, dtype (or rank and scale) and shape of A, then -> and the differences of B."""
    one, other = _side(row["a"]), _side(row["b"])
    differing = other if row["a"]["shape"] != row["b"]["shape"] else other[:1]
    words = [*one, *(["->", *differing] if one != other else [])]
    if row["why"] == "rows":
        words.append(f"({row['rows_only_a']} only in A, {row['rows_only_b']} only in B)")
    return " ".join(words if row["kind"] == "tensor" else [row["kind"], *words])


def _side(side: Json) -> list[str]:
    values = side["dtype"] if "dtype" in side else f"r {side['rank']} scale {side['scale']:g}"
    return [values, "x".join(map(str, side["shape"])) or "scalar"]


def _error_text(row: Json) -> str:
    if row["relative_error"] is not None:
        return f"{row['relative_error']:.2e}"
    floats = row["a"].get("dtype", "F32") in dtypes.FLOATS
    if row["why"] in ("shape", "dtype") or not floats:
        return "-"
    return "inf" if row["norm"] == 0 else "nan"


def _rank_text(rank: dict | None) -> str:
    if rank is None:
        return "-"
    if rank["needed"] is None:
        return f">{rank['above']}"
    return f"{'~' * rank['estimate']}{rank['needed']}"


def outcomes(receipt: Json) -> Iterator[str]:
    """Yield a receipt's metrics in a few lines: the choice of a rounding, energy kept, survival of
    the change, relative errors."""
    metrics = receipt["parameters"]
    if "choices" in receipt:
        yield from [*score_table(receipt["choices"]), ""]
    named = lambda name: {key: metric[name] for key, metric in metrics.items() if name in metric}
    refits = {key: one for key, one in metrics.items() if {"energy", "norm"} <= one.keys()}
    total = math.hypot(*(metric["norm"] for metric in refits.values()))
    if total and min(named("energy").values()) < 0.9995:
        share = sum(one["energy"] * (one["norm"] / total) ** 2 for one in refits.values())
        text = f"truncation kept {share:.1%} of the squared norm of {len(refits)} modules"
        yield f"{text}; {_lowest(named('energy'))}"
    if reduced := named("intruders"):
        yield f"reduced {sum(reduced.values())} intruder dimensions of {len(reduced)} modules"
    unfitted = {key: metric for key, metric in metrics.items() if "energy" not in metric}
    compensated = {k: one["output_error"] for k, one in unfitted.items() if "output_error" in one}
    if compensated:  # the survival of each element means nothing then
        worst = max(compensated, key=lambda key: compensated[key])
        text = f"relative error of the outputs: median {median(compensated.values()):.4f} over"
        plain = median(named("unweighted_output_error").values())
        text = f"{text} {len(compensated)} weights, {plain:.4f} if rounded to nearest"
        yield f"{text}; worst: {compensated[worst]:.4f} of {shown(worst)}"
    if survived := kept_shares(metrics):
        text = f"median {median(survived.values()):.1%} of the adapter's change kept after rounding"
        yield f"{text}, over {len(survived)} tensors; {_lowest(survived)}"
    errors = {key: metric["error"] for key, metric in unfitted.items() if "error" in metric}
    if errors:
        after = named("error_after")
        helped = {key: errors[key] for key in errors if key in after}
        worst = max(errors, key=lambda key: errors[key])
        error = f"median {median(errors.values()):.4f} over {len(errors)} weights"
        if helped:
            rest = f"; {error} in all" if len(helped) < len(errors) else ""
            error = f"median {median(helped.values()):.4f} over {len(helped)} weights with factors"
            error = f"{error}, {median(after.values()):.4f} with the adapter{rest}"
        yield f"relative error: {error}; worst: {errors[worst]:.4f} of {shown(worst)}"


def _lowest(shares: dict[str, float]) -> str:
    key = min(shares, key=lambda key: shares[key])
    return f"worst: {shares[key]:.1%} of {shown(key)}"
