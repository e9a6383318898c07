"""Mixed batches: every row equals that row alone with its adapter, in one pass of the model."""

import re
from contextlib import contextmanager

import peft
import pytest
import torch
import transformers
from torch import nn

from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.kernels import mixed_batch as mixed
from adapterkit.runtime import attach
from tests.support import architectures
from tests.support.card import DEVICE, Card, installed, move
from tests.support.usual import usual

NAMES = ["fr", None, "de", "fr"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "pad_token_id": 0,
}  # fmt: skip
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 96,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "init_std": 0.2,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
T5 |= {"decoder_start_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "eos_token_id": 2}
VIT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
WHISPER = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
WHISPER |= {"suppress_tokens": [], "begin_suppress_tokens": []}
MODELS = {  # class, config's class, its settings, targets, inputs
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT, ["q_proj", "v_proj", "down_proj"], "ids"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, ["c_attn", "c_fc"], "ids"),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**TEXT, "head_dim": 8, "sliding_window": 4},
        ["q_proj", "o_proj"],
        "ids",
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2},
        ["q_proj", "o_proj"],
        "ids",
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, ["q", "v", "wi"], "pairs"),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        SEQ2SEQ,
        ["q_proj", "v_proj", "fc1"],
        "pairs",
    ),
    "bert": (
        "BertForSequenceClassification",
        "BertConfig",
        TEXT,
        ["query", "value", "dense", "classifier"],
        "ids",
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", VIT, ["q_proj", "classifier"], "images"),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        WHISPER,
        ["q_proj", "fc1"],
        "sounds",
    ),
}
GENERATING = ["llama", "gpt2", "gemma3", "mixtral", "t5", "bart", "whisper"]
BEAMS = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}


def inputs(kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (4, 7), generator=generator)
    return {
        "ids": {"input_ids": ids},
        "pairs": {"input_ids": ids, "decoder_input_ids": ids[:, :3]},
        "images": {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator)},
        "sounds": {
            "input_features": torch.randn(4, 8, 32, generator=generator),
            "decoder_input_ids": ids[:, :3],
        },
    }[kind]


def row(values: dict[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    return {key: value[i : i + 1] for key, value in values.items()}


def build(name: str) -> nn.Module:
    cls, config, settings, _, _ = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()


def with_adapters(model: nn.Module, targets: list[str]):
    """Two adapters of different ranks and scales, not on the same modules."""
    adapters = attach(model, LoraConfig(4, 16, targets, init=False), name="fr", seed=1)
    second = LoraConfig(8, 8, targets[:2], rslora=True, init=False)
    adapters.attach(second, name="de", seed=2)
    return adapters


def alone(adapters, call, values, names=NAMES) -> list[torch.Tensor]:
    """What each row gives by itself."""
    outputs = []
    for i, name in enumerate(names):
        adapters.activate(name)
        outputs.append(call(**row(values, i)))
    return outputs


@pytest.fixture(autouse=True)
def inference(one_thread):
    with torch.no_grad():
        yield


@pytest.fixture
def llama():
    return with_adapters(build("llama"), ["q_proj", "v_proj", "down_proj"])


# --- equal to each row alone ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_rows_equal_each_row_alone(name):
    targets, values = MODELS[name][3], inputs(MODELS[name][4])
    model = build(name)
    adapters = with_adapters(model, targets)
    with adapters.rows(NAMES):
        mixed_rows = model(**values).logits
    expected = torch.cat(alone(adapters, lambda **v: model(**v).logits, values))
    torch.testing.assert_close(mixed_rows, expected, **CLOSE)
    adapters.activate(None)
    changed = (mixed_rows - model(**values).logits).abs().flatten(1).amax(1) > 1e-3
    assert changed.tolist() == [True, False, True, True]


@pytest.mark.parametrize("name", usual(GENERATING, {"llama", "mixtral", "t5", "whisper"}))
@pytest.mark.parametrize("options", [{"do_sample": False}, BEAMS], ids=["greedy", "beams"])
def test_generate_repeats_the_names(name, options):
    """In an encoder-decoder the encoder gets the rows, the decoder their beams."""
    values = inputs(MODELS[name][4])
    values.pop("decoder_input_ids", None)
    if "input_ids" in values:
        values["attention_mask"] = torch.ones_like(values["input_ids"])
    model = build(name)
    adapters = with_adapters(model, MODELS[name][3])

    def generate(**values):
        return model.generate(
            **values, **options, max_new_tokens=5, min_new_tokens=5, pad_token_id=0
        )

    with adapters.rows(NAMES):
        tokens = generate(**values)
    assert torch.equal(tokens, torch.cat(alone(adapters, generate, values)))
    adapters.activate(None)
    assert not torch.equal(tokens, generate(**values))


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("count", usual([2, 3, 16], {3}))
@pytest.mark.parametrize("dense, size", [(True, 0), (False, 1), (False, 3), (False, 4)])
@pytest.mark.parametrize("order", ["filled", "in order"])
def test_both_kernels_equal_each_adapter_alone(count, tokens, dense, size, order, monkeypatch):
    """The grouped one with groups that fit, are filled up, or are one row each."""
    monkeypatch.setattr(mixed, "dense_is_better", lambda *sizes: dense)
    monkeypatch.setattr(mixed, "group_size", lambda *sizes: size)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6, bias=False))
    names = [f"a{i}" for i in range(count)]
    adapters = None
    for i, name in enumerate(names):
        config = LoraConfig(1 + i % 5, 3 + i, ["0", "2"], init=False, lora_bias=False)
        if adapters is None:
            adapters = attach(model, config, name=name, seed=i)
        else:
            adapters.attach(config, name=name, seed=i)
    adapters.activate(None)
    table = {"filled": [*names, None, *names[:1] * 14], "in order": sorted(names * 3)}[order]
    x = torch.randn(len(table), tokens, 12)
    with adapters.rows(table):
        y = model(x)
    expected = alone(adapters, lambda x: model(x), {"x": x}, table)
    torch.testing.assert_close(y, torch.cat(expected), **CLOSE)


def test_sizes_of_groups():
    """Few factors are read for one token, few rows copied for many; never are there more than 8
    copies of an adapter."""
    assert mixed.group_size([0, 1, 2, -1], 1) == 1
    assert mixed.group_size([0, 0, 1, 1], 1) == mixed.group_size([0, 1, 0, 1], 1) == 2
    assert mixed.group_size([0, 1, 0, 1], 128) == 1 and mixed.group_size([0, 0, 1, 1], 128) == 2
    assert mixed.group_size([0, 1] * 32, 128) == 32


def test_a_gpu_takes_the_dense_form_for_few_tokens():
    cpu = torch.device("cpu")
    assert mixed.dense_is_better(64, 64, 1, 1024, DEVICE)
    assert not mixed.dense_is_better(64, 64, 1, 1024, cpu)
    assert not mixed.dense_is_better(64, 64, 128, 1024, DEVICE)
    assert mixed.dense_is_better(64, 1, 4096, 16, DEVICE)


def counted(rows: int, values: torch.Tensor) -> list[tuple[int, int]]:
    """Waits and launches of a GPU in the first and in the second pass of three linear layers, where
    each row has an adapter of its own; its outputs are those of the CPU."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    names = [f"a{i}" for i in range(rows)]
    adapters = attach(model, LoraConfig(1, init=False, targets="all-linear"), name="a0", seed=0)
    for i, name in enumerate(names[1:], 1):
        config = LoraConfig(1 + i % 3, 3 + i, init=False, targets="all-linear")
        adapters.attach(config, name=name, seed=i)
    adapters.activate(None)
    counts = []
    with torch.no_grad():
        with adapters.rows(names):
            expected = model(values)
        with installed(Card()) as card:
            move(model)
            x = values.to(DEVICE)
            with adapters.rows(names):
                for _ in range(2):
                    card.waits = card.launches = 0
                    y = model(x)
                    counts.append((card.waits, card.launches))
            torch.testing.assert_close(y.cpu(), expected, **CLOSE)
            assert not card.races
    return counts


@pytest.mark.parametrize("dense", [True, False])
def test_a_gpu_is_launched_as_often_for_many_rows(dense, monkeypatch):
    """Factors are put side by side at the first pass, for which what says whose they are is copied
    once; the second pass waits for nothing."""
    monkeypatch.setattr(mixed, "dense_is_better", lambda *sizes: dense)
    few, many = (counted(rows, torch.randn(rows, 2, 16)) for rows in (4, 13))
    assert few == many
    (first_waits, first), (again_waits, again) = many
    assert first_waits <= (1 if dense else 2) and again_waits == 0
    assert first <= 3 * (7 if dense else 11) and again <= 3 * 4


def test_images_of_any_shape_and_routers_get_their_rows():
    """(rows, h, w, features), and (rows * tokens, features) as routers of experts get it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.router = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            y = self.first(x)
            return self.router(y.reshape(-1, 8)).view(x.shape[0], -1, 3)

    torch.manual_seed(0)
    model = Net()
    adapters = with_adapters(model, ["first", "router"])
    values = {"x": torch.randn(4, 3, 2, 6)}
    with adapters.rows(NAMES):
        y = model(**values)
    torch.testing.assert_close(y, torch.cat(alone(adapters, model, values)), **CLOSE)


@pytest.mark.parametrize("bias", [True, False])
def test_biases_of_factors_and_magnitudes(bias):
    """DoRA scales the base's output of its own rows; PEFT refuses it in a mixed batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=bias))
    adapters = attach(model, LoraConfig(2, 4, ["0"], init=False), name="fr")
    adapters.attach(LoraConfig(3, 9, ["0"], lora_bias=True), name="de")
    adapters.attach(LoraConfig(3, 9, ["0"], dora=True), name="it")
    for name in ("de", "it"):
        for parameter in adapters.parameters(name):
            parameter.normal_()
    names, values = ["fr", None, "de", "it"], {"x": torch.randn(4, 5, 6)}
    with adapters.rows(names):
        y = model(values["x"])
        router = adapters.state.sites["0"].router
    expected = alone(adapters, lambda x: model(x), values, names)
    torch.testing.assert_close(y, torch.cat(expected), **CLOSE)
    assert router._linear is not None, "one pass"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_is_rounded_once(dtype):
    """Float32 factors on another dtype's base, as with `activate`: equal bit for bit or by a
    rounding of the output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24)).to(dtype)
    adapters = with_adapters(model, ["0"])
    x = torch.randn(4, 5, 16).to(dtype)
    with adapters.rows(NAMES):
        y = model(x)
    assert y.dtype == dtype
    expected = torch.cat(alone(adapters, lambda x: model(x), {"x": x}))
    torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_rows_under_autocast_equal_each_adapter_alone(llama):
    values = inputs("ids")
    with torch.autocast("cpu", torch.bfloat16):
        with llama.rows(NAMES):
            y = llama.model(**values).logits
        expected = torch.cat(alone(llama, lambda **v: llama.model(**v).logits, values))
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.02)


def test_factors_that_were_made_in_inference_mode_serve_outside_it(llama):
    values = inputs("ids")
    llama.activate(None)  # nothing is trained
    with llama.rows(NAMES):
        with torch.inference_mode():
            first = llama.model(**values).logits
        with torch.enable_grad():
            embeds = llama.model.get_input_embeddings()(values["input_ids"]).requires_grad_()
            second = llama.model(inputs_embeds=embeds).logits
            second.sum().backward()
    torch.testing.assert_close(first.clone(), second.detach(), **CLOSE)
    assert embeds.grad is not None


def test_equal_to_pefts_adapter_names(tmp_path):
    model = build("llama")
    adapters = with_adapters(model, ["q_proj", "v_proj", "down_proj"])
    for name in adapters.names:
        adapters.save(tmp_path / name, name=name)
    values = inputs("ids")
    with adapters.rows(NAMES):
        ours = model(**values).logits
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "fr", adapter_name="fr")
    theirs.load_adapter(tmp_path / "de", adapter_name="de")
    names = ["__base__" if name is None else name for name in NAMES]
    torch.testing.assert_close(ours, theirs.eval()(**values, adapter_names=names).logits, **CLOSE)


def test_one_name_for_all_rows_is_that_adapter(llama):
    values = inputs("ids")
    with llama.rows(["de"] * 4):
        y = llama.model(**values).logits
    llama.activate("de")
    assert torch.equal(y, llama.model(**values).logits)


def test_only_the_base_is_the_base(llama):
    values = inputs("ids")
    with llama.rows([None] * 4):
        y = llama.model(**values).logits
    llama.activate(None)
    assert torch.equal(y, llama.model(**values).logits)


def test_disabled_inside_rows_is_the_base(llama):
    values = inputs("ids")
    with llama.rows(NAMES):
        before = llama.model(**values).logits
        with llama.disabled():
            base = llama.model(**values).logits
            assert llama.model(values["input_ids"][:3]).logits.shape[0] == 3
        assert torch.equal(llama.model(**values).logits, before)
    llama.activate(None)
    assert torch.equal(base, llama.model(**values).logits)


def test_after_rows_all_is_as_before(llama):
    values = inputs("ids")
    llama.activate({"fr": 0.5, "de": 2.0})
    before, generate = llama.model(**values).logits, llama.model.generate
    hooks = len(llama.model._forward_pre_hooks), len(llama.model._forward_hooks)
    with llama.rows(NAMES):
        llama.model(**values)
    with pytest.raises(RuntimeError, match="inside"), llama.rows(NAMES):
        raise RuntimeError("inside")
    assert llama.active == {"fr": 0.5, "de": 2.0}
    assert torch.equal(llama.model(**values).logits, before)
    assert llama.model.generate == generate and "generate" not in llama.model.__dict__
    assert hooks == (len(llama.model._forward_pre_hooks), len(llama.model._forward_hooks))
    assert all(site.router is None for site in llama.state.sites.values())


# --- refused --------------------------------------------------------------------------------------


@contextmanager
def refused(*words: str):
    with pytest.raises(AdapterkitError) as caught:
        yield
    for word in words:
        assert re.search(word, str(caught.value)), str(caught.value)


def test_names_that_do_not_fit_the_batch(llama):
    calls = []
    llama.model.model.embed_tokens.register_forward_hook(lambda *args: calls.append(1))
    ids = inputs("ids")["input_ids"]
    with llama.rows(["fr", "de"]):
        with refused("2 names for a batch of 4 rows"):
            llama.model(ids)
        with refused("2 names for a batch of 4 rows"):
            llama.model(input_ids=ids)
        with refused("2 names for a batch of 4 rows"):
            llama.model.generate(ids, max_new_tokens=2)
        with refused("2 names for a batch of 3 rows"):
            llama.model.generate(input_ids=ids[:3], max_new_tokens=2)
        assert not calls
        assert llama.model(ids[:2]).logits.shape[0] == 2  # the next call is right again


def test_rows_of_unknown_names_are_refused_with_a_suggestion(llama):
    with refused("no adapter frr, es", "did you mean 'fr'"), llama.rows(["frr", "fr", "es"]):
        pass


@pytest.mark.parametrize("names", ["fr", None, 3, []])
def test_names_that_are_no_list(llama, names):
    with refused("rows: "), llama.rows(names):
        pass


def test_rows_in_training_mode_are_refused(llama):
    values = inputs("ids")
    with torch.enable_grad():
        llama.activate(None)
        llama.model.train()
        with llama.rows(NAMES), refused("training mode"):
            llama.model(**values)
        llama.model.eval()
        with llama.rows(NAMES):
            llama.model(**values)
        llama.activate("fr")
        with llama.rows(NAMES):
            with refused("fr active and trainable"):
                llama.model(**values)
            with torch.no_grad():
                llama.model(**values)


def test_rows_with_a_merged_adapter_are_refused(llama):
    llama.merge("de")
    with refused("de is merged", "unmerge first"), llama.rows(NAMES):
        pass
    llama.unmerge()
    with llama.rows(NAMES):
        pass


@pytest.mark.parametrize("change", [
    lambda h: h.activate("fr"), lambda h: h.merge("fr"), lambda h: h.delete("de"),
    lambda h: h.rescale(2.0, name="fr"), lambda h: h.detach(), lambda h: h.unmerge(),
], ids=["activate", "merge", "delete", "rescale", "detach", "unmerge"])  # fmt: skip
def test_changes_inside_rows(llama, change):
    values = inputs("ids")
    with llama.rows(NAMES):
        before = llama.model(**values).logits
        with refused("inside rows"):
            change(llama)
        with refused("rows inside rows"), llama.rows(NAMES):
            pass
        assert torch.equal(llama.model(**values).logits, before)


def test_modules_whose_input_has_other_rows():
    """A projection of something that all rows share, and one that sees rows on another axis."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared = nn.Linear(6, 6), nn.Linear(6, 6)
            self.table = nn.Parameter(torch.randn(1, 3, 6))

        def forward(self, x):
            return self.first(x) + self.shared(self.table)

    class Turned(Shared):
        def forward(self, x):
            return self.shared(self.first(x).transpose(0, 1))

    for model, tokens, shape in ((Shared(), 3, "(1, 3, 6)"), (Turned(), 8, "(8, 4, 6)")):
        adapters = with_adapters(model, ["first", "shared"])
        with adapters.rows(NAMES), refused(re.escape(shape), "of shared in a batch of 4 rows"):
            model(torch.randn(4, tokens, 6))


def test_a_tower_of_images_has_other_rows():
    """Of a model that puts images among the tokens only the language model and its head have the
    batch's rows."""
    model = architectures.BUILDS["llava"]()
    adapters = attach(model, LoraConfig(2, targets=["q_proj"]), name="fr")
    with refused("images or sounds", "vision_tower"), adapters.rows(["fr", None]):
        pass
    adapters.detach()
    text = LoraConfig(2, targets=r".*language_model.*(q_proj|embed_tokens)|lm_head")
    adapters = attach(model, text, name="fr", seed=1)
    ids = torch.arange(1, 17).view(2, 8)
    with torch.no_grad():
        adapters.activate("fr")
        expected = model(input_ids=ids).logits
        adapters.activate(None)
        base = model(input_ids=ids).logits
        with adapters.rows(["fr", None]):
            rows = model(input_ids=ids).logits
    torch.testing.assert_close(rows, torch.stack([expected[0], base[1]]))


def test_part_of_a_model_gets_no_multiples(llama):
    """Called past the model itself, where nothing says what an input of 8 rows is."""
    layer = llama.model.model.layers[0].mlp
    with llama.rows(NAMES), refused("down_proj in a batch of 4 rows"):
        layer(torch.randn(8, 32))


def test_modules_of_single_experts():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(6, 6)

        def forward(self, x):
            return self.up(x)

    model = nn.Module()
    model.experts = nn.ModuleList([Expert(), Expert()])
    adapters = attach(model, LoraConfig(2, 2, ["up"]), name="fr")
    with refused("experts.0.up, experts.1.up", "routed"), adapters.rows(["fr", None]):
        pass
    with adapters.rows(["fr", "fr"]):  # no row differs
        pass
