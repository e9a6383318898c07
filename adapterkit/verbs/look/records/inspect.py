"""inspect: the contents of a checkpoint or an adapter, from headers and JSON, and on request from
the factors."""

from adapterkit.core.options import (
    FILE,
    FLAG,
    PROGRESS,
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
from adapterkit.core.shared_options import base_option
from adapterkit.core.verb import Verb, function_of


@record
class Inspect(Verb[Json]):
    """Return the contents of a base, an adapter or a .safetensors file, and its problems; for
    several adapters also how they go together. A dict that `--json` prints unchanged.

    Every kind has:
      inspect       1, the version of this schema
      kind          "base", "adapter", "file" or "pipeline"
      name, origin  the folder's name, and its entries in a receipt (repo, revision)
      parameters    elements of all tensors; for a quantized base those of the storage
      bytes         of the weight files
      dtypes        {dtype: {tensors, parameters, bytes}}
      shards        [{file, bytes, tensors}]; tensors null if the header cannot be read
      architecture  {classes, model_type} from config.json, for diffusers its class, or null
      tied          {config, head_stored}: tie_word_embeddings (null: not set) and whether a head
                    is stored; null unless a base
      quantization  {found, config}, or null
      loads         {class, missing, misshapen} for a base: the class that transformers loads, and
                    how many parameters it makes up or refuses; null if it does not know the
                    model, and with `headers`
      readable      whether all files are there and could be read
      problems      [{found, expected, where, do, code}]
      modules       a LoRA's modules, else [] (other types of adapters have config and header)
    A pipeline of diffusers has the sums of its components, their problems with the component in
    front, and
      parts         {name: the entries of a base}
    An adapter has:
      format, peft_type, base, revision, task_type, peft_version
      flags         {rslora, dora, lora_bias, bias, init, ensure_weight_tying, layer_replication,
                    target_parameters}
      modules_to_save, replaced (parameters that are replaced as a whole), tokens [{module, rows}]
      groups        [{modules, count, kind, rank, alpha, scale}], modules by their last component
                    and equal values
      statistics    whether the factors were read
    A module has module, kind ("module" or "embedding"), depth (wrapper levels inside it), parameter
    (known with `base`), experts, rank, alpha, scale, trained (b is not zero), norm (Frobenius, of
    scale * b @ a; for a stack over all experts; without DoRA's rescaling), effective_rank (exp of
    the entropy of the normalized squared singular values of b @ a, 0 for zero; for a stack the mean
    over experts that are not zero), relative (norm by the base weight's norm, with `base`), and
    with `intruders` their number as in `resize`. Unknown values are null.

    For several adapters `kind` is "adapters", with `inspect`, `readable`, `adapters` (the entries
    of each), `pairs` as in `report` (over all modules that two of them have: cosines, the share of
    opposed signs, and in `sum` the retention ⟨Σ Δ, Δᵢ⟩ / ‖Δᵢ‖²), and `advice`: one `command` to
    try, with its `reason`.

    Weights on the Hub are only read with `download`; for another tool's file, `download` reads only
    the tensors that determine ranks and scales. With `headers` no factors are read anywhere (they
    take minutes for an adapter with tens of thousands of modules), and no model's class is built.
    `plot` draws norms and ranks, relative ones with `base`, into an HTML page; with `overwrite` an
    older page is replaced. Raises `Refused` if there is nothing to inspect or an option does not
    apply.
    """

    tier = "core"
    runner = "verbs.look.inspection:inspect_source"
    command = """Show the contents of a checkpoint or adapter, and its problems.

    For a base and for sources on the Hub, only headers and JSON are read. For a local adapter the
    factors are read too, for norms and effective ranks (not with --headers). For several adapters
    it shows how similar they are, how much of each their sum keeps, and suggestions. The exit
    status is 1 if a file is missing or cannot be read. Otherwise it is 0, even if there are
    problems. A path with nothing to inspect is refused.

    \b
    Example:
      adapterkit inspect ./my-adapter --base ./base --plot norms.html
      adapterkit inspect ./english ./french ./german
      adapterkit inspect meta-llama/Llama-3.1-8B --json
    """

    paths: Sources = argument(kw_only=False, check=UNWEIGHTED, metavar="PATH...")
    base: StrPath | None = base_option(
        "The adapter's base, to show norms relative to the norms of its weights."
    )
    download: bool = option(
        default=False,
        check=FLAG,
        help="Read weights on the Hub too (default: only headers and JSON).",
    )
    headers: bool = option(
        default=False,
        check=FLAG,
        help="Read only headers and JSON, which is faster but shows no norms, effective ranks or "
        "missing parameters.",
    )
    intruders: bool = option(
        default=False,
        check=FLAG,
        needs="base",
        help="Count intruder dimensions: directions that training added and the base does not "
        "have (arXiv:2410.21228). Takes two SVDs of each weight.",
    )
    plot: StrPath | None = option(
        default=None,
        check=FILE,
        metavar="FILE.html",
        help="Write an HTML page with heatmaps of norms and ranks, layers by modules.",
    )
    overwrite: bool = option(
        default=False, check=FLAG, help="Replace an earlier page.", needs="plot"
    )
    progress: Progress = option(default=no_progress, check=PROGRESS)


inspect = function_of(Inspect)
