"""JSON and YAML of strangers with a value in one place that is nested, large or of another kind:
refused in four parts, or taken; never a traceback, never long."""

import json
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import adapterkit
from adapterkit.adapters.formats.files.configs import MAX_YAML
from adapterkit.bases.images import block_weights
from adapterkit.bases.quantized.codecs import comfy
from adapterkit.core.errors import AdapterkitError
from adapterkit.verbs.shared.statistics_file import METADATA, metadata_of
from tests.support.planned import planned
from tests.support.raw_files import WIDTH, MemoryFolder, Stored, base, file_of, plain
from tests.support.usual import usual

DEEP = 100_000
# texts of JSON in the place of a value
HOSTILE = (
    "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 900 + "]" * 900,
    "9" * 5000, "1e999", "NaN", "12345678901234567890123", '"\\ud800"', '"\\u0000\\n\\u202e"',
    f'"{"x" * 1_000_000}"', "[" + "1," * 1000 + "1]", "null", "true", "0", "-1", "1.5", '""',
    '"x"', "[]", "[[1]]", "[null]", "{}", '{"a": {}}',
)  # fmt: skip
MARK = "@@"
CARD = "---\ntags:\n- a\n---\ntext\n"
SETTINGS = {"pad_token": "x", "added_tokens_decoder": {"0": {"content": "x"}}}


def mutations(value: Any) -> Iterator[str]:
    """The JSON of a value, with each of the hostile texts in the place of each of its parts."""
    for each in _marked(value):
        for text in HOSTILE:
            yield json.dumps(each).replace(json.dumps(MARK), text)


def _marked(value: Any) -> Iterator[Any]:
    yield MARK
    if isinstance(value, dict):
        for key, one in value.items():
            yield from (value | {key: inner} for inner in _marked(one))
    elif isinstance(value, list) and value:
        yield from ([inner, *value[1:]] for inner in _marked(value[0]))


def survived(call: Callable[[], object], about: str) -> bool:
    """Whether a call is refused, in four parts; any other error, and a long wait, is a failure."""
    began = time.process_time()
    try:
        call()
        is_refused = False
    except AdapterkitError as error:
        for one in getattr(error, "errors", (error,)):
            assert one.problem and one.expected and one.where and one.hint, (one, about[:200])
        is_refused = True
    assert time.process_time() - began < 1, about[:200]
    return is_refused


def tuned(folder: MemoryFolder, name: str, text: str) -> MemoryFolder:
    return MemoryFolder(folder.name, folder.content | {name: text.encode()})


def metadata_file(tensors: dict[str, Stored], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for key, one in tensors.items():
        offsets = [at, at + len(one.data)]
        header[key] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": offsets}
        at += len(one.data)
    return file_of(header, b"".join(one.data for one in tensors.values()))


# -- files of folders ------------------------------------------------------------------------------

OF_BASE = {
    "modules.json": [{"idx": 0, "path": "2_Dense"}],
    "config.json": {"hidden_size": WIDTH, "architectures": ["X"], "num_hidden_layers": 2},
    "tokenizer_config.json": SETTINGS,
    "generation_config.json": {"eos_token_id": [1]},
}
OF_ADAPTER = {
    "adapter_config.json": {"base_model_name_or_path": "org/base", "target_modules": ["q_proj"]},
    "tokenizer_config.json": SETTINGS,
    "special_tokens_map.json": {"pad_token": {"content": "x"}},
}


@pytest.mark.parametrize("name", OF_BASE)
def test_a_base_with_a_hostile_value_is_refused_or_merged(name):
    for text in mutations(OF_BASE[name]):
        survived(lambda text=text: planned(plain(), on=tuned(base(), name, text)), text)


@pytest.mark.parametrize("name", OF_ADAPTER)
def test_an_adapter_with_a_hostile_value_is_refused_or_edited(name, tmp_path):
    """With the other settings of the config as they are."""
    folder = plain().folder()
    path = folder.write(tmp_path / "adapter")
    whole = plain().config if name == "adapter_config.json" else {}
    texts = (json.dumps(MARK), *map(json.dumps, _marked(OF_ADAPTER[name])))
    for each in dict.fromkeys(texts):
        marked = json.loads(each)
        marked = whole | marked if isinstance(marked, dict) else marked
        for hostile in HOSTILE:
            text = json.dumps(marked).replace(json.dumps(MARK), hostile)
            (path / name).write_text(text, "utf-8")
            for call in (
                lambda: adapterkit.edit(path, out=tmp_path / "o", title="x", dry_run=True),
                lambda: adapterkit.inspect(path),
            ):
                survived(call, text)


# -- YAML ------------------------------------------------------------------------------------------

BOMB = "a: &a [x,x]\n" + "".join(f"b{n}: &b{n} [{'*a,' * 9}]\n" for n in range(9))
YAML = (
    "[ " * 20_000, "[" * 900 + "]" * 900, "{a: " * 500 + "1" + "}" * 500, "- " * 3000 + "x", BOMB,
    "a: &a [*a]", f"n: {'9' * 5000}", f"n: 0x{'f' * 5000}", f"n: {'1:' * 3000}1", "a: 1\na: 2",
    "d: 2020-13-45", "d: 2020-01-01T25:99:99Z", "? [a]\n: b", "? {a: b}\n: c", "a: !!bool q",
    "a: !!timestamp z", "a: !!python/object:os.system x", "tags: x", "tags: {a: b}", "- a", "5",
    "tags: [[x]]", "tags: [{a: b}]", "b: !!binary zzz", 'a: "\\U00110000"', "<<: [a]", "a: 0b_",
    "%YAML 3.0\n---\na: b", f"a: {'x' * MAX_YAML}", "\t",
)  # fmt: skip


@pytest.mark.parametrize("text", YAML, ids=lambda text: text[:20])
def test_a_card_of_hostile_yaml_is_refused(text, tmp_path):
    path = plain().folder().write(tmp_path / "adapter")
    (path / "README.md").write_text(f"---\n{text}\n---\ntext\n", "utf-8")
    assert survived(
        lambda: adapterkit.edit(path, out=tmp_path / "out", tag=("x",), dry_run=True), text
    )


def test_a_card_of_strange_yaml_keeps_its_words(tmp_path):
    path = plain().folder().write(tmp_path / "adapter")
    head = 'a: .nan\nb: 1e999\nc: 2020-01-01\n? 1\n: x\nd: "\\0"\ntags: [2020, null, a]\n'
    (path / "README.md").write_text(f"---\n{head}---\ntext\n", "utf-8")
    adapterkit.edit(path, out=tmp_path / "out", tag=("x",))
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "2020-01-01" in card and "- x\n" in card and card.endswith("---\ntext\n")


@pytest.mark.parametrize("text", YAML, ids=lambda text: text[:20])
def test_a_recipe_of_hostile_yaml_is_refused(text, tmp_path):
    (tmp_path / "recipe.yml").write_text(text, "utf-8")
    run = lambda: adapterkit.run(tmp_path / "recipe.yml", out=tmp_path / "out", dry_run=True)
    assert survived(run, text)


def test_a_recipe_with_lists_for_shared_parameters_is_refused(tmp_path):
    on, adapter = base().write(tmp_path / "base"), plain().folder().write(tmp_path / "adapter")
    recipe = {
        "merge_method": "ties", "base_model": str(on), "dtype": "float32",
        "models": [{"model": f"{on}+{adapter}", "parameters": {"weight": 1, "density": 0.5}}],
        "parameters": {"normalize": [[1]]},
    }  # fmt: skip
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe), "utf-8")
    run = lambda: adapterkit.run(tmp_path / "recipe.yml", out=tmp_path / "out", dry_run=True)
    assert survived(run, "normalize")


# -- receipts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", usual([80, 250], {80}))
def test_a_base_with_a_hostile_receipt_is_merged(most, tmp_path):
    on, adapter = base().write(tmp_path / "base"), plain().folder().write(tmp_path / "adapter")
    done, told = tmp_path / "done", adapterkit.merge(on, [adapter], out=tmp_path / "done").data
    held = {"name": "x", "weight": 1.0, "header": "0", "sha256": "0"}
    parts = {"recipe": told["recipe"], "adapters": told["adapters"], "held": [held]}
    for part, value in parts.items():
        texts = list(mutations(value))
        for text in texts[:: 1 + len(texts) // most]:
            receipt = json.dumps(told | {part: MARK}).replace(json.dumps(MARK), text)
            (done / "adapterkit.json").write_text(receipt, "utf-8")
            again = lambda: adapterkit.merge(
                done, [(adapter, -1)], out=tmp_path / "o", dry_run=True
            )
            survived(again, text)


# -- JSON within files -----------------------------------------------------------------------------


def test_metadata_of_statistics_are_refused_or_read():
    for text in mutations({"shared": {"a": "b"}, "tokens": 3}):
        shards = {"": SimpleNamespace(metadata={METADATA: text})}
        stats: Any = SimpleNamespace(shards=shards, name="stats")
        survived(lambda stats=stats: metadata_of(stats), text)


def test_block_weights_in_json_are_refused_or_read():
    names: Any = SimpleNamespace(parts={"unet": None}, denoiser="unet", all=lambda part: [])
    for text in mutations({"unet": {"down": {"block_1": [1]}, "mid": 1}}):
        survived(lambda text=text: block_weights._of_settings(text, names), text)


@pytest.mark.parametrize("text", [*HOSTILE, "{", "\xff"], ids=lambda text: text[:20])
def test_a_layer_of_comfyui_without_a_json_object_is_refused(text):
    said = torch.frombuffer(bytearray(text.encode("latin-1") or b" "), dtype=torch.uint8)
    weight: Any = SimpleNamespace(key="m.weight", kind="nvfp4")
    contradiction = comfy.Comfy.contradiction(weight, {"m.comfy_quant": said})
    assert contradiction is not None and len(contradiction[0]) < 1000
