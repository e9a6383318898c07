"""What the plans of the golden jobs say; as a program, those of the current folder, as JSON."""

import hashlib
import json
from pathlib import Path
from typing import Any

from adapterkit.core.plan import Plan
from adapterkit.core.receipt import digest, public_recipe
from tests.golden import jobs


def said(plan: Plan) -> dict[str, Any]:
    """All that ranks and the receipt take from a plan."""
    document = json.loads(json.dumps({"recipe": plan.recipe(), "decisions": plan.decided()}))
    files = plan.written_files()
    return {
        "fingerprint": digest(public_recipe(document["recipe"])),
        "decisions": document["decisions"],
        "headers": [hashlib.sha256(shard.layout.header).hexdigest() for shard in plan.shards],
        "steps": [repr(step) for shard in plan.shards for step in shard.steps],
        "tasks": [repr(task) for shard in plan.shards for task in shard.tasks],
        "files": {n: str(f) if isinstance(f, bytes) else "" for n, f in files.items()},
        "totals": plan.totals(),
        "notes": list(plan.notes),
    }


def all_plans() -> dict[str, dict[str, Any]]:
    """{golden job: what its plan says}, planned in the current folder."""
    plans = {}
    for job in jobs.WRITING:
        plan = jobs.call(job, out=Path(f"planned-{jobs.output_of(job)}"), dry_run=True)
        plans[job.name] = said(plan)
    return plans


if __name__ == "__main__":
    print(json.dumps(all_plans()))
