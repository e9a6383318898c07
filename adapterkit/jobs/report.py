"""The report on several jobs, each of which is done or refused on its own: conversions of a list,
steps of a pipeline."""

from collections.abc import Sequence
from typing import Any

from adapterkit.errors import AdapterkitError
from adapterkit.plan import Plan
from adapterkit.receipt import Receipt
from adapterkit.statistics.plan import StatisticsPlan

STATES = ("done", "done before", "planned", "refused")
Row = dict[str, Any]  # what is known of the job, its state, and what that state has to say


def report(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The rows under this name, and how many of them are in each state."""
    totals = {state: sum(row["state"] == state for row in rows) for state in STATES}
    return {"totals": totals, name: list(rows)}


def outcome(result: Receipt | Plan | StatisticsPlan) -> Row:
    """The state of a job that was carried out, or of one that is planned."""
    if not isinstance(result, Receipt):
        return {"state": "planned", "totals": result.totals(), "notes": list(result.notes)}
    state = "done before" if result.finished_before else "done"
    return {"state": state, "notes": result.data["notes"]}


def refusal(error: AdapterkitError) -> Row:
    return {"state": "refused", "message": str(error)}
