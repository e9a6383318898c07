"""Models in GGUF from and to the Hub."""

from pathlib import Path

import pytest

pytest.importorskip("gguf")

import adapterkit
from adapterkit.bases.hub.destination import parse_output
from adapterkit.core.errors import Refused
from tests.quantized.gguf.test_merges import split, train
from tests.support.gguf_files import llama, write
from tests.support.hub_client import TOKEN


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_from_the_hub_to_the_hub(hub, connect, tmp_path: Path):
    model, message, tensors = llama()
    path = write(tmp_path / "m.gguf", "llama", message, tensors)
    first, *_ = split(path, tmp_path / "parts", [9, len(tensors) - 9])
    train(model, tmp_path / "a", target_modules=["q_proj", "down_proj"])
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "out.gguf")
    adapterkit.merge(first, tmp_path / "a", out=tmp_path / "out")
    hub.commit("org/base", {"q/m.gguf": path.read_bytes(), "other.gguf": b"GGUF"})
    hub.commit("org/parts", files_of(tmp_path / "parts"))
    hub.commit("org/a", files_of(tmp_path / "a"))
    client = connect(hub, HF_TOKEN=TOKEN)

    def merge(base: object, out: object, **options: object) -> str:
        words = {"out": str(out)} | options
        return f"__import__('adapterkit').merge({str(base)!r}, 'org/a', **{words!r}).totals()"

    planned = client(merge("org/base:q/m.gguf", "hf://org/new:there/m.gguf", dry_run=True))
    assert planned["bytes_up"] == len(path.read_bytes()) and "org/new" not in hub.repos
    for base, out in (
        ("org/base:q/m.gguf", "hf://org/new:there/merged.gguf"),
        (f"org/parts:{first.name}", "hf://org/new-parts"),
        ("org/base:q/m.gguf", tmp_path / "here.gguf"),
    ):
        client(merge(base, out).replace(".totals()", ".data['notes']"))
    merged = (tmp_path / "out.gguf").read_bytes()
    assert hub.files("org/new")["there/merged.gguf"] == merged
    assert "there/merged.gguf.adapterkit.json" in hub.files("org/new")
    assert (tmp_path / "here.gguf").read_bytes() == merged
    for name, data in files_of(tmp_path / "out").items():
        assert name == "adapterkit.json" or hub.files("org/new-parts")[name] == data
    made = (
        "__import__('adapterkit').quantize('org/base:q/m.gguf', to='q8_0', out='{}').data['notes']"
    )
    for out in ("hf://org/new:q8.gguf", tmp_path / "q8.gguf"):
        client(made.format(out))
    assert hub.files("org/new")["q8.gguf"] == (tmp_path / "q8.gguf").read_bytes()
    error = client.refusal(merge(path, "hf://org/x:m.bin"))
    assert "ends in .gguf" in error.parts["expected"]
    error = client.refusal(merge(f"org/parts:{first.name}", "hf://org/x:m.gguf"))
    assert "a folder" in error.parts["expected"]


def test_names_of_outputs():
    both = ("", ".gguf")
    assert str(parse_output("hf://o/x:a/m.gguf", endings=both)) == "o/x:a/m.gguf"
    assert str(parse_output("hf://o/x:a", endings=both)) == "o/x:a"
    for text, endings in (("o/x:m.safetensors", both), ("o/x:m.gguf", ("",))):
        with pytest.raises(Refused, match="this is the name of a file"):
            parse_output(f"hf://{text}", endings=endings)
    with pytest.raises(Refused, match=r"no name of a file[\s\S]*ends in \.gguf"):
        parse_output("hf://o/x:m", endings=(".gguf",))
