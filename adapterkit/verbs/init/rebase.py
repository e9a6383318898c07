"""rebase: turn an adapter whose initialization changed the base into standard LoRA on the original
base: Δ' = s·b@a - s₀·b₀@a₀."""

from dataclasses import replace

from adapterkit.core import dtypes
from adapterkit.core.adapter.record import EMBEDDINGS, Adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.errors import AdapterkitError, Problems, Refused, shown
from adapterkit.core.inputs.base_door import read_checkpoint
from adapterkit.core.inputs.sources import if_given, initial_of, open_adapter, open_model
from adapterkit.core.merge.sites import (
    JoinedSite,
    base_with_parameters,
    join,
    levels_of,
    names_of,
    targets_of,
)
from adapterkit.core.plan import Plan, Task
from adapterkit.core.weights.names import Names
from adapterkit.verbs.combine.methods.linear import Linear
from adapterkit.verbs.combine.tasks.combine import CombinedFactors, Operand, Refit
from adapterkit.verbs.init.records import Rebase
from adapterkit.verbs.shared import adapter_output
from adapterkit.verbs.shared.joined_values import read_all

# inits whose base is quantized, not a residual: no difference of factors leads back to the original
QUANTIZED = ("loftq",)


def plan_rebase(options: Rebase) -> Plan:
    """The plan of a rebase; `Refused` with all problems."""
    base = if_given(open_model, options.base)
    source = open_adapter(options.adapter)
    trained, before = read_all([source, _initial(source, options)])
    errors = Problems(code="AK304")
    notes: list[str] = []
    init, change = trained.changed_base(), trained.base_change or before.base_change
    if (init or change) is None:
        notes.append(
            f"{trained.name} has no init_lora_weights that changes the base: the command assumes "
            "that its init did"
        )
    elif (by := (init or change or "").lower()).startswith(QUANTIZED):
        problem = f"{trained.name} was initialized by {by}: its base is quantized, not a residual"
        hint = "merge it into its quantized base, or extract the difference"
        errors.add(problem, "an init that subtracts from the base", hint, where=trained.where)
    model = base_with_parameters(base, [trained, before], notes)
    names = names_of(model, [trained, before], notes)
    joined = join([trained, before], errors, names)
    errors += _same_modules(joined, trained, before)
    _check_ties(trained, base, errors, notes)
    errors.raise_all()
    dtype, refit = dtypes.parse(options.dtype), Refit(options.rank, options.energy)
    tasks: list[Task] = []
    levels = levels_of(joined.values())
    for name, site in joined.items():
        operands = (Operand(0, site.members[0], 1.0), Operand(1, site.members[1], -1.0))
        tasks.append(CombinedFactors(name, site.place(levels), dtype, operands, Linear(), refit))
    tasks += adapter_output.copy_all_but_factors(_without_changed_base(trained, notes), dtype)
    settings = adapter_output.settings_of(trained)
    decisions = {"adapters": adapter_output.modules_of([trained, before]), "init": init}
    inputs = [trained, before, *([model] if model else [])]
    summary = f"{init or 'its'} initial factors taken out"
    if not trained.is_implicit:  # made for the base that the init had changed
        config = trained.config | ({"revision": None} if change else {})
        trained = replace(trained, base_fingerprint=None, config=config)
    output = adapter_output.Output(
        [trained], tasks, settings=settings, summary=summary, **targets_of(joined)
    )
    return adapter_output.plan_adapters(
        "rebase", options.recipe_options(), inputs, [output], notes, decisions
    )


def _initial(source: Folder, options: Rebase) -> Folder:
    """The adapter before training; `Refused` if there is none."""
    initial = if_given(open_adapter, options.initial) or initial_of(source)
    if initial is None:
        raise Refused(
            f"{source.name} has no folder initial/, and --initial is not given",
            expected="the adapter as it was saved before training",
            where="options",
            hint="give --initial with the folder of that adapter",
            code="AK304",
        )
    return initial


def _check_ties(trained: Adapter, base: Folder | None, errors: Problems, notes: list[str]) -> None:
    """Refuse an init on one side of a tied weight: it has changed the other side too, which factors
    here cannot undo."""
    modules = [lora.module for lora in trained.loras if EMBEDDINGS.search(f"{lora.module}.weight")]
    if trained.changed_base() is None or not modules or trained.config.get("ensure_weight_tying"):
        return
    if base is None:
        names = ", ".join(map(shown, modules))
        notes.append(
            f"right only if the model does not tie {names} to another weight, because the init "
            "would have changed that too: give --base to check this"
        )
        return
    wanted = tuple(f"{module}.weight" for module in modules)
    names = Names(read_checkpoint(base, 2), wanted, build_model=True, notes=notes)
    for module in modules:
        parameter = names.parameter(f"{module}.weight")
        if parameter is not None and parameter.tied:
            errors.add(
                f"{shown(module)} is tied to {', '.join(map(shown, parameter.tied))}, which the "
                "init has changed too",
                "factors on weights of their own",
                "merge it into the base it was trained on (--base-is-residual)",
                where=trained.name,
                code="AK403",
            )


def _without_changed_base(trained: Adapter, notes: list[str]) -> Adapter:
    """The adapter without its copies of the weights that the init changed: PEFT would replace the
    base's weights with them."""
    modules = {lora.module for lora in trained.loras}
    changed = {name for name in trained.copies if name.rpartition(".")[0] in modules}
    if changed:
        notes.append(
            f"copies of the changed base left out: {', '.join(map(shown, sorted(changed)))}"
        )
    return replace(
        trained,
        replaced={name: spec for name, spec in trained.replaced.items() if name not in changed},
    )


def _same_modules(
    joined: dict[str, JoinedSite], trained: Adapter, before: Adapter
) -> list[AdapterkitError]:
    errors = Problems(where="--initial", code="AK304")
    for number, adapter in ((0, trained), (1, before)):
        lacking = [name for name, site in joined.items() if number not in site.members]
        if lacking:
            some = ", ".join(map(shown, lacking[:4]))
            errors.add(
                f"{adapter.name} lacks {len(lacking)} modules of the other: {some}",
                "the same modules in both",
                "give the adapter saved before training",
            )
    return errors
