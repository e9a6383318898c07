"""report: adapters, their relations, and the result of their merge, as one HTML page."""

from adapterkit.core.options import (
    FILE,
    FLAG,
    PROGRESS,
    SOURCE,
    UNWEIGHTED,
    Progress,
    Sources,
    StrPath,
    argument,
    no_progress,
    option,
    record,
)
from adapterkit.core.records import Json
from adapterkit.core.shared_options import base_option, statistics_option, weights_option
from adapterkit.core.verb import Verb, function_of


@record
class Report(Verb[Json]):
    """Write one HTML page on adapters, on how they go together, and on the result of their merge,
    and return its numbers, which `--json` prints:

    - `report`: 1, the version of this document
    - `adapters`: for each `name`, `format`, `peft_type`, `base`, `rank`, `alpha`, `scale` (null if
      modules differ), `modules`, `bytes`, `norm` (Frobenius, of all deltas), `relative` (the median
      over modules of ‖delta‖/‖W‖, with `base`), `stable_rank` (median of ‖delta‖²/σ₁²), `rank_90`,
      `rank_99` (the largest over modules of the rank that keeps this share of the squared singular
      values), `problems` as in `inspect`, and modules whose delta is zero; a pipeline's adapter is
      one for each of its models
    - `heatmaps`: `rows` (layers), `columns` (modules), and `tables`: for each adapter and `measure`
      ("relative" or "norm", "effective_rank", "share" of the squared norm) the values, null if
      there is no such module
    - `spectra`: for each adapter and kind of module (its name without numbers) `median`, `low`,
      `high` (10 and 90 % over its modules) of the singular values
    - `ranks`: for each adapter and rank, the `energy` that all modules keep together and the
      `bytes` of the file
    - `pairs`: null for one adapter; matrices over all modules that two adapters share: `cosines`,
      `inputs` and `outputs` (overlap of the spaces of a's rows and b's columns, 0 to 1), `opposed`
      (share of sampled elements with opposed signs), with `stats` also `output_cosines` (on the
      inputs of the statistics); `layers`: cosines by layer; `sum`: `norm`, `independent` (the root
      of the sum of squares: equal for orthogonal deltas) and `retention` of each adapter, ⟨sum,
      delta⟩ / ‖delta‖²
    - `weights`: for a file of weights `per`, `default`, and by layer and module `rows`, `columns`
      and `tables` (the weights of each adapter, for directions their mean); `fit`: for weights that
      `fit` chose its `files`, `losses`, `steps`, `written` and `seconds`; or null
    - `outcome`: the verb, totals, metrics by tensor and the 20 `worst` of the receipt of `result`;
      or null
    - `scores`: the document of `score` in the file `scores`, or null
    - `advice`: one `command` with its `reason`; `loading`: commands by program

    Raises `Refused` if an adapter cannot be read or `out` is a file; with `overwrite` an older page
    is replaced.
    """

    runner = "verbs.look.overview.page:write_report"
    command = """Write an HTML page with pictures of adapters.

    One file without scripts. It shows problems first, then the norms and ranks of all modules,
    singular values, and how much of each adapter a sum would keep; for a finished output, also how
    much was lost.

    \b
    Example:
      adapterkit report ADAPTER --out report.html
      adapterkit report style skill --base BASE --result merged --out report.html
    """

    adapters: Sources = argument(
        kw_only=False, default=(), check=UNWEIGHTED, metavar="ADAPTER...", unless="weights"
    )
    out: StrPath = option(check=FILE, metavar="FILE.html", help="HTML page to write.")
    base: StrPath | None = base_option(
        "The adapters' base, to show norms relative to the norms of its weights."
    )
    result: StrPath | None = option(
        default=None,
        check=SOURCE,
        metavar="DIR",
        help="Output that was made from the adapters, to show the metrics of its tensors.",
    )
    scores: StrPath | None = option(
        default=None,
        check=SOURCE,
        metavar="FILE.json",
        help="Losses that `adapterkit score --out` wrote, to show them as bars.",
    )
    stats: StrPath | None = statistics_option(
        "Statistics with covariances of the base's inputs, to show cosines of the adapters' "
        "outputs."
    )
    weights: StrPath | None = weights_option()
    overwrite: bool = option(default=False, check=FLAG, help="Replace an earlier page.")
    progress: Progress = option(default=no_progress, check=PROGRESS)


report = function_of(Report)
