"""diff: compare two checkpoints, or two adapters, by blocks of rows, without reading a large tensor
whole."""

from adapterkit.core.options import (
    PROGRESS,
    SHARE,
    SOURCE,
    Progress,
    StrPath,
    argument,
    no_progress,
    number,
    option,
    record,
)
from adapterkit.core.records import Json
from adapterkit.core.verb import Verb, function_of


@record
class Diff(Verb[Json]):
    """Compare two checkpoints, pipelines, adapters or .safetensors files, by key or by module;
    returns what `--json` prints. For a pipeline, and for adapters of several components, names
    begin with the component.

    - `diff`: 1, the version of this document; `kind`: "checkpoints" or "adapters"; `a`, `b`: the
      sources' names and origins
    - `same`: nothing differs by more than `tolerance`, a relative Frobenius error per tensor or
      module, nor a setting that counts
    - `totals`: `compared` and of them `identical` (the same bytes), `equal` (the same values: -0
      and 0, kinds of NaN), `rounded` (one side is the other rounded to its dtype, or a delta
      differs by what float64 arithmetic leaves), `within` the tolerance, `changed`; then `added`
      and `removed`
    - `change`: `norm` ‖A−B‖ and `relative` ‖A−B‖/‖A‖ over all values that differ and were compared
      as numbers, together; null if there are none, or one is not finite
    - `changed`: a list, in A's file order, of `name`, `kind` ("tensor"; in adapters "delta",
      "magnitude", "bias", "replaced", "rows"), `why` ("values", "dtype", "shape"; "rows" if
      `rows_only_a` or `rows_only_b` trained token rows have no partner), `a` and `b` (`dtype` and
      `shape`, or `rank`, `scale`, `shape` and `experts`), and if they can be compared
      `relative_error` ‖A−B‖/‖A‖, `max_abs`, `cosine`, `differing` (the share of elements), `norm`
      ‖A‖, `rank`: {`energy`, `needed`: the smallest rank that keeps this share of ‖A−B‖², null if
      it is above `above`, `estimate`: from a sketch, then never too small}. A number that is not
      finite, or not measured, is null. Integers and fp8 are compared as bytes; if only one side is
      quantized, its weights are compared as they decode to float32, with the format as `dtype`
    - `added`, `removed`: rows that only B, only A has; `notes`: texts
    - `config`: the settings of config.json, or of adapter_config.json, that differ: `name` (dotted
      inside sub-configs), `change` ("added", "removed", "changed"), `a`, `b` (also null if there is
      none) and `decides`: whether it counts as a difference, whatever the tolerance. For models all
      count except dtypes (rounded copies are the same), dropouts, initializers and labels; the
      author of the file, and caches and outputs of a run, are not compared. If transformers knows
      the model, its defaults complete each file. For adapters those count whose effect is not in
      the deltas (`target_parameters`, `layer_replication`, `ensure_weight_tying`, an init that
      changed the base); rank, alpha and similar settings count by their effect

    `rank_for_energy` is 0.9 for checkpoints and 0.99 for adapters; 0 suggests no rank. A stack of
    experts (three axes, "expert" in its key) gets one rank for all of them. Raises `Refused` for
    sources that cannot be compared, and for adapters of other types than LoRA: convert these with
    resize (with their base, because without it a flattened kernel of LoHa or LoKr looks linear).
    """

    runner = "verbs.look.difference:compare_sources"
    command = """Compare two checkpoints, adapters or .safetensors files.

    Checkpoints are compared by key, independent of their shards; a copy rounded to another dtype
    counts as the same. Adapters are compared by their deltas scale·b@a, independent of ranks and
    alphas.

    Columns: relative ‖A−B‖/‖A‖, largest difference, cosine, share of elements that differ, and the
    rank that holds 90 % of the squared singular values of the difference (~: at most that, from a
    sketch). Differing config settings are listed last; settings that change the arithmetic count
    as a difference.

    Exit status: 0 the same; 1 different by more than the tolerance; 2 wrong usage, refused or
    failed.

    \b
    Example:
      adapterkit diff ./base ./tuned
      adapterkit diff ./adapter ./resized --tolerance 1e-3
    """

    a: StrPath = argument(kw_only=False, check=SOURCE)
    b: StrPath = argument(kw_only=False, check=SOURCE)
    tolerance: float = option(
        default=0.0,
        check=number("0 or more", lambda value: value >= 0),
        help="Largest relative error at which tensors count as the same.",
    )
    rank_for_energy: float | None = option(
        default=None,
        check=SHARE,
        metavar="SHARE",
        help="Suggest the rank that keeps this share of the energy of each difference (default: "
        "0.9, for adapters 0.99; 0: no suggestion).",
    )
    progress: Progress = option(default=no_progress, check=PROGRESS)


diff = function_of(Diff)
