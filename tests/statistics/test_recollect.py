"""combine --method regmean --data (RegMean++): each layer's inputs are those of the combined layers
before it, against a dense float64 model that is run as a whole for every layer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterkit
from adapterkit.core.errors import Interrupted, Refused
from adapterkit.verbs.combine import regmean_layerwise as recollect
from tests.support import oracle
from tests.support.combining import pairs_of
from tests.support.texts import write_rows

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def t5() -> nn.Module:
    model = oracle.t5()
    model.config.decoder_start_token_id = 1
    return model


BUILDS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (lambda: oracle.llama(num_hidden_layers=3), LINEAR),
    "gpt2": (oracle.gpt2, ["c_attn", "c_fc", "c_proj"]),
    "t5": (t5, ["q", "k", "v", "wo"]),
}
WEIGHTS, ALPHA, HIDDEN = (1.0, 0.6), 0.9, 2


def samples(path: Path, seed: int, count: int = 12, *, decodes: bool = False) -> Path:
    """Some ids, of which the first HIDDEN of each row do not count; or all, and what is decoded."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for number in range(count):
        ids = torch.randint(1, 60, (10 + number % 3,), generator=generator).tolist()
        labels = ids[::-1][:7] if decodes else [-100] * HIDDEN + ids[HIDDEN:]
        rows.append({"input_ids": ids, "labels": labels})
    return write_rows(path, *rows)


@pytest.fixture(scope="module", params=BUILDS)
def case(request, tmp_path_factory) -> tuple[Callable[[], nn.Module], Path, list[Path], list[Path]]:
    """A model, its folder, two adapters of it, and data of each."""
    build, targets = BUILDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    oracle.save_base(build(), folder / "base", "fp32")
    adapters = []
    for seed, modules in ((1, targets), (2, targets[1:])):
        how = {"target_modules": modules, "fan_in_fan_out": request.param == "gpt2"}
        oracle.train(build(), folder / f"a{seed}", seed=seed, size=0.3, **how)
        adapters.append(folder / f"a{seed}")
    files = [samples(folder / f"{n}.jsonl", n, decodes=request.param == "t5") for n in (5, 6)]
    return build, folder / "base", adapters, files


def combined(case, out: Path, **options) -> dict[str, Tensor]:
    _, base, adapters, data = case
    sources = [f"{path}={weight}" for path, weight in zip(adapters, WEIGHTS, strict=True)]
    how = {"method": "regmean", "base": base, "data": data}
    adapterkit.combine(sources, out=out, **how | options)
    return pairs_of(load_file(out / "adapter_model.safetensors"))


def scaled(adapter: Path) -> dict[str, Tensor]:
    config = json.loads((adapter / "adapter_config.json").read_text())
    pairs = pairs_of(load_file(adapter / "adapter_model.safetensors"))
    return {name: config["lora_alpha"] / config["r"] * pair for name, pair in pairs.items()}


def layer_of(name: str) -> tuple[bool, int]:
    """Layers of an encoder come first."""
    number = next(int(part) for part in name.split(".") if part.isdigit())
    return not name.startswith("encoder"), number


class Dense:
    """The model in float64 with deltas (out, in) on its layers."""

    def __init__(self, build: Callable[[], nn.Module], base: Path):
        self.model = build().double().eval()
        self.model.load_state_dict(load_file(base / "model.safetensors"), strict=False)
        self.before = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    @torch.no_grad()
    def covariances(
        self, deltas: dict[str, Tensor], names: list[str], rows: list[dict]
    ) -> dict[str, Tensor]:
        """E[x xᵀ] of these layers' inputs, over the tokens that count."""
        for name, module in self.model.named_modules():
            if f"{name}.weight" in self.before and name in deltas:
                is_turned = type(module).__name__ == "Conv1D"
                delta = deltas[name].T if is_turned else deltas[name]
                module.weight.copy_(self.before[f"{name}.weight"] + delta)
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        decodes = self.model.config.is_encoder_decoder
        first = 0 if decodes else HIDDEN
        hooks = [
            self.model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, name=name: seen[name].append(args[0][0, first:])
            )
            for name in names
        ]
        for row in rows:
            more = {"labels": torch.tensor([row["labels"]])} if decodes else {}
            self.model(input_ids=torch.tensor([row["input_ids"]]), **more)
        for hook in hooks:
            hook.remove()
        for name in deltas:
            self.model.get_submodule(name).weight.copy_(self.before[f"{name}.weight"])
        return {name: torch.cat(x).T @ torch.cat(x) / len(torch.cat(x)) for name, x in seen.items()}


def expected(case) -> dict[str, Tensor]:
    """Layer after layer by whole runs: combined ones before, one adapter's own in the layer."""
    build, base, adapters, data = case
    dense, parts = Dense(build, base), [scaled(adapter) for adapter in adapters]
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in data]
    merged: dict[str, Tensor] = {}
    for layer in sorted({layer_of(name) for name in parts[0]}):
        own = [{n: d for n, d in part.items() if layer_of(n) == layer} for part in parts]
        seen = [
            dense.covariances(merged | part, [*part], its)
            for part, its in zip(own, rows, strict=True)
        ]
        for name in own[0]:
            terms = [
                (w, part[name], c[name])
                for w, part, c in zip(WEIGHTS, own, seen, strict=True)
                if name in part
            ]
            merged[name] = regression(terms)
    return merged


def regression(terms: list[tuple[float, Tensor, Tensor]]) -> Tensor:
    """(Σ w Δ C̃) (Σ w C̃)⁻¹ with the least damping."""
    cs = [ALPHA * c + (1 - ALPHA) * c.diagonal().diag() for _, _, c in terms]
    weights = [w for w, _, _ in terms]
    total = sum(w * c for w, c in zip(weights, cs, strict=True))
    ridge = 1e-6 * float(total.diagonal().mean()) / sum(weights)
    cs = [c + ridge * torch.eye(len(c), dtype=c.dtype) for c in cs]
    total = sum(w * c for w, c in zip(weights, cs, strict=True))
    outputs = sum(w * d @ c for (w, d, _), c in zip(terms, cs, strict=True))
    return torch.linalg.solve(total, outputs, left=False)


def close(actual: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> bool:
    assert actual.keys() == wanted.keys()
    errors = [float((actual[n] - d).norm() / d.norm()) for n, d in wanted.items()]
    return max(errors) <= tolerance


def test_each_layer_sees_what_the_combined_ones_make(case, tmp_path):
    wanted = expected(case)
    actual = combined(case, tmp_path / "out")
    assert close(actual, wanted, 2e-4)
    receipt = json.loads((tmp_path / "out" / "adapterkit.json").read_text())
    assert len(receipt["data"]["sha256"]) == 2
    adapterkit.verify(tmp_path / "out")
    # another result than that of each adapter's own inputs
    _, base, adapters, data = case
    stats = []
    for number, (adapter, path) in enumerate(zip(adapters, data, strict=True)):
        merged = tmp_path / f"m{number}"
        adapterkit.merge(base, [adapter], out=merged)
        stats.append(tmp_path / f"{number}.safetensors")
        adapterkit.stats(merged, data=path, out=stats[-1])
    plain = combined(case, tmp_path / "plain", base=None, data=(), stats=stats)
    assert not close(plain, wanted, 1e-2)


def test_the_refit_of_a_layer_is_what_the_next_one_sees(case, tmp_path):
    """At a rank the combined layers are those that are written."""
    exact, low = combined(case, tmp_path / "out"), combined(case, tmp_path / "low", rank=2)
    assert all(torch.linalg.matrix_rank(low[name].float()) <= 2 for name in low)
    last = max(exact, key=layer_of)
    assert not torch.allclose(low[last], exact[last], rtol=1e-3)


def test_an_interrupted_job_resumes_to_the_same_bits(case, tmp_path, large, monkeypatch):
    whole = combined(case, tmp_path / "whole")
    kept, count = recollect._LayerwiseCombiner._combine, iter(range(100))

    def combine(self, task):
        if next(count) == 4:
            raise KeyboardInterrupt
        kept(self, task)

    monkeypatch.setattr(recollect._LayerwiseCombiner, "_combine", combine)
    with pytest.raises(Interrupted):
        combined(case, tmp_path / "out")
    monkeypatch.setattr(recollect._LayerwiseCombiner, "_combine", kept)
    own, rehearsed = recollect._LayerwiseCombiner._own, []
    monkeypatch.setattr(
        recollect._LayerwiseCombiner, "_own", lambda *a: rehearsed.append(a[2]) or own(*a)
    )
    actual = combined(case, tmp_path / "out", resume=True)
    layers = len({layer_of(name) for name in actual})
    assert all(torch.equal(actual[name], whole[name]) for name in whole)
    assert len(rehearsed) < 2 * layers, "a finished layer is not rehearsed again"


def test_invalid_data_and_methods_are_refused(case, tmp_path):
    _, base, adapters, data = case
    refused = {
        "one for each adapter": {"data": data[:1]},
        "which reads inputs": {"method": "regspan"},
        "without --base": {"base": None},
        "Hub": {"out": "hf://me/out"},
        "no such": {"data": [data[0], tmp_path / "none.jsonl"]},
        "too long": {"length": 10_000},
    }
    if base.parent.name.startswith("t5"):  # has no last position
        del refused["too long"]
    for message, options in refused.items():
        how = {"method": "regmean", "base": base, "data": data, "out": tmp_path / "out"} | options
        with pytest.raises(Refused, match=message):
            adapterkit.combine(adapters, **how)
    assert not (tmp_path / "out").exists()
    plan = adapterkit.combine(
        adapters, method="regmean", base=base, data=data, out=tmp_path / "out", dry_run=True
    )
    assert plan.totals()["samples"] == 24 and not (tmp_path / "out").exists()


def test_factors_of_other_layers_are_refused(tmp_path):
    build = lambda: oracle.llama(num_hidden_layers=2)
    oracle.save_base(build(), tmp_path / "base", "fp32")
    data = [samples(tmp_path / f"{n}.jsonl", n, 2) for n in (1, 2)]
    for modules, message in ((["embed_tokens"], "embed_tokens"), (["lm_head"], "lm_head")):
        folder = tmp_path / modules[0]
        oracle.train(build(), folder, target_modules=modules)
        with pytest.raises(Refused, match=message):
            adapterkit.combine(
                [folder, folder],
                method="regmean",
                base=tmp_path / "base",
                data=data,
                out=tmp_path / "out",
            )


def test_a_plan_in_a_file_gives_the_same(case, tmp_path):
    whole = combined(case, tmp_path / "whole")
    _, base, adapters, data = case
    sources = [f"{path}={weight}" for path, weight in zip(adapters, WEIGHTS, strict=True)]
    how = {"method": "regmean", "base": base, "data": data, "out": tmp_path / "out"}
    adapterkit.write_plan(tmp_path / "plan", "combine", sources, **how)
    adapterkit.run(tmp_path / "plan")
    adapterkit.finish(tmp_path / "plan")
    actual = pairs_of(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert all(torch.equal(actual[name], whole[name]) for name in whole)
