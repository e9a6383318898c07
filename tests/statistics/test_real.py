"""A real model with its own tokenizer and chat template: SmolLM2-135M, its first three layers."""

import pydoc_data.topics
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import adapterkit
import realmodel
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.verbs.stats.data.samples import load_tokenizer
from tests.support import oracle
from tests.support.texts import write_rows

LENGTH = 48
MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return realmodel.smollm2(layers=3, shards=2)


def test_covariances_that_loftq_takes(smollm2, tmp_path) -> None:
    """Those of the model in float64, to the rounding of its bfloat16."""
    texts = list(pydoc_data.topics.topics.values())[:3]
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    data = write_rows(
        tmp_path / "texts.jsonl", *({"text": text} for text in texts), {"messages": chat}
    )
    out = tmp_path / "s.safetensors"
    receipt = adapterkit.stats(smollm2, data=data, out=out, length=LENGTH, batch=2)
    tokenizer = load_tokenizer(LocalFolder(smollm2))
    rows = [tokenizer(text)["input_ids"][:LENGTH] for text in texts]
    rows.append(tokenizer.apply_chat_template(chat, return_dict=False)[:LENGTH])
    assert receipt.data["totals"]["tokens_counted"] == sum(map(len, rows))
    assert any("chat template does not mark" in note for note in receipt.data["notes"])

    model = oracle.load_checked(transformers.LlamaForCausalLM, smollm2).double()
    names = [f"model.layers.{layer}.{module}" for layer in range(3) for module in MODULES]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    parameters = receipt.data["parameters"].items()
    tensors = load_file(out)
    shared = {other: name for name, metric in parameters for other in metric.get("shared", ())}
    for name in names:
        x = torch.cat(seen[name])
        expected = x.T @ x / len(x)
        actual = tensors[f"{shared.get(name, name)}.covariance"].double()
        assert (actual - expected).norm() <= 0.03 * expected.norm(), name

    loftq = adapterkit.loftq(
        smollm2, rank=4, iterations=1, targets="q_proj", stats=out, out=tmp_path / "out"
    )
    metrics = [m for m in loftq.data["parameters"].values() if "damping" in m]
    assert len(metrics) == 3 and all(m["error_after"] < 0.8 * m["error"] for m in metrics)
