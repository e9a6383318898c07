"""`verify` checks an output against its receipt: every byte is hashed. With the inputs, sampled
rows are recomputed in float64."""

from functools import partial
from typing import Any, cast

from adapterkit.core.checkpoint.folder import SingleFile
from adapterkit.core.errors import Damaged, Problems, Refused, listed, shown
from adapterkit.core.inputs.base_door import Base, kind_of
from adapterkit.core.inputs.sources import (
    if_given,
    open_adapter,
    open_model,
    open_source,
    open_statistics,
    open_weighted,
)
from adapterkit.core.options import flag_of
from adapterkit.core.output.stage import RECEIPT
from adapterkit.core.plan import Plan
from adapterkit.core.receipt import AGAIN, read_receipt
from adapterkit.core.records import FINITE, TEXT, Json, entries, list_of, problems, read, table_of
from adapterkit.core.registry import load
from adapterkit.core.verify.file_checks import check_files
from adapterkit.core.verify.verb import Verify
from adapterkit.doors import CHECKS


def verify_output(verify: Verify) -> Json:
    """Return the counts that `verify` reports of an output."""
    adapters, progress, out = verify.adapters, verify.progress, open_source(verify.folder)
    receipt = read_receipt(out)
    base = kind_of(open_model(verify.base)) if verify.base else None
    variant, layout = map(receipt["recipe"]["options"].get, ("variant", "expert_layout"))
    if base is not None and (own := base.own("open adapters")):
        sources = own(base, adapters, variant)
    else:
        folder = base and base.folder
        opener = partial(open_adapter, base=folder, for_merge=True, expert_layout=layout)
        sources = open_weighted(adapters, opener)
    if bool(base) != bool(sources):
        raise Refused(
            "--base without --adapter" if base else "--adapter without --base",
            expected="both, or neither",
            where="options",
            hint="give both to recompute rows of a merge",
            code="AK102",
        )
    file = getattr(out, "single", None)
    shared = file is not None and len(receipt["files"]) > 1
    out = cast(SingleFile, out).containing_folder() if shared else out
    result = check_files(out, receipt, progress, shared=shared) | {"rows": 0, "tensors": 0}
    if base is not None:
        from adapterkit.core.verify.row_checks import check_rows  # imports torch

        plan = _plan_again(receipt, verify, base, sources, file)
        result |= check_rows(out, plan, _hint(receipt, plan))
    measured = load(CHECKS["score"])(verify, receipt) if verify.data else None
    return result | ({"score": measured} if measured else {})


def _hint(receipt: dict, plan: Plan) -> str:
    """Return the hint for differing rows: the base may have contained an adapter that the given one
    lacks."""
    earlier, given = receipt.get("held"), plan.decisions.get("held", [])
    earlier = earlier if isinstance(earlier, list) else []
    names = [str(one.get("name")) for one in earlier if isinstance(one, dict) and one not in given]
    if not names and plan.warnings and plan.warnings[0] not in receipt["warnings"]:
        return f"{plan.warnings[0]}: give the base of the merge"
    if not names:
        return AGAIN
    return (
        f"merged twice? By the receipt, the base already contained {listed(names)}: give that base"
    )


# further fields of a merge's receipt
OF_MERGE = entries({
    "recipe": entries({
        "options": entries({"weights": list_of(FINITE)}),
        "inputs": list_of(entries({"files": table_of(TEXT, entries({"header": TEXT}))})),
    })
})  # fmt: skip


def _plan_again(
    receipt: dict, verify: Verify, base: Base, sources: list[tuple[Any, float]], file: str | None
) -> Plan:
    """Return the plan that made the output, from the receipt's options and the same inputs."""
    from adapterkit.core.inputs.weights_file import weights_in
    from adapterkit.core.merge.plan import importance_of, plan_merge
    from adapterkit.core.merge.verb import MergeOptions

    verb = receipt["recipe"]["verb"]
    if verb != "merge":
        hint = "remove --base and --adapter: hashes and keys are checked without them"
        raise Refused(
            f"this is an output of {shown(verb)}: its arithmetic is not recomputed",
            expected="an output of merge",
            where="--base, --adapter",
            hint=hint,
            code="AK107",
        )
    Problems(problems(OF_MERGE, receipt, RECEIPT, hint=AGAIN, kind=Damaged)).raise_all()
    options = dict(receipt["recipe"]["options"])
    weights = options.pop("weights")
    if len(sources) != len(weights):
        raise Refused(
            f"{len(sources)} adapters were given, {len(weights)} were merged",
            expected=f"{len(weights)} adapters",
            where="--adapter",
            hint="give all of the merge, in its order",
            code="AK107",
        )
    pairs = [(folder, weight) for (folder, _), weight in zip(sources, weights, strict=True)]
    statistics = if_given(open_statistics, verify.stats)
    given = if_given(importance_of, verify.imatrix)
    if (given and given.sha256) != options.pop("imatrix", None):
        raise Refused(
            "another importance matrix than that of the merge, or none of the two",
            expected="the same file",
            where="--imatrix",
            hint="give the file of the merge",
            code="AK107",
        )
    table = options.pop("weights_file", None)
    chosen = None if table is None else weights_in(table, RECEIPT)
    how = read(MergeOptions, options, RECEIPT, hint=AGAIN, name=flag_of, kind=Damaged)
    planner = base.own("merge of folders") or plan_merge
    plan = planner(base, pairs, how, statistics, file=file, imatrix=given, weights=chosen)
    check_inputs(plan, receipt)
    return plan


def check_inputs(plan: Plan, receipt: dict) -> None:
    """`Refused` with every input of the plan that is not the receipt's."""
    errors, entered = Problems(where=RECEIPT, code="AK107"), receipt["recipe"]["inputs"]
    if len(entered) != len(plan.folders):
        expected = f"{len(plan.folders)}, one for each folder"
        errors.add(f"{len(entered)} inputs", expected, AGAIN, kind=Damaged)
        errors.raise_all()
    for number, entry in enumerate(entered):
        for name, recorded in entry["files"].items():
            if plan.headers.get((number, name)) != recorded["header"]:
                role = "--base" if number == 0 else "--adapter"
                errors.add(
                    f"{role} {plan.folders[number].name} is not what was merged: "
                    f"{shown(name)} differs",
                    "the inputs of the merge",
                    f"give the {role.strip('-')} of the merge",
                )
    errors.raise_all()
