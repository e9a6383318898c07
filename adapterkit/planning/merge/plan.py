"""merge: adapters into a base, W' = round(W + Σ weight·scale·b@a), planned from the headers."""

from dataclasses import replace
from functools import partial

from adapterkit import dtypes
from adapterkit.adapters.keys import CONFIG, WEIGHTS
from adapterkit.adapters.peft import scan_adapter
from adapterkit.adapters.record import Adapter
from adapterkit.checkpoint import layout
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.hashes import sha256_of_small_file
from adapterkit.checkpoint.layout import Stored
from adapterkit.checkpoint.spec import open_checkpoint
from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown
from adapterkit.options import StrPath, parse_size
from adapterkit.patterns import similar_names
from adapterkit.plan import Computed, Plan, Shard, Step
from adapterkit.planning import cards, folder_files, tokenizer_files
from adapterkit.planning.history import held_by, notes_on
from adapterkit.planning.input_files import identities
from adapterkit.planning.merge.changes import collect
from adapterkit.planning.merge.job import Job, Options
from adapterkit.planning.merge.steps import steps_of
from adapterkit.planning.merge.tied import set_everywhere, settle_ties
from adapterkit.planning.merge.vocabulary import settle_head, settle_vocabulary
from adapterkit.planning.model_output import CHANGED_BY, lost, shard_of, shards_of_size
from adapterkit.planning.sources import open_model
from adapterkit.weights.codec import QuantizedWeight, check_writable
from adapterkit.weights.decoded import decoded_view, quantization_files, quantized_weights
from adapterkit.weights.detect import check_not_quantized


def plan_merge(base: Folder, sources: list[tuple[Folder, float]], options: Options) -> Plan:
    """Everything a merge will do, or `Refused` with all that cannot be done. `sources`: the adapters and their weights."""
    _check_options(options)
    if not sources:
        raise Refused("no adapter", expected="one or more", hint="name the adapters after the base")
    read, errors = _read(sources)
    try:
        checkpoint = open_checkpoint(base)
    except AdapterkitError as error:
        refuse_all([error, *errors])
        raise
    if errors and len(read) < len(sources):
        refuse_all(errors)
    job = Job(checkpoint, read, [weight for _, weight in sources], options)
    job.held = held_by(base)
    job.notes += notes_on(base, job.held, read, job.weights)
    collect(job)
    refuse_all([*errors, *job.errors])
    settle_ties(job)
    settle_vocabulary(job)
    settle_head(job)
    refuse_all(job.errors)
    steps = steps_of(job)
    refuse_all(job.errors)
    _refuse_nothing(job, steps)
    _settle_formats(job, steps)
    refuse_all(job.errors)
    return _plan(job, steps)


def _read(sources: list[tuple[Folder, float]]) -> tuple[list[Adapter], list[AdapterkitError]]:
    """As much of each adapter as can be held against the base, and everything that is wrong with them."""
    read: list[Adapter] = []
    errors: list[AdapterkitError] = []
    for number, (source, _) in enumerate(sources, start=1):
        adapter, seen, typed = scan_adapter(source, number)
        errors += seen.errors
        if typed and seen.headers:
            read.append(adapter)
    return read, errors


def plan_on_twin(
    base: StrPath, base16: StrPath, sources: list[tuple[Folder, float]], options: Options
) -> Plan:
    """A merge into the 16-bit original of the quantized base that the adapters were trained on; `Refused` if it is none."""
    quantized, twin = open_checkpoint(open_model(base)), open_checkpoint(open_model(base16))
    errors: list[AdapterkitError] = []
    packed = quantized_weights(decoded_view(quantized).tensors)
    made_by = next(
        (m for header in quantized.shards.values() if (m := header.metadata.get(CHANGED_BY))), None
    )
    if not packed:
        hint = "leave --base16 out"
        errors.append(
            Refused(
                "no quantized weights", expected="a quantized base", where=quantized.name, hint=hint
            )
        )
    if made_by:
        found, hint = (
            f"a base made by {made_by}: what its adapter makes up for is not in the original",
            "merge into the base itself",
        )
        errors.append(
            Refused(
                found, expected="a quantized copy of the original", where=quantized.name, hint=hint
            )
        )
    check_not_quantized(twin)
    for spec in packed:
        other = twin.tensors.get(spec.key)
        if other is None or other.shape != spec.shape:
            found = (
                f"{shown(spec.key)} {spec.shape}, {other.shape if other else 'none'} in {twin.name}"
            )
            hint = "give the model that the base was quantized from"
            errors.append(
                Refused(found, expected="the same weights", where=quantized.name, hint=hint)
            )
    refuse_all(errors)
    plan = plan_merge(twin.folder, sources, options)
    return replace(
        plan,
        notes=(
            *plan.notes,
            f"merged into {twin.name}; the adapters were trained on {quantized.name}",
        ),
    )


def _settle_formats(job: Job, steps: dict[str, list[Step]]) -> None:
    """Whether a quantized base's weights keep their format or become floats: that one can be written, and the config says so."""
    packed = quantized_weights(job.base.tensors)
    options = job.options
    where = job.original.name
    if not packed:
        if options.dequantize:
            job.notes.append("--dequantize: the base is not quantized")
        return
    if any(spec.key != key for key, spec in job.base.tensors.items()):
        found, hint = "layer_replication on a quantized base", "dequantize the base first"
        job.errors.append(
            Refused(found, expected="a base of 16 or 32 bits", where=where, hint=hint)
        )
    if any(step.source.dtype == "F64" and step.edits for group in steps.values() for step in group):
        found, hint = "edits of F64 weights beside quantized ones", "dequantize the base first"
        job.errors.append(Refused(found, expected="F32, F16 or BF16", where=where, hint=hint))
    if options.dequantize:
        return
    for step in (step for group in steps.values() for step in group):
        if isinstance(job.base.tensors.get(step.key), QuantizedWeight) and not isinstance(
            step.source, QuantizedWeight
        ):
            found, hint = (
                f"{shown(step.key)} is quantized, and an adapter trained it whole",
                "give --dequantize",
            )
            job.errors.append(
                Refused(found, expected="factors on quantized weights", where=where, hint=hint)
            )
    touched = [
        step.source
        for group in steps.values()
        for step in group
        if step.edits and isinstance(step.source, QuantizedWeight)
    ]
    job.errors += check_writable(
        [*touched, *(spec for spec in packed if getattr(spec, "transposed_scales", False))], where
    )
    for option, value in [
        ("--dtype", options.dtype),
        ("--compat", options.compat),
        ("--max-shard-size", options.max_shard_size),
    ]:
        if value:
            found, hint = f"{option} with a quantized base", "give --dequantize"
            job.errors.append(
                Refused(found, expected="the format as it is", where="options", hint=hint)
            )
    said = job.original.config.get("quantization_config")
    if said is not None:
        job.config["quantization_config"] = said


def _refuse_nothing(job: Job, steps: dict[str, list[Step]]) -> None:
    if any(step.edits or step.source.folder for group in steps.values() for step in group):
        return
    if job.left_out:
        problem = "nothing to merge: every module is left out"
        names = (name.partition(": ")[2] for name in job.left_out)
        similar = similar_names(job.options.include or "", names)
        hint = similar or "check --include and --exclude"
    else:
        problem, hint = "an adapter without weights", "check the adapter"
    raise Refused(
        problem,
        expected="at least one module",
        where=", ".join(a.name for a in job.adapters),
        hint=hint,
    )


def _check_options(options: Options) -> None:
    errors: list[AdapterkitError] = []
    if options.rounding == "nearest" and options.seed:
        found, hint = (
            f"--seed {options.seed} without draws",
            "give --rounding stochastic, or leave --seed out",
        )
        errors.append(Refused(found, expected="--rounding stochastic", where="options", hint=hint))
    if options.rounding == "stochastic" and options.compat:
        found, hint = (
            f"--rounding stochastic with --compat {options.compat}",
            "leave one of them out",
        )
        errors.append(Refused(found, expected="one way to round", where="options", hint=hint))
    refuse_all(errors)


def _plan(job: Job, steps: dict[str, list[Step]]) -> Plan:
    shards = _shards(job, steps)
    folders = (job.original.folder, *(a.folder for a in job.adapters))
    headers = {(0, name): header.sha256 for name, header in job.original.shards.items()}
    for adapter in job.adapters:
        headers[adapter.number, WEIGHTS] = adapter.header_sha256
        headers[adapter.number, CONFIG] = sha256_of_small_file(adapter.folder, CONFIG)
    if "config.json" in job.original.files:
        headers[0, "config.json"] = sha256_of_small_file(job.original.folder, "config.json")
    if job.options.dtype:
        name = dtypes.CONFIG_NAME[dtypes.parse(job.options.dtype)]
        for key in ("dtype", "torch_dtype"):
            set_everywhere(job.config, key, name)
    tokenizer = tokenizer_files.tokenizer_files(job.adapters, job.options.tokenizer, job.notes)
    card = cards.merged_card(job.original, job.adapters, job.weights)
    files = folder_files.model_files(job.original, job.config, shards, card, tokenizer=tokenizer)
    if job.options.dequantize:
        for name in quantization_files(job.base.tensors):
            files.pop(name, None)
    changed = sum(step.edits != () for group in steps.values() for step in group)
    decisions = {
        "adapters": [
            {"name": a.name, "weight": w, "modules": len(a.loras)}
            for a, w in zip(job.adapters, job.weights, strict=True)
        ],
        "left_out": job.left_out,
        "tensors_changed": changed,
    }
    if job.held:
        decisions["held"] = [one._asdict() for one in job.held]  # by the base, before this merge
    options = {k: v for k, v in vars(job.options).items() if v not in (None, False)}
    options["weights"] = job.weights
    file_ids = identities(folders, headers)
    warn = partial(lost, compat=job.options.compat)
    return Plan(
        "merge",
        options,
        folders,
        headers,
        file_ids,
        shards,
        files,
        decisions,
        tuple(job.notes),
        warn=warn,
    )


def _shards(job: Job, steps: dict[str, list[Step]]) -> tuple[Shard | Computed, ...]:
    if quantized_weights(job.base.tensors):
        headers = job.original.shards
        if job.options.dequantize and job.options.max_shard_size:
            ordered = [step for group in steps.values() for step in group]
            return shards_of_size(ordered, parse_size("max_shard_size", job.options.max_shard_size))
        return tuple(
            shard_of(name, group, headers[name], not job.options.dequantize)
            for name, group in steps.items()
        )
    by_key = {step.key: step for group in steps.values() for step in group}
    if job.options.max_shard_size:
        stored = [_stored(step) for group in steps.values() for step in group]
        metadata = next(iter(job.original.shards.values())).metadata or {"format": "pt"}
        layouts = layout.resharded(
            stored, parse_size("max_shard_size", job.options.max_shard_size), metadata
        )
    else:
        layouts = [
            layout.like_base(name, [_stored(s) for s in group], job.original.shards[name])
            for name, group in steps.items()
        ]
    return tuple(Shard(lay, tuple(by_key[t.key] for t in lay.tensors)) for lay in layouts)


def _stored(step: Step) -> Stored:
    return Stored(step.key, step.dtype, step.shape)
