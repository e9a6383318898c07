"""check: what an engine does with an adapter, and the commands that repair it."""

import json
import shlex
import shutil

import peft
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.cli import main
from adapterkit.errors import AdapterkitError, Refused
from adapterkit.formats.engines import engines
from adapterkit.formats.library import formats
from adapterkit.reports.findings import engine_check
from tests.support import oracle
from tests.support.adapter_samples import all_samples

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def verdicts(document):
    return [row["verdict"] for row in document["findings"]]


@pytest.fixture
def edited(lora, tmp_path):
    """The adapter with other tensors, or another config."""

    def make(change=None, **config):
        folder = tmp_path / "edited"
        shutil.copytree(lora, folder, dirs_exist_ok=True)
        settings = json.loads((folder / CONFIG).read_text()) | config
        (folder / CONFIG).write_text(json.dumps(settings))
        if change:
            tensors = load_file(folder / WEIGHTS)
            change(tensors)
            save_file(tensors, folder / WEIGHTS)
        return folder

    return make


@pytest.mark.parametrize("engine", engines())
def test_every_engine_is_of_a_format_that_is_written(engine):
    client = engines()[engine]
    form = formats()[client.format]
    assert form.writes and client.reads(form) and client.sources and client.version
    assert client.loading(client.format, "FILE", "BASE", 8) == client.load.format(
        file="FILE", base="BASE", rank=8
    )


@pytest.mark.parametrize("engine", ["peft", "transformers", "vllm", "sglang"])
def test_a_plain_adapter_is_taken(engine, lora, llama):
    document = adapterkit.check(lora, program=engine, base=llama)
    assert document["takes"] and document["modules"] == 14, document["findings"]


@pytest.mark.parametrize("sample", all_samples(), ids=lambda sample: sample.id)
def test_the_format_of_each_sample_is_read_by_its_clients(sample):
    """And where one does not read it, the finding says which command makes what it reads."""
    form = formats()[sample.form]
    for name, client in engines().items():
        try:
            document = adapterkit.check(sample.path, program=name)
        except AdapterkitError:  # which cannot be read without an option
            continue
        reads = client.title in form.clients or client.format == form.name
        unread = [row for row in document["findings"] if "does not read" in row["problem"]]
        assert bool(unread) != reads or form.layout == "adapter", (name, document)
        assert all(f"--to {client.format} " in row["do"] for row in unread)
        assert document["takes"] == (not document["findings"])


def repaired(document, adapter, base, out):
    """The adapter after the command of the first finding."""
    do = document["findings"][0]["do"].split(", or ")[-1]
    names = {"ADAPTER": str(adapter), "BASE": str(base), "DIR": str(out), "N": "4"}
    program, *words = (names.get(word, word) for word in shlex.split(do))
    assert program == "adapterkit", document
    main(words, standalone_mode=False)
    return out


@pytest.mark.parametrize("engine, kind", [("llama.cpp", "gguf"), ("mlx", "mlx")])
def test_the_command_repairs_another_format(engine, kind, lora, llama, tmp_path):
    document = adapterkit.check(lora, program=engine, base=llama)
    assert verdicts(document) == ["refuses"]
    made = repaired(document, lora, llama, tmp_path / "made")
    assert adapterkit.check(made, program=engine, base=llama)["takes"]
    back = adapterkit.check(made, program="peft", base=llama)
    assert verdicts(back) == ["refuses"]
    assert adapterkit.check(repaired(back, made, llama, tmp_path / "back"), program="peft")["takes"]


def test_a_rank_above_the_server_s(llama, tmp_path):
    model = oracle.load(oracle.llama, llama)
    oracle.train(model, tmp_path / "large", r=20, target_modules=["q_proj"])
    document = adapterkit.check(tmp_path / "large", program="vllm", base=llama)
    assert (
        verdicts(document) == ["refuses"] and "--max-lora-rank 20" in document["findings"][0]["do"]
    )
    made = repaired(document, tmp_path / "large", llama, tmp_path / "small")
    assert adapterkit.check(made, program="vllm", base=llama)["takes"]
    assert adapterkit.check(tmp_path / "large", program="peft", base=llama)["takes"]


def test_a_dora_where_there_is_none(llama, tmp_path):
    model = oracle.load(oracle.llama, llama)
    oracle.train(model, tmp_path / "dora", use_dora=True, target_modules=["q_proj"])
    document = adapterkit.check(tmp_path / "dora", program="vllm", base=llama)
    assert verdicts(document) == ["refuses"] and "magnitude" in document["findings"][0]["problem"]
    assert adapterkit.check(tmp_path / "dora", program="peft", base=llama)["takes"]


def test_a_module_that_the_base_does_not_have(edited, llama):
    """PEFT leaves it out with a warning, of the modules that got nothing."""

    def rename(tensors):
        for key in [key for key in tensors if "layers.1.self_attn.q_proj" in key]:
            tensors[key.replace("layers.1", "layers.7")] = tensors.pop(key)

    folder = edited(rename)
    model = oracle.load(oracle.llama, llama)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = peft.PeftModel.from_pretrained(model, folder)
    names = [name for name, _ in loaded.named_parameters()]
    assert not any("layers.7" in name for name in names)
    document = adapterkit.check(folder, program="peft", base=llama)
    assert not document["takes"] and "layers.7" in json.dumps(document["findings"])


def test_towers_are_told(edited):
    def add(tensors):
        for key in [key for key in tensors if "layers.1.self_attn.q_proj" in key]:
            tensors[key.replace("model.layers", "visual.blocks")] = tensors[key].clone()

    folder = edited(add)
    for engine, verdict in (("vllm", "drops"), ("sglang", "drops"), ("llama.cpp", "refuses")):
        rows = adapterkit.check(folder, program=engine)["findings"]
        assert any(row["verdict"] == verdict and row["modules"] == 1 for row in rows), rows


def test_another_id_of_the_base(edited, llama, monkeypatch):
    folder = edited(base_model_name_or_path="org/other")
    document = adapterkit.check(folder, program="peft", base=llama)
    assert document["takes"]  # a folder may have any name
    open_model = engine_check.open_base

    def open_base(text):
        base = open_model(text)
        base.folder.origin["repo"] = "org/base"
        return base

    monkeypatch.setattr(engine_check, "open_base", open_base)
    document = adapterkit.check(folder, program="peft", base=llama)
    assert verdicts(document) == ["differs"] and "edit ADAPTER" in document["findings"][0]["do"]


def test_the_command(lora, llama):
    words = ["check", str(lora), "--for", "vllm", "--base", str(llama)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0 and "takes all 14 modules" in result.stdout
    result = CliRunner().invoke(main, ["check", str(lora), "--for", "mlx"])
    assert result.exit_code == 1 and "do: adapterkit convert" in result.stdout
    with pytest.raises(Refused, match="ollama"):
        adapterkit.check(lora, program="ollama")
    assert json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)["check"] == 1
