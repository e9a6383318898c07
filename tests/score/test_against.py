"""The distance from a reference: divergences and equal first tokens, from both models' logits in
float64."""

import pytest
import torch
import transformers

import adapterkit
from tests.score.test_losses import model_of, random
from tests.support import gguf_files, oracle
from tests.support.scoring import divergences, in_jsonl, logits_of, measured, random_rows
from tests.support.texts import write_rows
from tests.support.usual import usual

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = random_rows(5)


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "data.jsonl", *in_jsonl(ROWS))


def saved(model, folder):
    with oracle.quiet():
        model.float().save_pretrained(folder)
    return folder


def loaded(kind, folder):
    """The stored model; the one that was saved has random buffers, too."""
    with oracle.quiet():
        return type(model_of(kind)).from_pretrained(folder, dtype=torch.float32).eval()


def two(kind, std, tmp_path):
    """The folders of a model with noise and of one without, and what transformers loads of them."""
    folders = tmp_path / "own", tmp_path / "other"
    saved(noisy(model_of(kind), std), folders[0])
    saved(model_of(kind), folders[1])
    return folders, *(loaded(kind, folder) for folder in folders)


def noisy(model, std, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


def assert_distances(table, own, other, tolerance=1e-5):
    """The sums are those of the models' float64 logits; the smallest are not noise."""
    kl, same = divergences(logits_of(own, ROWS), logits_of(other, ROWS))
    torch.testing.assert_close(table[:, 2], kl, rtol=tolerance, atol=1e-8)
    assert torch.equal(table[:, 3], same)
    assert bool((kl > 0).all())


@pytest.mark.parametrize("std", [0.3, 0.03, 0.0003])
def test_divergences_are_those_of_both_models_logits(std, data, large, tmp_path):
    """In float32 arithmetic of the models, the smallest ones to 1e-3."""
    folders, own, other = two("llama", std, tmp_path)
    tables = measured(*folders, data=data, against=folders[1])
    assert_distances(tables[str(folders[0])], own, other, 1e-3 if std < 1e-3 else 1e-5)
    itself = tables[str(folders[1])]
    assert torch.count_nonzero(itself[:, 2]) == 0
    assert torch.equal(itself[:, 3], itself[:, 0])


@pytest.mark.parametrize("kind", usual(
    ["gemma2", "granite", "cohere", "gpt2", "phi", "mamba", "gpt_oss", "bloom"],
    ("gemma2", "granite", "phi"),
))  # fmt: skip
def test_divergences_have_the_logits_that_the_model_makes_of_its_head(kind, data, large, tmp_path):
    """Softcaps, factors and biases of the head act on both."""
    folders, own, other = two(kind, 0.1, tmp_path)
    tables = measured(folders[0], data=data, against=folders[1])
    assert_distances(tables[str(folders[0])], own, other, 1e-4)


def test_divergences_of_an_encoder_decoder(large, tmp_path):
    folders, own, other = two("t5", 0.1, tmp_path)
    rows = random_rows(4, decoder=True)
    data = write_rows(tmp_path / "data.jsonl", *in_jsonl(rows))
    (table,) = measured(folders[0], data=data, against=folders[1]).values()

    def logits(model):
        with torch.no_grad():
            return [
                model(input_ids=torch.tensor([a]), labels=torch.tensor([b])).logits[0].double()
                for a, b in rows
            ]

    kl, same = divergences(logits(own), logits(other))
    torch.testing.assert_close(table[:, 2], kl, rtol=1e-5, atol=1e-8)
    assert torch.equal(table[:, 3], same)


def test_models_of_other_layers_and_widths_are_compared(data, large, tmp_path):
    """Their heads have the same tokens."""
    folders = tmp_path / "own", tmp_path / "other"
    kinds = "gpt2", "llama"
    own, other = (loaded(k, saved(model_of(k), f)) for k, f in zip(kinds, folders, strict=True))
    (table,) = measured(folders[0], data=data, against=folders[1]).values()
    assert_distances(table, own, other)


@pytest.mark.parametrize("layers", [(1, 3), (3, 1)])
def test_a_model_of_more_or_fewer_layers_than_the_reference_is_compared(
    layers, data, large, tmp_path
):
    folders = [tmp_path / "own", tmp_path / "other"]
    for folder, count in zip(folders, layers, strict=True):
        model = model_of("llama")
        model.config.num_hidden_layers = count
        saved(random(type(model)(model.config)), folder)
    own, other = (loaded("llama", folder) for folder in folders)
    assert (len(own.model.layers), len(other.model.layers)) == layers
    (table,) = measured(folders[0], data=data, against=folders[1]).values()
    assert_distances(table, own, other)


def test_a_head_in_gguf_against_one_in_floats(data, large, tmp_path):
    gguf = pytest.importorskip("gguf")
    model, settings, tensors = gguf_files.llama()
    kind = gguf.GGMLQuantizationType.Q8_0
    tensors = {
        name: (kind, gguf.quantize(value, kind)) if value.ndim > 1 else value
        for name, value in tensors.items()
    }
    path = gguf_files.write(tmp_path / "model.gguf", "llama", settings, tensors)
    folder = saved(model, tmp_path / "base")
    with oracle.quiet():
        decoded = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=path.name, dtype=torch.float32
        ).eval()
    (table,) = measured(path, data=data, against=folder).values()
    assert_distances(table, decoded, model.float().eval(), 1e-4)
    (table,) = measured(folder, data=data, against=path).values()
    assert_distances(table, model.float().eval(), decoded, 1e-4)


def test_the_reference_has_the_adapters_too_and_a_trained_head(data, large, tmp_path):
    (folder, base), own, plain = two("llama", 0.1, tmp_path)
    how = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    oracle.train(model_of("llama"), tmp_path / "adapter", size=0.3, **how)
    tables = measured(base, folder, data=data, adapters=[tmp_path / "adapter"], against=base)
    wrapped = oracle.peft_model(loaded("llama", base), tmp_path / "adapter")
    assert_distances(tables[str(base)], plain, wrapped)
    assert torch.count_nonzero(tables[f"{base} + adapter"][:, 2]) == 0
    moved = oracle.peft_model(own, tmp_path / "adapter")
    assert_distances(tables[f"{folder} + adapter"], moved, wrapped)


def test_a_quantized_model_has_a_distance_from_its_own_source(data, tmp_path):
    base = saved(model_of("llama"), tmp_path / "base")
    adapterkit.quantize(base, out=tmp_path / "nf4", to="nf4")
    document = adapterkit.score([base, tmp_path / "nf4"], data=data, against=base)
    rows = {row["model"]: row for row in document["rows"]}
    assert rows[str(base)]["kl"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert rows[str(base)]["same_top1"] == 1.0
    far = rows[str(tmp_path / "nf4")]
    assert far["kl"]["low"] > 0 and 0 < far["same_top1"] < 1
    assert document["against"] == str(base)
