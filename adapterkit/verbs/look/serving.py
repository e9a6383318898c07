"""The settings of a server, as its command line has them, and what they let an adapter change."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterkit.adapters.formats.engines import Client, ModuleRule
from adapterkit.core.errors import Problems, shown

OPTION = "--serving"


@dataclass(frozen=True)
class Serving:
    """Checked settings of a server by their names, without dashes in front."""

    client: Client
    given: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def rank(self) -> int | None:
        """The largest rank, if it is set."""
        values = self.given.get(self.client.rank.name, ())
        return int(values[0]) if values else None

    @property
    def rules(self) -> list[ModuleRule]:
        """The server's rules, without those that a setting lifts."""
        lifted = {name for name, values in self.given.items() if [*values] != ["false"]}
        return [rule for rule in self.client.rules if rule.unless not in lifted]

    def left_out(self, modules: Iterable[str]) -> list[str]:
        """The modules on which no adapter acts, because the setting names others."""
        words = self.client.serving
        targets = {*self.given.get(words.targets, ())} - {""}
        if not targets or words.all in targets:
            return []
        targets |= {name for group in words.fused if targets & {*group} for name in group}

        def is_target(module: str) -> bool:
            leaf = module.rpartition(".")[2]
            is_expert = words.experts and ".experts" in module
            return bool({module, words.experts if is_expert else leaf} & targets)

        return [module for module in modules if not is_target(module)]


def serving_of(client: Client, text: str) -> Serving:
    """The settings in a text such as `max-lora-rank=16,lora-target-modules=q_proj;v_proj`.
    `Refused` with every unknown setting, and every value that the server does not accept."""
    rank, given = client.rank, dict[str, list[str]]()
    errors = Problems(where=OPTION, code="AK101")
    expected = ", ".join(client.settings) or f"no settings: {client.title} has none that matter"
    for part in text.split(","):
        name, is_set, value = part.strip().partition("=")
        name = _plain(name)
        values = [one.strip() for one in value.split(";")] if is_set else []
        if name not in client.settings:
            problem = f"{client.title} has no setting {shown(repr(name))}"
            errors.add(problem, expected, "correct it, or remove it")
        elif name in given:
            errors.add(f"{name} is there twice", "each setting once", "remove one")
        elif name == rank.name and not _is_rank(values, rank.values):
            problem = f"{name} {shown(repr(value))}"
            possible = ", ".join(map(str, rank.values)) or "a number above 0"
            errors.add(problem, possible, "give one of them")
        elif name == client.serving.targets and not all(values or [""]):
            problem = f"{name} {shown(repr(value))}"
            errors.add(problem, f"names, such as {name}=q_proj;v_proj", "give at least one")
        given[name] = values
    errors.raise_all()
    return Serving(client, given)


def _plain(flag: str) -> str:
    return flag.strip().lstrip("-").replace("_", "-")


def _is_rank(values: Sequence[str], possible: Sequence[int]) -> bool:
    number = int(values[0]) if len(values) == 1 and values[0].isdecimal() else 0
    return number > 0 and (not possible or number in possible)


def from_command_line(client: Client, argv: Sequence[str]) -> Serving:
    """The settings on a server's own command line, and in the YAML file of its `--config`; others
    are ignored, because the server checks them itself."""
    given: dict[str, list[str]] = {}
    values: list[str] = []
    for word in argv:
        if word.startswith("--"):
            flag, is_set, value = word.partition("=")
            values = given[_plain(flag)] = [value] if is_set else []
        else:
            values.append(word)
    if given.get("config"):
        import yaml

        found: Any = yaml.safe_load(Path(given["config"][0]).read_text("utf-8"))
        for name, value in (found if isinstance(found, dict) else {}).items():
            own = value if isinstance(value, list) else [value]
            given.setdefault(_plain(str(name)), [str(one).lower() if one is False else str(one)
                                                 for one in own])  # fmt: skip
    own = {name: values for name, values in given.items() if name in client.settings}
    if not _is_rank(own.get(client.rank.name, ()), ()):
        own.pop(client.rank.name, None)
    return Serving(client, own)
