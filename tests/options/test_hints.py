"""Hints name options of the verb that refuses, or a whole command of another."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import click.testing
import pytest
import torch
from safetensors.torch import save_file

import adapterkit
from adapterkit import Refused
from adapterkit.adapters.formats.convert import Convert
from adapterkit.cli import main
from adapterkit.core.hints import own_hint
from adapterkit.core.merge.verb import Merge
from adapterkit.core.registry import verb_named
from tests.support.sources import sources, walked

PACKAGE = Path(adapterkit.__file__).parent
COMMAND = re.compile(r"adapterkit ([a-z]+)((?: (?:[A-Za-z.=/-]+|\{\}))*)")
VERBS = sorted(set(main.commands) - {"run", "finish", "completion", "explain"})


def _texts(node: ast.AST) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, ast.JoinedStr):
            yield "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in child.values)
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value


@functools.cache
def hints() -> set[str]:
    """Every text of a hint in the package that names an option or a command."""
    found = set()
    for node in (node for tree in sources().values() for node in walked(tree)):
        if isinstance(node, ast.keyword):
            named = node.arg == "hint"
        else:
            named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "hint"
        if named:
            found |= set(_texts(node.value))
    return {text for text in found if "--" in text or "adapterkit " in text}


@pytest.mark.parametrize("verb", VERBS)
def test_hints_name_options_that_the_verb_has(verb: str) -> None:
    record = verb_named(verb)
    own = {word for param in main.commands[verb].params for word in (*param.opts, "--plan")}
    for hint in hints():
        text = own_hint(hint, record)
        assert text.strip() or not hint.strip()
        rest = re.sub(r"`[^`]*`|\b(?:adapterkit|hf|ray|llama-gguf-split|python) .*", "", text)
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", rest))
        assert named <= own, (hint, text)


def test_commands_in_hints_exist() -> None:
    commands = [match for hint in hints() for match in COMMAND.finditer(hint)]
    assert len(commands) > 5
    for match in commands:
        name, rest = match[1], match[2]
        if name in ("that", "everywhere"):  # a sentence about the program
            continue
        assert name in main.commands, match[0]
        own = {word for param in main.commands[name].params for word in param.opts}
        assert set(re.findall(r"--[a-z0-9-]+", rest)) <= own, match[0]


def test_a_hint_keeps_the_alternatives_that_the_verb_has() -> None:
    hint = "give --base BASE, the model it was trained on, or --architecture"
    assert own_hint(hint, Merge) == "give BASE, the model it was trained on"
    assert own_hint(hint, Convert) == hint
    assert own_hint("give --rank N", Merge) == "read its options\nadapterkit merge --help"


def test_a_fix_that_needs_convert_is_hinted_as_its_command(llama, tmp_path) -> None:
    """A LoHa in a layout that PEFT cannot hold beside a LoRA: `merge` has no --rank."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    head = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_{}"
    loha = {"hada_w1_a": (64, 2), "hada_w1_b": (2, 64), "hada_w2_a": (64, 2), "hada_w2_b": (2, 64)}
    tensors = {f"{head.format('q')}.{name}": draw(*shape) for name, shape in loha.items()}
    tensors |= {f"{head.format('k')}.lora_down.weight": draw(2, 64)}
    tensors |= {f"{head.format('k')}.lora_up.weight": draw(64, 2)}
    tensors |= {f"{head.format(end)}.alpha": torch.tensor(2.0) for end in "qk"}
    save_file(tensors, tmp_path / "mixed.safetensors")
    with pytest.raises(Refused) as caught:
        adapterkit.merge(llama, tmp_path / "mixed.safetensors", out=tmp_path / "out")
    path = tmp_path / "mixed.safetensors"
    assert str(caught.value).splitlines()[-1].split() == [
        *f"adapterkit convert {path} --to peft --rank 16 --out for-peft".split()
    ]


def test_mistakes_of_newcomers_are_hinted_with_a_fix(llama, tmp_path, monkeypatch) -> None:
    """The hint is for the command that was given, and the path that is not there."""
    monkeypatch.chdir(tmp_path)
    adapterkit.quantize(llama, out="nf4", to="nf4")
    with pytest.raises(Refused, match=r"or dequantize it first\n  adapterkit dequantize nf4 --out"):
        adapterkit.quantize("nf4", out="out", to="int8")
    Path("t.txt").write_text("a text")
    calls = {
        "init": (llama, {"method": "eva", "rank": 4}),
        "loftq": (llama, {"rank": 4}),
        "quantize": (llama, {"to": "nf4", "rounding": "compensated"}),
    }
    for verb, (base, options) in calls.items():
        hint = f"\n  adapterkit stats {llama} --data t.txt --out stats.safetensors"
        with pytest.raises(Refused, match=hint):
            getattr(adapterkit, verb)(base, out="out", stats="t.txt", **options)
    with pytest.raises(Refused, match=r"no such file(.*\n)*.*hint: check the path"):
        adapterkit.finish("nothere.json")
    called = click.testing.CliRunner().invoke
    for command in ("merge", "quantize"):
        output = called(main, [command, "a", "b", "--output", "x"]).output
        assert "Did you mean" in output and "--out" in output.replace("--output", "")
        assert "--compat" not in output
    assert "--dtype" in called(main, ["merge", "a", "b", "--dtyp", "x"]).output
