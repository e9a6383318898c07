"""What cannot be measured is refused before a model runs, all of it at once, with four parts; and
nothing is written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.errors import AdapterkitError, MultipleErrors, Refused, Unrecoverable
from tests.support import oracle
from tests.support.scoring import in_jsonl, random_rows
from tests.support.texts import WORDS, save_tokenizer, write_rows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "data.jsonl", *in_jsonl(random_rows(vocabulary=40)))


def refusals(models, tmp_path, kind=Refused, **options):
    """The errors, each of four parts and with a code; nothing was written or left."""
    before = set(tmp_path.iterdir())
    with pytest.raises(AdapterkitError) as caught:
        adapterkit.score([*map(str, models)], out=tmp_path / "out.json", **options)
    assert set(tmp_path.iterdir()) == before
    error = caught.value
    errors = error.errors if isinstance(error, MultipleErrors) else [error]
    for one in errors:
        assert isinstance(one, kind) and one.code.startswith("AK")
        where = one.where or one.problem.startswith("no such path: ")
        assert all([one.problem, one.expected, where, one.hint]), str(one)
    return errors


def saved(model, folder):
    oracle.save_base(model, folder, "fp32")
    return save_tokenizer(folder)


def problems(errors):
    return [error.problem for error in errors]


def test_all_models_that_predict_no_tokens_are_named(data, tmp_path):
    good = saved(oracle.llama(), tmp_path / "good")
    image = saved(oracle.vit(), tmp_path / "image")
    classifier = saved(oracle.bert_classifier(), tmp_path / "classifier")
    alone = saved(oracle.bert(), tmp_path / "alone")
    errors = refusals([good, image, classifier, tmp_path / "none"], tmp_path, data=data,
                      against=alone)  # fmt: skip
    assert [error.where for error in errors][:2] == [str(image), str(classifier)]
    first, second, third, last = problems(errors)
    assert first == "ViTForImageClassification reads pixel_values, no text"
    assert second.startswith("BertForSequenceClassification predicts no tokens")
    assert "none" in str(errors[2]) and third
    assert last.startswith("BertModel predicts no tokens")


def test_no_model_is_refused(data, tmp_path):
    (error,) = refusals([], tmp_path, data=data)
    assert (error.problem, error.where) == ("no model", "MODEL")


def test_an_adapter_in_place_of_a_model_is_refused(lora, data, tmp_path):
    (error,) = refusals([lora], tmp_path, data=data)
    assert "adapter" in error.problem


def test_an_adapter_that_does_not_fit_is_refused(lora, data, tmp_path):
    model = oracle.llama(hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    errors = refusals([saved(model, tmp_path / "base")], tmp_path, data=data, adapters=[lora])
    assert any("q_proj" in str(error) for error in errors)


def test_an_adapter_of_other_names_is_refused(lora, data, tmp_path):
    base = saved(oracle.gpt2(), tmp_path / "base")
    errors = refusals([base], tmp_path, data=data, adapters=[lora])
    assert any("q_proj" in str(error) for error in errors)


def test_the_options_that_do_not_fit_are_refused_together(data, tmp_path):
    base = saved(oracle.llama(), tmp_path / "base")
    with pytest.raises(Refused) as caught:
        adapterkit.score(base, data=data, samples=0, dtype="nf4", memory="x")
    text = str(caught.value)
    assert all(name in text for name in ("--samples 0", "--dtype 'nf4'", "--memory 'x'"))
    with pytest.raises(Refused, match="--resume is given without --out"):
        adapterkit.score(base, data=data, resume=True)


def test_a_length_beyond_the_positions_is_refused(data, tmp_path):
    base = saved(oracle.llama(), tmp_path / "base")
    (error,) = refusals([base], tmp_path, data=data, length=65)
    assert error.problem == "--length 65 is too long" and "64" in error.expected


def test_samples_that_are_too_long_for_a_later_model_are_refused(tmp_path):
    base = saved(oracle.llama(), tmp_path / "base")
    short = saved(oracle.llama(max_position_embeddings=8), tmp_path / "short")
    data = write_rows(tmp_path / "data.jsonl", *in_jsonl(random_rows(vocabulary=40)))
    (error,) = refusals([base, short], tmp_path, data=data)
    assert error.where == str(short) and error.hint == "give --length 8"
    assert len(adapterkit.score([base, short], data=data, length=8)["rows"]) == 2


@pytest.mark.parametrize("row, words", [
    ({"input_ids": [3, 80]}, "token id 80"),
    ({"input_ids": [3, 4], "labels": [-100, -100]}, "no token of 1 samples counts"),
    ({"input_ids": [3, 4], "labels": [3, -100]}, "no sample has a token that counts after"),
    ({"other": 3}, "text, messages"),
])  # fmt: skip
def test_data_without_tokens_to_predict_are_refused(row, words, tmp_path):
    base = saved(oracle.llama(), tmp_path / "base")
    data = write_rows(tmp_path / "data.jsonl", row)
    (error,) = refusals([base], tmp_path, data=data)
    assert words in str(error)


def test_plain_text_for_a_masked_model_is_refused_without_a_word_of_gradients(tmp_path):
    base = saved(oracle.bert("BertForMaskedLM"), tmp_path / "base")
    data = write_rows(tmp_path / "data.jsonl", {"text": "who is it"})
    (error,) = refusals([base], tmp_path, data=data)
    assert error.hint == "mask the tokens yourself"
    assert not any(word in str(error) for word in ("gradient", "--what"))


def test_models_that_do_not_know_the_first_ones_tokens_are_named(tmp_path):
    base = saved(oracle.llama(), tmp_path / "base")
    small = [saved(oracle.llama(vocab_size=n), tmp_path / f"small{n}") for n in (20, 30)]
    data = write_rows(tmp_path / "data.jsonl", {"input_ids": [3, 39, 4]})
    errors = refusals([base, *small], tmp_path, data=data)
    assert [error.where for error in errors] == [*map(str, small)]
    assert {error.problem for error in errors} == {
        "the samples, in the first model's tokens, have id 39"
    }
    assert f"adapterkit score {small[0]} --data FILE" in errors[0].hint


def test_a_reference_of_another_vocabulary_is_refused_before_a_model_runs(data, tmp_path):
    base = saved(oracle.llama(), tmp_path / "base")
    other = saved(oracle.llama(vocab_size=88), tmp_path / "other")
    (error,) = refusals([base], tmp_path, data=data, against=other)
    assert error.problem == "the model predicts 80 tokens, and the reference 88"
    assert len(adapterkit.score([base, other], data=data)["rows"]) == 2  # its loss is measured


def test_models_that_read_samples_in_other_ways_are_refused(tmp_path):
    t5 = oracle.t5()
    t5.config.decoder_start_token_id = 1
    models = [saved(t5, tmp_path / "t5"), saved(oracle.llama(), tmp_path / "llama"),
              saved(oracle.bert("BertForMaskedLM"), tmp_path / "bert")]  # fmt: skip
    rows = random_rows(vocabulary=40, decoder=True)
    data = write_rows(tmp_path / "data.jsonl", *in_jsonl(rows))
    errors = refusals(models, tmp_path, data=data)
    assert [error.where for error in errors] == [*map(str, models[1:])]


def test_weights_that_are_not_finite_name_the_model(data, tmp_path):
    base = saved(oracle.llama(), tmp_path / "base")
    broken = saved(oracle.llama(), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(Unrecoverable) as caught:
        adapterkit.score([base, broken], data=data)
    error = caught.value
    assert error.code == "AK208"
    assert str(broken) in error.where and "layers.1.mlp.up_proj" in error.where


def test_predictions_that_are_not_finite_name_the_model_and_the_sample(data, tmp_path):
    base = saved(oracle.llama(), tmp_path / "base")
    broken = saved(oracle.llama(), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    for name in ("up_proj", "gate_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"].fill_(1e37)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterkitError) as caught:
        adapterkit.score([base, broken], data=data)
    error = caught.value
    assert error.problem == f"the predictions of {broken} are not finite, for 4 of 4 samples"
    assert "line 1" in error.where and error.expected and error.hint and error.code == "AK903"


# -- the file --------------------------------------------------------------------------------------


def test_a_file_that_exists_is_kept_unless_it_is_to_be_replaced(data, tmp_path):
    base, out = saved(oracle.llama(), tmp_path / "base"), tmp_path / "scores.json"
    out.write_text("mine")
    with pytest.raises(Refused, match="exists") as caught:
        adapterkit.score(base, data=data, out=out)
    assert caught.value.code == "AK601" and "--overwrite" in caught.value.hint
    assert out.read_text() == "mine"
    document = adapterkit.score(base, data=data, out=out, overwrite=True)
    assert json.loads(out.read_text()) == document
    with pytest.raises(Refused, match="is a folder") as caught:
        adapterkit.score(base, data=data, out=tmp_path, overwrite=True)
    assert caught.value.hint == "give another --out"


def test_a_folder_that_is_not_there_is_made_for_the_file(data, tmp_path):
    base = saved(oracle.llama(), tmp_path / "base")
    adapterkit.score(base, data=data, out=tmp_path / "new" / "scores.json")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["scores.json"]


# -- tokenizers ------------------------------------------------------------------------------------


def test_a_note_names_models_with_another_tokenizer(data, tmp_path):
    base = saved(oracle.llama(), tmp_path / "base")
    same, other, none = (saved(oracle.llama(), tmp_path / name) for name in ("same", "other", "no"))
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(tokenizer))
    (none / "tokenizer.json").unlink()
    notes = adapterkit.score([base, same, other, none], data=data)["notes"]
    assert [note for note in notes if "tokenizer" in note] == [
        f"{other} has another tokenizer: it reads the first model's tokens"
    ]


def test_more_tokens_in_another_models_tokenizer_are_no_difference(data, tmp_path):
    """For example the unused ones that converters to GGUF add."""
    base, more = (saved(oracle.llama(), tmp_path / name) for name in ("base", "more"))
    path = more / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["<unused>"] = len(WORDS)
    path.write_text(json.dumps(tokenizer))
    assert not [n for n in adapterkit.score([base, more], data=data)["notes"] if "tokenizer" in n]
