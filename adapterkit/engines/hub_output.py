"""Outputs on the Hub: a plan runs in a folder of this machine, and what it gives is uploaded as one
commit."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from adapterkit.engines.local import local
from adapterkit.engines.run_options import RunOptions
from adapterkit.execute import run
from adapterkit.hub.push import push
from adapterkit.plan import Plan
from adapterkit.receipt import Receipt


def run_to_hub(
    plan: Plan, options: RunOptions, check: Callable[[Path], object] | None
) -> Receipt | Plan:
    """Run a plan whose output is the repository `options.out`, hf://org/name."""
    if options.dry_run:
        return plan
    repo = str(options.out).removeprefix("hf://")
    with tempfile.TemporaryDirectory() as work:
        receipt = run(
            plan,
            Path(work, "out"),
            local(options.device),
            hash=options.hash,
            check=check,
            progress=options.progress,
        )
        receipt.data["pushed"] = push(receipt.out, repo)
        return receipt
