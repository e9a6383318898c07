"""The loss of a quantized checkpoint is that of transformers on the floats that it decodes to."""

import pytest
import torch
import transformers

import adapterkit
from tests.support import gguf_files, oracle, quantized_llama
from tests.support.scoring import assert_losses, in_jsonl, measured, random_rows
from tests.support.texts import write_rows
from tests.support.usual import usual

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = [name for name in quantized_llama.FORMS if not name.startswith("mlx-")]
GGUF = ("Q4_K", "Q6_K", "Q8_0", "Q4_0", "Q5_1", "IQ4_XS", "Q2_K", "IQ3_S", "TQ1_0")


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "data.jsonl", *in_jsonl(random_rows()))


def loud(folder):
    """Its head larger, so that a loss shows each weight."""
    path = folder / "model.safetensors"
    tensors = quantized_llama.load_file(path)
    tensors["lm_head.weight"] = (tensors["lm_head.weight"].float() * 8).bfloat16()
    quantized_llama.save_file(tensors, path, {"format": "pt"})


def loaded(folder):
    with oracle.quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def assert_as_decoded(folder, data, tmp_path):
    (actual,) = measured(folder, data=data).values()
    adapterkit.dequantize(folder, out=tmp_path / "floats", dtype="fp32")
    assert_losses(actual, loaded(tmp_path / "floats"), random_rows())


@pytest.mark.parametrize("name", quantized_llama.few(FORMS))
def test_the_loss_of_a_quantized_model_is_that_of_its_floats(name, data, large, tmp_path):
    quantized_llama.llama().save_pretrained(tmp_path / "base")
    loud(tmp_path / "base")
    quantized_llama.quantize(tmp_path / "base", quantized_llama.FORMS[name])
    assert_as_decoded(tmp_path / "base", data, tmp_path)


@pytest.mark.parametrize("to, more", usual([
    ("nf4", {}), ("nf4", {"double_quant": True}), ("fp4", {}), ("int8", {}), ("mxfp4", {}),
], lambda row: row in (("nf4", {}), ("int8", {}))), ids=str)  # fmt: skip
def test_the_loss_of_what_quantize_writes_is_that_of_its_floats(to, more, data, large, tmp_path):
    quantized_llama.llama().save_pretrained(tmp_path / "base")
    loud(tmp_path / "base")
    adapterkit.quantize(tmp_path / "base", out=tmp_path / "packed", to=to, **more)
    assert_as_decoded(tmp_path / "packed", data, tmp_path)


def test_the_loss_of_a_model_in_bf16_is_that_of_its_weights_in_float32(data, large, tmp_path):
    quantized_llama.llama().save_pretrained(tmp_path / "base")
    (actual,) = measured(tmp_path / "base", data=data).values()
    assert_losses(actual, loaded(tmp_path / "base"), random_rows())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_option_dtype_is_that_of_the_arithmetic(dtype, data, tmp_path):
    quantized_llama.llama().save_pretrained(tmp_path / "base")
    (actual,) = measured(tmp_path / "base", data=data, dtype=dtype).values()
    with oracle.quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", dtype=oracle.DTYPES[dtype]
        ).eval()
    assert_losses(actual, model, random_rows())


@pytest.mark.parametrize("kind", usual(GGUF, ("Q4_K", "Q8_0", "IQ4_XS")))
def test_the_loss_of_a_gguf_file_is_that_of_transformers(kind, data, large, tmp_path):
    """Transformers decodes the file with the package `gguf`."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    more = {"num_key_value_heads": 4, "head_dim": 64}
    _, settings, tensors = gguf_files.llama(**sizes, **more)
    kind = gguf.GGMLQuantizationType[kind]
    for number, (name, value) in enumerate(sorted(tensors.items())):
        if value.ndim > 1:
            packed = gguf_files.blocks(kind, value.shape, number)
            tensors[name] = (kind, packed)
    path = gguf_files.write(tmp_path / "model.gguf", "llama", settings, tensors)
    (actual,) = measured(path, data=data).values()
    with oracle.quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=path.name, dtype=torch.float32
        ).eval()
    assert_losses(actual, model, random_rows())


@pytest.mark.parametrize("family", usual(
    ["gemma3", "qwen3moe", "gpt2", "falcon", "lfm2"], ("gemma3", "gpt2")
))  # fmt: skip
def test_the_loss_of_another_family_in_gguf_is_that_of_its_model(family, data, large, tmp_path):
    model, settings, tensors = getattr(gguf_files, family)()
    path = gguf_files.write(tmp_path / "model.gguf", family, settings, tensors)
    (actual,) = measured(path, data=data).values()
    assert_losses(actual, model.float().eval(), random_rows())
