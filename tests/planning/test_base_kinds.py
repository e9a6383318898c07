"""Folders that are two kinds of bases at once: every verb takes them for the same one."""

import ast
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit import doors
from adapterkit.core.errors import AdapterkitError
from adapterkit.core.inputs import base_door as model_checkpoint
from tests.support import gguf_files
from tests.support.documents import ROOT, blocks
from tests.support.one_file import DENOISER, write_family
from tests.support.plain_pipelines import write_pipeline
from tests.support.sources import parsed

LANGUAGE, IMAGES = "llama/model.safetensors", "sd15.safetensors"
CONFIG, GGUF = "llama/config.json", "llama.gguf"
MODULE = "model.layers.0.self_attn.q_proj"
# which formats `quantize` names for a base; what `merge` says of a folder as its output
MODEL, FILE, PIPELINE = ("nf4", "a folder"), ("f32", ".gguf"), ("nf4", "fits no part")
IMAGE_FILE, IMAGE_FOLDER = ("comfy-fp8", ".safetensors"), ("comfy-fp8", "no part of the file")
WRONG = ("nf4", "the base has no")  # an adapter of another model
TWO = "the folder has 2 GGUF models"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("bases")
    model, settings, tensors = gguf_files.llama()
    gguf_files.write(home / GGUF, "llama", settings, tensors)
    model.save_pretrained(home / "llama")
    images = load_file(write_family("sd15", home / IMAGES))
    own = {k.removeprefix(DENOISER): v for k, v in images.items() if k.startswith(DENOISER)}
    gguf_files.write_images(home / "sd15.gguf", own, arch="sd1", in_rows=True)
    write_pipeline(home / "pipeline")
    (home / "unet.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    (home / "a").mkdir()
    factors = {"A": torch.ones(2, 64), "B": torch.ones(64, 2)}
    tensors = {f"base_model.model.{MODULE}.lora_{k}.weight": v for k, v in factors.items()}
    save_file(tensors, home / "a" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (home / "a" / "adapter_config.json").write_text(json.dumps(settings))
    return home


def said(call: Callable[[], object]) -> str:
    """What a refusal says; "" where there is none."""
    try:
        call()
    except AdapterkitError as error:
        errors = getattr(error, "errors", (error,))
        return "; ".join(f"{one.problem} | {one.expected}" for one in errors)
    return ""


@pytest.mark.parametrize("files, single, expected, name", [
    ({CONFIG: "config.json", LANGUAGE: "model.safetensors", GGUF: "m.gguf"}, "", MODEL, "llama"),
    ({CONFIG: "config.json", LANGUAGE: "model.safetensors", GGUF: "m.gguf"}, "m.gguf", FILE,
     "llama"),
    ({CONFIG: "config.json", GGUF: "m.gguf"}, "", FILE, "llama"),
    ({GGUF: "a.gguf", "sd15.gguf": "b.gguf"}, "", (TWO, TWO), TWO),
    ({GGUF: "a.gguf", "sd15.gguf": "b.gguf"}, "b.gguf", FILE, "sd15"),
    ({CONFIG: "config.json", LANGUAGE: "model.safetensors", GGUF: "a.gguf", "sd15.gguf": "b.gguf"},
     "", MODEL, "llama"),
    ({"pipeline": ""}, "", PIPELINE, None),
    ({"pipeline": "", GGUF: "m.gguf"}, "", PIPELINE, None),
    ({"pipeline": "", CONFIG: "config.json", LANGUAGE: "model.safetensors"}, "", MODEL, "llama"),
    ({IMAGES: "i.safetensors"}, "i.safetensors", IMAGE_FILE, "sd15"),
    ({IMAGES: "i.safetensors", "unet.json": "config.json"}, "i.safetensors", IMAGE_FILE, "sd15"),
    ({IMAGES: "i.safetensors", CONFIG: "config.json"}, "i.safetensors", WRONG, "sd15"),
    ({IMAGES: "i.safetensors"}, "", IMAGE_FOLDER, None),
    ({IMAGES: "i.safetensors", GGUF: "m.gguf"}, "", IMAGE_FOLDER, None),
    ({IMAGES: "model.safetensors", CONFIG: "config.json"}, "", WRONG, "llama"),
    ({"sd15.gguf": "i.gguf"}, "", FILE, "sd15"),
    ({"sd15.gguf": "i.gguf", CONFIG: "config.json"}, "", FILE, "sd1"),
])  # fmt: skip
def test_a_folder_that_is_two_things_is_taken_for_one(
    files, single, expected, name, home, tmp_path
):
    """`name`: of the architecture, by inspect."""
    folder = tmp_path / "base"
    for source, to in files.items():
        copy = shutil.copytree if source == "pipeline" else shutil.copyfile
        folder.mkdir(exist_ok=True)
        copy(home / source, folder / to, **({"dirs_exist_ok": True} if not to else {}))
    path, formats, kind = folder / single, *expected
    options = {"out": tmp_path / "out", "dry_run": True}
    to = "q8_0" if formats == "nf4" else "nf4"  # of which a base of this kind is not written
    assert formats in said(lambda: adapterkit.quantize(path, to=to, **options))
    found = said(lambda: adapterkit.merge(path, [home / "a"], **options))
    assert kind in found if kind != "a folder" else not found
    if name == TWO:
        assert TWO in said(lambda: adapterkit.inspect(path))
        return
    result = adapterkit.inspect(path)
    assert (result["kind"] == "pipeline") == (kind == "fits no part")
    assert (result["architecture"] or {}).get("model_type") == name


RECIPES = [block.text for block in blocks(ROOT / "docs" / "extending.md", "python")]
(TOY,) = (text for text in RECIPES if text.startswith("# adapterkit/bases/toy.py"))


def test_a_new_kind_of_base_is_one_record_one_function_and_one_row(home, tmp_path, monkeypatch):
    """The recipe in extending.md, with files of safetensors that end in .toy."""
    toy = ModuleType("adapterkit.bases.toy")
    exec(TOY, vars(toy))
    monkeypatch.setitem(sys.modules, toy.__name__, toy)
    is_toy = lambda folder: "weights.toy" in folder.files()
    monkeypatch.setattr(model_checkpoint, "is_toy", is_toy, raising=False)
    monkeypatch.setitem(doors.BASES, "core.inputs.base_door:is_toy", "bases.toy:ToyBase")
    (tmp_path / "base").mkdir()
    save_file({f"{MODULE}.weight": torch.eye(64)}, tmp_path / "base" / "weights.toy")
    adapterkit.merge(tmp_path / "base", [home / "a"], out=tmp_path / "out")
    merged = load_file(tmp_path / "out" / "weights.toy")
    assert torch.equal(merged[f"{MODULE}.weight"], torch.eye(64) + 2)
    options = {"out": tmp_path / "no", "dtype": "bf16", "dry_run": True}
    found = said(lambda: adapterkit.merge(tmp_path / "base", [home / "a"], **options))
    assert found == "--dtype with this base | a base of safetensors"


OF_KINDS = re.compile(r"adapterkit\.bases\.(gguf|images)\b")


def test_no_planner_of_a_verb_loads_a_kind_of_base():
    """Except reports that a kind of base has instead of a model's, and plan files of pipelines."""
    root, found = Path(adapterkit.__file__).parent, set()
    for path in sorted(root.rglob("*.py")):
        name = ".".join(("adapterkit", *path.relative_to(root).with_suffix("").parts))
        tree = parsed(path.read_text("utf-8"))
        modules = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
        if not OF_KINDS.match(name) and any(map(OF_KINDS.match, modules)):
            found.add(name.removeprefix("adapterkit."))
    assert found == {"many.workflows.plan_file", "verbs.look.gguf", "verbs.look.pipelines"}
