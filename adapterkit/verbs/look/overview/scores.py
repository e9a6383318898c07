"""report: the losses that `score` measured, as bars with intervals and as a table."""

from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.errors import Refused
from adapterkit.core.inputs.sources import open_source
from adapterkit.core.options import StrPath
from adapterkit.core.records import Json
from adapterkit.verbs.look.pages import bars, paragraph, table
from adapterkit.verbs.look.tables import score_cells, score_table

VERSION = 1


def read_scores(source: StrPath) -> Json:
    """The document that `score --out` wrote; `Refused` for other files."""
    folder = open_source(source)
    names = list(folder.files())
    document = read_json(folder, names[0]) if len(names) == 1 else {}
    try:
        if document["score"] == VERSION and score_table(document) and scores_section(document):
            return document
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise Refused(
        "no results of score",
        expected="a file that score wrote",
        where=folder.label,
        hint="write one\nadapterkit score MODEL --data texts.jsonl --out scores.json",
        code="AK101",
    )


def scores_section(scores: Json | None) -> list[str]:
    """The parts of the section on scores; none without them."""
    if scores is None:
        return []
    heads, *cells = score_cells(scores)
    data = scores["data"]
    text = f"{data['tokens']:,} tokens of {data['samples']:,} samples, in nats per token."
    if scores["against"]:
        text += f" KL is from {scores['against']}."
    rows = [(row["model"], row["loss"]) for row in scores["rows"]]
    parts = [paragraph(text), bars("loss per token", rows), table(["model", *heads[1:]], cells)]
    return [*parts, *(paragraph(note, "soft") for note in scores["notes"])]
