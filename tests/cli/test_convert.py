"""convert on the command line: what each format holds, which one a file is in, many at once."""

import json
from pathlib import Path

import click.testing
import pytest

from adapterkit.adapters.formats.library import architectures, formats
from adapterkit.cli import main
from adapterkit.cli.batch import name_and_parent, plan_outputs
from adapterkit.core.errors import Refused

GOLDEN = Path(__file__).parents[1] / "formats" / "golden"
KOHYA, DIFFUSERS = GOLDEN / "kohya" / "flux.safetensors", GOLDEN / "diffusers" / "flux.safetensors"


def run(*words: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, ["convert", *map(str, words)])


def test_the_list_names_every_format():
    document = json.loads(run("--list", "--json").stdout)
    assert set(document["formats"]) == set(formats())
    assert set(document["architectures"]) == set(architectures())
    for name, one in document["formats"].items():
        assert one["title"] and one["sources"] and one["kinds"] and one["reads"], name
        assert one["writes"] == formats()[name].writes
    kohya = document["formats"]["kohya"]
    assert kohya["scale"]["place"] == "tensor" and "flux" in kohya["architectures"]
    assert document["formats"]["peft"]["scale"]["place"] == "config"
    text = run("--list").stdout
    assert all(f"\n{name}" in f"\n{text}" for name in formats())


def test_the_format_of_a_file():
    document = json.loads(run(KOHYA, "--detect", "--json").stdout)
    assert (document["format"], document["architecture"]) == ("kohya", "flux")
    assert document["modules"] == sum(document["kinds"].values()) > 0
    assert "transformer" in document["components"] and not document["problems"]
    assert "kohya" in run(KOHYA, "--detect").stdout


def test_a_file_of_unknown_format_is_refused(tmp_path: Path):
    (tmp_path / "x.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    runner = click.testing.CliRunner()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os._exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))
        words = ["convert", str(tmp_path / "x.safetensors"), "--detect"]
        result = runner.invoke(main, words)
    assert result.exit_code == 1 and "no adapter of a known format" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["a", "--list"],
        ["a"],
        ["a", "--to", "peft"],
        ["a", "--to", "peft", "--out", "o", "--out-pattern", "p"],
        ["--from-list", "l", "--to", "peft"],
        ["--from-list", "l", "--to", "peft", "--out", "o"],
        ["a", "--detect", "--to", "peft"],
        ["--detect"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_and_prints_the_usage(words: list[str]):
    result = run(*words)
    assert result.exit_code == 2 and "Usage" in result.stderr


def test_many_with_a_refusal_among_them(tmp_path: Path):
    """The others are done; a second run leaves them as they are."""
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(KOHYA.read_bytes()[:300])
    listed = tmp_path / "list.txt"
    listed.write_text(f"# sources\n{KOHYA}\n\n{broken}\n{DIFFUSERS}\n")
    pattern = f"{tmp_path}/out/{{parent}}-{{name}}"
    words = ["--from-list", listed, "--to", "comfyui", "--out-pattern", pattern, "--json"]
    result = run(*words)
    document = json.loads(result.stdout)
    states = [row["state"] for row in document["conversions"]]
    assert result.exit_code == 1 and states == ["done", "refused", "done"]
    assert document["totals"] == {"done": 2, "done before": 0, "planned": 0, "refused": 1}
    assert "broken" in document["conversions"][1]["message"]
    outs = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert outs == ["diffusers-flux", "kohya-flux"]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = run(*words[:-1], "--resume")
    assert again.exit_code == 1 and again.stderr.count("done before: ") == 2
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    broken.write_bytes(KOHYA.read_bytes())
    assert run(*words, "--resume").exit_code == 0


def test_a_list_that_is_planned_only(tmp_path: Path):
    listed = tmp_path / "list.txt"
    listed.write_text(f"{KOHYA}\n")
    words = ["--from-list", listed, "--to", "comfyui", "--out-pattern", f"{tmp_path}/{{name}}"]
    result = run(*words, "--dry-run", "--json")
    assert json.loads(result.stdout)["conversions"][0]["state"] == "planned"
    assert [path.name for path in tmp_path.iterdir()] == ["list.txt"]


def test_names_in_patterns(tmp_path: Path):
    (tmp_path / "a.b.safetensors").touch()
    assert name_and_parent(str(tmp_path / "a.b.safetensors")) == ("a.b", tmp_path.name)
    assert name_and_parent(str(tmp_path)) == (tmp_path.name, tmp_path.parent.name)
    assert name_and_parent("org/name@main") == ("name", "org")
    assert name_and_parent("org/name:sub/inner") == ("inner", "sub")
    assert name_and_parent("org/name:loras/a.b.safetensors") == ("a.b", "loras")
    assert plan_outputs(["org/a", "org/a", "other/b"], "x/{name}") == [
        ("org/a", "x/a"),
        ("other/b", "x/b"),
    ]


@pytest.mark.parametrize(
    ("lines", "pattern", "words"),
    [
        (["one/a", "two/a", "three/a"], "{name}", "would both be"),
        (["one/a"], "{nome}", "nome"),
        (["# nothing"], "{name}", "no source"),
    ],
)
def test_patterns_that_are_refused(lines: list[str], pattern: str, words: str):
    with pytest.raises(Refused) as caught:
        plan_outputs(lines, pattern)
    assert words in str(caught.value)
