"""The folders of examples/integrations, by the interfaces of their programs."""

import asyncio
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import adapterkit
from tests.support.adapter_samples import samples
from tests.support.documents import ROOT

FOLDER = ROOT / "examples" / "integrations"


class Anything:
    """What keeps its arguments, as the classes of ComfyUI's schemas do."""

    def __init__(self, *values, **named):
        self.values, self.named = values, named


@pytest.fixture
def nodes(monkeypatch, tmp_path):
    """The nodes by name, in a ComfyUI of folders and schemas alone (its API of version 3)."""
    kinds = {
        name: types.SimpleNamespace(Input=Anything, Output=Anything)
        for name in ("Combo", "Float", "String")
    }
    io = types.SimpleNamespace(
        ComfyNode=object, Schema=Anything, NodeOutput=Anything, Input=Anything, **kinds
    )
    latest = types.ModuleType("comfy_api.latest")
    latest.ComfyExtension, latest.io = object, io
    paths = types.ModuleType("folder_paths")
    for name in ("loras", "checkpoints", "output"):
        (tmp_path / name).mkdir()
    paths.get_folder_paths = lambda kind: [str(tmp_path / kind)]
    paths.get_filename_list = lambda kind: sorted(p.name for p in (tmp_path / kind).iterdir())
    paths.get_full_path_or_raise = lambda kind, name: str(tmp_path / kind / name)
    paths.get_output_directory = lambda: str(tmp_path / "output")
    monkeypatch.setitem(sys.modules, "comfy_api", types.ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    spec = importlib.util.spec_from_file_location("nodes", FOLDER / "comfyui" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    return {node.__name__: node for node in asyncio.run(extension.get_node_list())}


def sample_file():
    return next(s.path for s in samples("kohya") if "sdxl" in s.path.name or "sd15" in s.path.name)


def test_nodes_of_comfyui(nodes, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "loras" / f"{name}.safetensors").write_bytes(sample_file().read_bytes())
    for node in nodes.values():
        schema = node.define_schema()
        assert schema.named["node_id"] == f"adapterkit{node.__name__}"
        given = {entry.values[0] for entry in schema.named["inputs"]}
        code = node.execute.__func__.__code__
        assert given == {*code.co_varnames[1 : code.co_argcount]}
    made = nodes["Convert"].execute("one.safetensors", "comfyui", "made").values[0]
    assert Path(made) == tmp_path / "loras" / "made.safetensors"
    assert adapterkit.check(made, program="comfyui")["takes"]
    both = ["one.safetensors", 1.0, "two.safetensors", -1.0]
    nodes["Combine"].execute(*both, "linear", "kohya", "made")
    nothing = adapterkit.inspect(made)["modules"]
    assert len({module["module"].partition(".")[0] for module in nothing}) > 1
    assert max(module["norm"] for module in nothing) < 1e-5
    small = nodes["Resize"].execute("one.safetensors", 0.5, "kohya", "small").values[0]
    assert Path(small).stat().st_size < sample_file().stat().st_size
    for _ in range(2):  # a workflow that runs again
        page = nodes["Report"].execute("one.safetensors", "../page").values[0]
        assert Path(page) == tmp_path / "output" / "page.html" and Path(page).exists()
    with pytest.raises(ValueError, match="outside"):
        nodes["Convert"].execute("one.safetensors", "comfyui", "../../made")


def test_each_method_of_the_combine_node_writes_a_lora(nodes, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "loras" / f"{name}.safetensors").write_bytes(sample_file().read_bytes())
    inputs = ["one.safetensors", 0.75, "two.safetensors", 0.25]
    entries = {entry.values[0]: entry for entry in nodes["Combine"].define_schema().named["inputs"]}
    for method in entries["method"].named["options"]:
        made = nodes["Combine"].execute(*inputs, method, "kohya", method).values[0]
        assert adapterkit.inspect(made)["modules"], method


def test_the_github_action_is_valid(lora, llama, tmp_path, monkeypatch):
    words = ["-m", "check_jsonschema", "--builtin-schema", "vendor.github-actions"]
    action = FOLDER / "github-action" / "action.yml"
    done = subprocess.run([sys.executable, *words, str(action)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    spec = importlib.util.spec_from_file_location("action", action.with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))

    def check(**environment):
        for name, value in {"CHECK": str(lora), "BASE": str(llama), **environment}.items():
            monkeypatch.setenv(name, value)
        return module.check()

    assert check(ENGINES="vllm", MOST="") == 0
    assert "| none |" in (tmp_path / "summary.md").read_text()
    assert check(ENGINES="mlx", MOST="10") == 1
    text = (tmp_path / "summary.md").read_text()
    assert "more than 10" in text and f"adapterkit convert {lora} --to mlx" in text
    monkeypatch.setenv("RUN", "inspect absent")
    assert module.run() != 0


def test_the_job_merges_from_hub_to_hub(monkeypatch, capsys):
    calls = []

    def merge(base, adapters, **options):
        calls.append((base, adapters, options))
        return types.SimpleNamespace(data={"pushed": {"url": "there"}})

    monkeypatch.setattr(adapterkit, "merge", merge, raising=False)
    monkeypatch.setattr(sys, "argv", ["merge.py", "org/base", "org/a", "org/b", "me/merged"])
    path = FOLDER / "hf-jobs" / "merge.py"
    exec(compile(path.read_text(), path, "exec"), {"__name__": "__main__"})
    assert calls == [
        ("org/base", ["org/a", "org/b"], {"out": "hf://me/merged", "disk_limit": "20GB"})
    ]
    assert capsys.readouterr().out == "there\n"


def test_the_image_and_the_extension_run_the_command():
    lines = (FOLDER / "docker" / "Dockerfile").read_text().splitlines()
    assert lines[-1] == "ENTRYPOINT " + json.dumps(["adapterkit"])
    assert any(line.startswith("USER ") for line in lines)
    from importlib.metadata import entry_points

    ours = {
        e.name: e.value for e in entry_points(group="console_scripts") if "adapterkit" in e.name
    }
    assert ours["hf-adapterkit"] == ours["adapterkit"]
