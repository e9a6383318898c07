"""The report on several jobs, each of which is done or refused on its own: conversions of a list,
steps of a pipeline."""

from collections.abc import Sequence

from adapterkit.core.errors import AdapterkitError
from adapterkit.core.plan import Plan
from adapterkit.core.receipt import Receipt
from adapterkit.core.records import Json

STATES = ("done", "done before", "planned", "refused")
Row = Json  # what is known of the job, its state, and what that state has to say


def report(name: str, rows: Sequence[Row]) -> Json:
    """The rows under this name, and how many of them are in each state."""
    totals = {state: sum(row["state"] == state for row in rows) for state in STATES}
    return {"totals": totals, name: list(rows)}


def outcome(result: Receipt | Plan) -> Row:
    """The state of a job that was carried out, or of one that is planned."""
    if not isinstance(result, Receipt):
        texts = {"warnings": list(result.warnings), "notes": list(result.notes)}
        return {"state": "planned", "totals": result.totals(), **texts}
    notes, pushed = list(result.data["notes"]), result.data.get("pushed")
    if pushed is not None:
        notes += [sent(pushed["repo"])] * result.finished_before + pushed["notes"]
    state = "done before" if result.finished_before and pushed is None else "done"
    return {"state": state, "warnings": result.data.get("warnings", []), "notes": notes}


def sent(repo: str) -> str:
    """The note on a step of which nothing but its push was left to do."""
    return f"finished before: only sent to {repo}"


def refusal(error: AdapterkitError) -> Row:
    return {"state": "refused", "message": str(error), "code": error.code}
