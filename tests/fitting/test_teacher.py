"""The teacher's target: against both models' own predictions, wherever the adapters are."""

import pytest
import torch

from adapterkit.runtime import load
from adapterkit.verbs.fit.objective import STATES, TeacherObjective
from tests.fitting.test_gradients import images, vit
from tests.statistics.test_layerwise import MODELS as STORED
from tests.support import oracle
from tests.support.fitting import batches_of, in_float64, runs_of
from tests.support.usual import usual

Q = {"target_modules": ["q_proj"]}
TIED = {"target_modules": ["lm_head", "embed_tokens"]}
# model, data, an adapter's settings, the other's
CASES = {
    "head": (*STORED["llama"][:2], {"target_modules": ["lm_head", "q_proj"]}, Q),
    "head and its weight": (*STORED["llama"][:2], {"target_modules": ["lm_head", "q_proj"]},
                            Q | {"target_parameters": ["lm_head.weight"]}),
    "tied head": (*STORED["tied llama"][:2], TIED, Q),
    "tied, as one": (*STORED["tied llama"][:2], TIED | {"ensure_weight_tying": True}, TIED),
    "softcap": (*STORED["gemma2"][:2], {"target_modules": ["lm_head", "q_proj"]}, Q),
    "bert": (*STORED["bert"][:2], {"target_modules": ["decoder", "query"]},
             {"target_modules": ["query"]}),
    "t5": (*STORED["t5"][:2], {"target_modules": ["lm_head", "q"]}, {"target_modules": ["wo"]}),
    "bart": (*STORED["bart"][:2], {"target_modules": ["lm_head", "q_proj"]}, Q),
    "whisper": (*STORED["whisper"][:2], {"target_modules": ["proj_out", "q_proj"]}, Q),
    "classifier": (vit, images, {"target_modules": ["classifier", "projection"]},
                   {"target_modules": ["projection"]}),
}  # fmt: skip

USUAL = {"head", "head and its weight", "tied, as one", "t5"}


@torch.no_grad()
def predictions(kind, base, adapter, weight, batch):
    """Log probabilities of the places whose labels count, and the last states there, of one adapter
    on the whole model, live."""
    model = in_float64(kind.from_pretrained(base, dtype=torch.float64).eval())
    handle = load(model, adapter, name="it", dtype=torch.float64)
    handle.activate({"it": weight})
    states, head = [], model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    logits = model(**batch.inputs).logits.double()
    (states,) = states or [logits]
    labels = batch.inputs["labels"]
    if "CausalLM" in kind.__name__:
        logits, states, labels = logits[:, :-1], states[:, :-1], labels[:, 1:]
    return logits.log_softmax(-1), states, labels != -100


def expected(teacher, own):
    """Of each row, by the formula."""
    rows = []
    for p, t, counts, q, h, _ in zip(*teacher, *own, strict=True):
        kl = (p.exp() * (p - q)).sum(-1)[counts].mean()
        rows.append(kl + STATES * (h - t)[counts].square().sum() / t[counts].square().sum())
    return torch.stack(rows)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", usual(CASES, USUAL))
def test_divergence_is_of_both_models_predictions(tmp_path, large, name, whole):
    """Each model with its own adapters on the head: 0 of the teacher itself."""
    make, data, *configs = CASES[name]
    base, adapters = tmp_path / "base", [tmp_path / "a", tmp_path / "b"]
    make().save_pretrained(base)
    for seed, (adapter, config) in enumerate(zip(adapters, configs, strict=True)):
        oracle.train(make(), adapter, seed=seed, size=0.3, **config)
    inputs = data()
    with runs_of(base, adapters, tmp_path / "work", whole=whole, target=TeacherObjective) as runs:
        kind = type(runs.stored.model)
        batches = batches_of(inputs, 2)
        owners = torch.tensor([owner[0] for owner in runs.weighted_model.owners])
        runs.run((owners == 0).double(), batches, runs.target.look)
        found = [runs.losses(c.double(), batches) for c in (owners == 0, 0.7 * (owners == 1))]
        runs.number(True)
        each = runs.losses(runs.weighted_model.expanded(0.7 * (owners == 1)).double(), batches)
    ends = [predictions(kind, base, adapters[0], 1.0, batch) for batch in batches]
    others = [predictions(kind, base, adapters[1], 0.7, batch) for batch in batches]
    right = torch.cat([expected(*pair) for pair in zip(ends, others, strict=True)])
    assert float(found[0].max()) < 1e-5 < 0.01 < float(right.max())
    torch.testing.assert_close(found[1], right, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(each, found[1], rtol=1e-4, atol=1e-6)  # of each direction
