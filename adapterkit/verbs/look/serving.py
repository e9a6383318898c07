"""The settings of a server, as its command line has them, and what they let an adapter change."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterkit.adapters.formats.engines import Client, ModuleRule
from adapterkit.core.commands import command
from adapterkit.core.errors import Problems, Refused, listed, shown

OPTION = "--serving"


@dataclass(frozen=True)
class Serving:
    """Checked settings of a server by their names, without dashes in front."""

    client: Client
    given: Mapping[str, Sequence[str]]

    @property
    def rank(self) -> int | None:
        """The largest rank, if it is set."""
        values = self.given.get(self.client.rank.name, ())
        return int(values[0]) if values else None

    @property
    def rules(self) -> list[ModuleRule]:
        """The server's rules, without those that a setting lifts."""
        lifted = {name for name, own in self.given.items() if "false" not in map(str.lower, own)}
        return [rule for rule in self.client.rules if rule.unless not in lifted]

    def acts_on(self, module: str) -> bool:
        """True unless the setting of targets names others."""
        words = self.client.serving
        targets = {*self.given.get(words.targets, ())}
        if not targets or words.all in targets:
            return True
        targets |= {name for group in words.fused if targets & {*group} for name in group}
        leaf = module.rpartition(".")[2]
        is_expert = words.experts and ".experts" in module
        return bool({module, words.experts if is_expert else leaf} & targets)

    def left_out(self, modules: Iterable[str], adapter: str) -> Refused | None:
        """The refusal of modules that the setting of targets leaves out, or None. `adapter`: its
        name in the advice."""
        names = [module for module in modules if not self.acts_on(module)]
        flag = self.client.serving.targets
        more = " ".join(sorted({name.rpartition(".")[2] for name in names}))
        merge = command("adapterkit merge", "BASE", adapter, out="merged")
        if not names:
            return None
        return Refused(
            f"{len(names)} modules such as {shown(names[0])} are not in the server's --{flag}",
            expected=f"modules among {listed(list(self.given[flag]))}",
            where=adapter,
            hint=f"add {more} to --{flag}, or merge it\n{merge}",
            code="AK108",
        )


def serving_of(client: Client, text: str) -> Serving:
    """The settings in a text such as `max-lora-rank=16,lora-target-modules=q_proj;v_proj`.
    `Refused` with every unknown setting, and every value that the server does not accept."""
    rank, given = client.rank, dict[str, list[str]]()
    errors = Problems(where=OPTION, code="AK101")
    known = ", ".join(client.settings) or f"no settings: {client.title} has none that matter"
    possible = ", ".join(map(str, rank.values)) or "a number above 0"
    for part in text.split(","):
        flag, is_set, value = part.strip().partition("=")
        name, values = _plain(flag), [one.strip() for one in value.split(";")] if is_set else []
        if name not in client.settings:
            errors.add(f"{client.title} has no setting {shown(repr(name))}", known, "correct it")
        elif name in given:
            errors.add(f"{name} is there twice", "each setting once", "remove one")
        elif name == rank.name and not _is_rank(values, rank.values):
            errors.add(f"{name} {shown(repr(value))}", possible, "give one of them")
        elif name == client.serving.targets and not all(values or [""]):
            errors.add(f"{name} {shown(repr(value))}", f"{name}=q_proj;v_proj", "name modules")
        given[name] = values
    errors.raise_all()
    return Serving(client, given)


def _plain(flag: str) -> str:
    return flag.strip().lstrip("-").replace("_", "-")


def _is_rank(values: Sequence[str], possible: Sequence[int] = ()) -> bool:
    number = int(values[0]) if len(values) == 1 and values[0].isdecimal() else 0
    return number in possible if possible else number > 0


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

        for name, own in (
            yaml.safe_load(Path(given["config"][0]).read_text("utf-8")) or {}
        ).items():
            one = own if isinstance(own, list) else [own]
            given.setdefault(_plain(name), list(map(str, one)))
    own = {name: values for name, values in given.items() if name in client.settings}
    if not _is_rank(own.get(client.rank.name, ())):
        own.pop(client.rank.name, None)
    return Serving(client, own)
