"""check: plan a conversion for an engine, and compare it with the engine's rules."""

import math
from collections.abc import Iterable, Iterator, Sequence, Set

from adapterkit.adapters.formats.convert import ConvertOptions
from adapterkit.adapters.formats.detect import Detection, detect
from adapterkit.adapters.formats.engines import Client, ModuleRule, engines
from adapterkit.adapters.formats.library import formats
from adapterkit.adapters.formats.modules.kinds import PLAIN
from adapterkit.adapters.formats.modules.record import AdapterModule, Contents
from adapterkit.adapters.formats.planning.as_plain import conversion_hint
from adapterkit.adapters.formats.planning.plan import base_for, plan_contents
from adapterkit.adapters.formats.planning.source import AdapterConversion, read_contents
from adapterkit.adapters.formats.schema import ADAPTER_LAYOUT
from adapterkit.core.adapter.config import INCOMPLETE
from adapterkit.core.adapter.keys import module_of_factors
from adapterkit.core.adapter.peft import scan_adapter
from adapterkit.core.adapter.targets import TargetMatcher
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.commands import command
from adapterkit.core.errors import AdapterkitError, Problems, advice, listed
from adapterkit.core.hints import with_paths
from adapterkit.core.inputs.base_door import kind_of
from adapterkit.core.inputs.sources import open_adapter, open_model, open_unconverted
from adapterkit.core.plan import Plan
from adapterkit.core.records import Json, Settings
from adapterkit.core.weights.detect import quantization_evidence
from adapterkit.verbs.look.join import join
from adapterkit.verbs.look.records.check import EngineCheck

VERSION = 1


class _Verdicts:
    """The findings on an adapter for an engine."""

    def __init__(self, client: Client, check: EngineCheck):
        self.client, self.check, self.rows = client, check, list[Json]()
        self.base = None if check.base is None else "BASE"
        options = {"to": client.format, "base": self.base, "out": f"for-{client.format}"}
        self.convert = f"convert it\n{command('adapterkit convert', 'ADAPTER', **options)}"

    def add(
        self, verdict: str, problem: str, do: str, expected: str = "", modules: int | None = None
    ) -> None:
        row = {"verdict": verdict, "problem": problem, "expected": expected, "modules": modules}
        row["source"] = self.client.sources[0]
        self.rows.append(row | advice(with_paths(do, self.check)))

    def include(self, errors: Iterable[AdapterkitError]) -> None:
        """Add a conversion's refusals, which name what the engine's format cannot store."""

        for error in errors:
            do = conversion_hint(error.hint, self.client.format, self.base) or self.convert
            self.add("refuses", error.problem, do, error.expected)


def check_adapter(check: EngineCheck) -> Json:
    """The document of `check` on an adapter."""
    source = open_unconverted(check.adapter)
    base = None if check.base is None else base_for(check.base, source)
    detection, client = detect(source), engines()[check.program]
    format, found = formats()[client.format], _Verdicts(client, check)
    options, plan, contents = ConvertOptions(to=format.name), None, Contents(format.name, (), ())
    try:
        conversion = AdapterConversion(source, detection, options, base)
        contents = read_contents(conversion)
        plan = plan_contents(conversion, contents)
    except AdapterkitError as error:
        found.include(getattr(error, "errors", (error,)))
    modules = contents.modules
    kinds = {*contents.architectures, str(base and base.config.get("model_type"))}
    own, serving = client.rules, None
    if check.serving is not None:
        from adapterkit.verbs.look.serving import serving_of

        serving = serving_of(client, check.serving)
        own = serving.rules
    rules = [rule for rule in own if not rule.of or kinds & {*rule.of}]
    if not client.reads(detection.format):
        problem = f"{client.title} does not read {detection.format.title}"
        found.add(
            "refuses", problem, found.convert, f"{format.title}: {format.summary}", len(modules)
        )
    elif plan is not None and format.layout == detection.format.layout == ADAPTER_LAYOUT:
        _compare(detection, plan, rules, found)
        if client.one_scale:
            _check_one_scale(modules, detection.config, found)
    _check_ranks(modules, found, None if serving is None else serving.rank)
    _check_rules(modules, rules, found)
    names = [module.path for module in modules]
    if serving is not None and (left := serving.left_out(names, "ADAPTER")) is not None:
        count = sum(not serving.acts_on(name) for name in names)
        found.add(client.serving.verdict, left.problem, left.hint, left.expected, count)
    if base is not None:
        _check_base(detection, base, found)
    if base is not None and not found.rows:
        _check_names(check, base, found)
    return {
        "check": VERSION,
        "engine": client.title,
        "version": client.version,
        "format": detection.format.name,
        "takes": not found.rows,
        "modules": len(modules),
        "findings": found.rows,
    }


def _compare(
    detection: Detection, plan: Plan, rules: Sequence[ModuleRule], found: _Verdicts
) -> None:
    """Report keys that the engine's own layout of the same adapter does not have."""
    wanted = {tensor.key for shard in plan.shards for tensor in shard.layout.tensors}
    read = _renamed(detection, wanted, rules)
    if detection.format.adapter.stacks == "axis":  # which is read next to the engine's own form
        read |= {key for key in detection.container.tensors if ".experts." in key}
    own = [key for key in detection.container.tensors if key not in wanted | read]
    if setting := next(filter(detection.config.get, INCOMPLETE), None):
        found.add("refuses", f"{setting} is set", found.convert, "standard factors")
    elif own:
        problem = f"{len(own)} keys have other names there: {listed(own)}"
        expected = f"names such as {listed(sorted(wanted - set(detection.container.tensors)))}"
        found.add("drops", problem, found.convert, expected, len(own))
    elif folded := plan.decisions.get("folded"):
        problem = f"the scales of {len(folded)} modules are not read"
        found.add("differs", problem, found.convert, "one scale for all", len(folded))


def _check_one_scale(modules: Sequence[AdapterModule], config: Settings, found: _Verdicts) -> None:
    """Report modules with another rank or scale than the config's own."""
    rank, scale = config["r"], config["lora_alpha"] / config["r"]
    own = [m for m in modules if m.kind in PLAIN]
    others = [m.path for m in own if m.rank != rank or not math.isclose(m.scale, scale)]
    if others:
        problem = f"{len(others)} modules such as {others[0]} have another rank or scale than r and"
        problem += " lora_alpha give, which alone are read"
        found.add("differs", problem, found.convert, "one rank and scale for all", len(others))


def _renamed(detection: Detection, wanted: Set[str], rules: Sequence[ModuleRule]) -> set[str]:
    """The keys of factors that the engine renames while loading, if the config's targets match the
    new names, from which the engine makes its layers."""
    rules = [rule for rule in rules if rule.verdict == "renames"]
    targets = detection.config.get("target_modules")
    if not rules or detection.config.get("peft_type") != "LORA" or not targets:
        return set()
    is_target = TargetMatcher(targets, "target_modules")
    modules = {key: module_of_factors(key) for key in detection.container.tensors}
    if not all(is_target(module_of_factors(key)) for key in wanted - modules.keys()):
        return set()
    is_renamed = lambda module: any(rule.modules.search(module) for rule in rules)
    return {key for key, module in modules.items() if module and is_renamed(module)}


def _check_ranks(
    modules: Sequence[AdapterModule], found: _Verdicts, set_rank: int | None = None
) -> None:
    limit, most = found.client.rank, max((module.rank for module in modules), default=0)
    allowed = set_rank or limit.most
    if allowed and most > allowed:
        large = sum(module.rank > allowed for module in modules)
        resize = command("adapterkit resize", "ADAPTER", rank=allowed, out="smaller")
        enough = limit.at_least(most) if limit.flag else None
        serve = f"serve with {limit.flag} {enough}, or " if enough else ""
        expected = f"at most {allowed}" + f", unless {limit.flag} is larger" * bool(limit.flag)
        found.add("refuses", f"rank {most}", f"{serve}shrink it\n{resize}", expected, large)


def _check_rules(
    modules: Sequence[AdapterModule], rules: Sequence[ModuleRule], found: _Verdicts
) -> None:
    """Report the engine's rules for modules, except renames."""
    for rule in (rule for rule in rules if rule.verdict != "renames"):
        names = [module.path for module in modules if rule.modules.search(module.path)]
        if names:
            problem = f"{len(names)} modules such as {names[0]}: {rule.why}"
            found.add(rule.verdict, problem, rule.do, modules=len(names))


def _check_names(check: EngineCheck, base: Checkpoint, found: _Verdicts) -> None:
    """Report modules and shapes that the base does not have, as a merge finds them."""
    errors = Problems()
    with errors.collected():
        for folder, on in _on_models(check, base):
            adapter, _, typed = scan_adapter(folder)
            is_floats = quantization_evidence(on.config, on.tensors) is None
            if typed and is_floats and on.tensors:
                join(adapter, on.folder, errors)
    if errors:
        found.include(errors)


def _on_models(check: EngineCheck, base: Checkpoint) -> Iterator[tuple[Folder, Checkpoint]]:
    """Yield the adapter and its base; for a pipeline, the adapter of each component, and that
    component."""
    assert check.base is not None
    kind = kind_of(open_model(check.base))
    if own := kind.own("adapters on models"):
        yield from own(kind, check.adapter)
    else:
        yield open_adapter(check.adapter, base.folder), base


def _check_base(detection: Detection, base: Checkpoint, found: _Verdicts) -> None:
    """Report the id of another base; the conversion has compared shapes and names."""
    declared, given = (
        detection.config.get("base_model_name_or_path"),
        base.folder.origin.get("repo"),
    )
    if isinstance(declared, str) and isinstance(given, str) and declared != given:
        edit = command("adapterkit edit", "ADAPTER", base_id=given, out="edited")
        do = f"check the base, or change its name in the adapter\n{edit}"
        found.add("differs", f"the adapter names the base {listed([declared])}", do, given)
