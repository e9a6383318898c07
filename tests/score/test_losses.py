"""The loss of a stored model is transformers' own, sample by sample, on many kinds of models and of
data."""

import pytest
import torch
import transformers

import adapterkit
from adapterkit.core.errors import Refused
from tests.statistics.conftest import TEXTS
from tests.statistics.test_layerwise import MODELS
from tests.support import oracle, tiny
from tests.support.scoring import IGNORED, assert_losses, ids_of, in_jsonl, measured, random_rows
from tests.support.texts import MARKED, save_tokenizer, write_rows
from tests.support.usual import usual

pytestmark = pytest.mark.usefixtures("one_thread")
# by what differs from a plain Llama between the embedding and the loss
KINDS = {
    "llama": "a plain one",
    "qwen3": "norms of heads",
    "gemma2": "softcaps and a scaled embedding",
    "gemma3_text": "two kinds of attention",
    "gpt2": "Conv1D, tied",
    "mixtral": "experts",
    "qwen3_moe": "experts that are stored one by one",
    "gpt_oss": "experts with biases, sinks",
    "granite": "divides its logits",
    "cohere": "multiplies its logits",
    "gpt_neox": "fused attention",
    "bloom": "alibi",
    "opt": "projected embeddings",
    "phi": "a head with a bias",
    "mamba": "a state space",
    "qwen3_next": "linear attention",
    "deepseek_v3": "latent attention, shared experts",
    "olmo2": "norms after the layers",
    "llava": "a model of images, its text",
    "qwen3_vl": "positions in three axes",
    "gemma3": "a model of images, prefixes of which see all",
}
OTHERS = ("t5", "bart", "bert", "albert")  # encoders and decoders, or masked tokens
FEW = ("llama", "gemma2", "gpt2", "qwen3_moe", "granite", "mamba", "deepseek_v3", "llava", "t5",
       "bart", "bert")  # fmt: skip


def random(model, std: float = 0.2):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std)
    return model.float().eval()


def model_of(kind):
    if kind == "roberta":
        config = tiny.shrink(transformers.RobertaConfig())
        return random(transformers.RobertaForMaskedLM(config))
    if kind == "deepseek_v3":
        config = tiny.shrink(transformers.DeepseekV3Config())
        config.num_key_value_heads, config.qk_head_dim = 4, 32
        config.first_k_dense_replace = config.topk_group = 1
        return random(transformers.DeepseekV3ForCausalLM(config))
    return random(MODELS[kind][0]() if kind in OTHERS else tiny.model(kind))


@pytest.mark.parametrize("kind", usual([*KINDS, *OTHERS, "roberta"], FEW))
def test_the_loss_of_a_stored_model_is_transformers(kind, tmp_path, large):
    model = model_of(kind)
    with oracle.quiet():
        model.save_pretrained(tmp_path / "base")
    rows = random_rows(decoder=model.config.is_encoder_decoder)
    data = write_rows(tmp_path / "data.jsonl", *in_jsonl(rows))
    (actual,) = measured(tmp_path / "base", data=data, memory=1).values()
    loaded = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    assert_losses(actual, loaded, rows)


# -- kinds of data ---------------------------------------------------------------------------------


def whole(text):
    tokens = ids_of(text)
    return tokens, tokens


def after(prompt, completion):
    """A pair's tokens; those after the prompt's count."""
    before, tokens = ids_of(prompt), ids_of(prompt + completion)
    same = 0
    while same < len(before) and before[same] == tokens[same]:
        same += 1
    return tokens, [IGNORED] * same + tokens[same:]


def spoken(*turns):
    """Turns of a user and an assistant through the marked template; the assistant's count."""
    tokens, labels = [], []
    for number, turn in enumerate(turns):
        own = ids_of(turn)
        tokens += [ids_of("A" if number % 2 == 0 else "B")[0], *own]
        labels += [IGNORED, *(own if number % 2 else [IGNORED] * len(own))]
    return tokens, labels


PAIRS = [(text, f" {text[::-1]}") for text in TEXTS]
TALKS = [("who is it?", "me"), ("no", "h", "then who?", "the others"), ("so", "th")]


def said(turns):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]


DATA = {
    "text": ([{"text": t} for t in TEXTS], [whole(t) for t in TEXTS if len(ids_of(t)) > 1]),
    "pairs": ([{"prompt": p, "completion": c} for p, c in PAIRS], [after(p, c) for p, c in PAIRS]),
    "messages": ([{"messages": said(t)} for t in TALKS], [spoken(*t) for t in TALKS]),
    "a pair of messages": (
        [{"prompt": said(t)[:-1], "completion": said(t)[-1:]} for t in TALKS],
        [  # the template writes the assistant's mark itself, so it counts without a prompt for it
            (spoken(*t)[0], [IGNORED] * (n := len(spoken(*t[:-1])[0])) + spoken(*t)[0][n:])
            for t in TALKS
        ],
    ),
    "tokens": ([{"input_ids": ids_of(t)} for t in TEXTS[:2]], [whole(t) for t in TEXTS[:2]]),
    "left padding": (
        [{"input_ids": [1, 1, *ids_of("who")], "attention_mask": [0, 0, 1, 1, 1]}],
        [whole("who")],
    ),
}


@pytest.mark.parametrize("name, kind", [
    *((name, "llama") for name in DATA), ("text", "gpt2"), ("pairs", "gemma"),
])  # fmt: skip
def test_the_tokens_that_count_are_those_of_the_data(name, kind, base, tmp_path):
    folder = base(kind)
    if name in ("messages", "a pair of messages"):
        folder = tmp_path / "base"
        oracle.save_base(getattr(oracle, kind)(), folder, "fp32")
        save_tokenizer(folder, MARKED)
    written, rows = DATA[name]
    data = write_rows(tmp_path / "data.jsonl", *written)
    (actual,) = measured(folder, data=data).values()
    model = oracle.load(getattr(oracle, kind), folder)
    assert_losses(actual, model, rows)


def test_pairs_of_an_encoder_decoder_count_the_completions(base, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", *({"prompt": p, "completion": c} for p, c in PAIRS))
    (actual,) = measured(base("t5"), data=data).values()
    rows = [(ids_of(p), ids_of(c)) for p, c in PAIRS]
    assert_losses(actual, oracle.load(oracle.t5, base("t5")), rows)


def test_masked_tokens_of_bert_count_and_others_do_not(base, tmp_path):
    rows = []
    for text in TEXTS:
        tokens = ids_of(text)
        masked = [2 if n % 3 == 0 else token for n, token in enumerate(tokens)]
        labels = [token if n % 3 == 0 else IGNORED for n, token in enumerate(tokens)]
        rows.append((masked, labels))
    data = write_rows(tmp_path / "data.jsonl", *in_jsonl(rows))
    (actual,) = measured(base("masked_bert"), data=data).values()
    model = oracle.load(lambda: oracle.bert("BertForMaskedLM"), base("masked_bert"))
    assert_losses(actual, model, rows)


def test_samples_without_a_token_to_predict_are_left_out_with_a_note(base, texts):
    document = adapterkit.score(base(), data=texts)
    kept = [text for text in TEXTS if len(ids_of(text)) > 1]
    assert len(kept) == len(TEXTS) - 1
    assert document["data"]["samples"] == len(kept)
    assert document["data"]["tokens"] == sum(len(ids_of(text)) - 1 for text in kept)
    assert "1 samples left out: no token after their first one counts" in document["notes"]


def test_data_whose_samples_are_single_tokens_is_refused(base, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", {"text": "h"}, {"text": "a"})
    with pytest.raises(Refused, match="no sample has a token that counts after its first one"):
        adapterkit.score(base(), data=data)
