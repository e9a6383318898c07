"""Tiers: every member has one in its record, and no help lacks it."""

import click
import pytest

import adapterkit
from adapterkit import runtime
from adapterkit.adapters.formats.library import formats
from adapterkit.cli import main
from adapterkit.core import registry
from adapterkit.core.registry import verb_named
from adapterkit.doors import FAMILIES, VERBS
from adapterkit.verbs.combine.methods import ALIASES
from adapterkit.verbs.look.formats import formats_table, list_formats
from tests.cli.test_help import help_of

METHODS = {"pico", "gta", "core_space", "ctm", "svc", "subspace_boost"}
CORE = {"merge", "convert", "inspect", "verify", "check", "resize", "combine", "init"}
OPTIONS = [("fit", "score"), ("fit", "evaluations"), ("combine", "data"), ("run", "out")]
LIVE = ["LoraFA", "Riemannian", "create_arrow_model", "load_arrow"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_member_of_a_family_has_a_tier(family: str):
    tiers = {name: record.tier for name, record in registry.members(family).items()}
    declared = {name: one.tier for name, one in registry.declarations(family).items()}
    assert tiers == declared and set(tiers.values()) <= set(registry.TIERS)
    assert "core" in tiers.values()


def test_young_methods_and_options_are_experimental():
    methods = registry.members("combinations").items()
    assert {name for name, one in methods if one.tier == "experimental"} == METHODS
    for command, name in OPTIONS:
        (parameter,) = (one for one in main.commands[command].params if one.name == name)
        assert isinstance(parameter, click.Option)
        assert str(parameter.help).endswith("Experimental."), (command, name)
    assert all(getattr(runtime, name).tier == "experimental" for name in LIVE)
    assert not hasattr(runtime.attach, "tier")


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_says_its_tier_and_promise(verb: str):
    tier = verb_named(verb).tier
    assert (tier == "core") == (verb in CORE)
    assert f"{tier.capitalize()}: {registry.TIERS[tier]}." in help_of(verb, columns=100)
    assert callable(getattr(adapterkit, verb))


@pytest.mark.parametrize("command", ["combine", "convert", "init", "merge", "quantize"])
def test_each_row_of_a_list_ends_with_the_tier(command: str):
    words = tuple(f" {tier.capitalize()}." for tier in registry.TIERS)
    for rows in main.commands[command].lists().values():
        assert all(text.endswith(words) for name, text in rows if name not in ALIASES)


def test_lists_of_formats_have_the_tier():
    document = list_formats()
    known = formats().items()
    tiers = {name: one["tier"] for name, one in document["formats"].items()}
    assert tiers == {name: one.tier for name, one in known}
    assert {"core", "stable"} <= set(tiers.values()) <= set(registry.TIERS)
    assert formats_table(document).count("\n  tier ") == len(tiers)
