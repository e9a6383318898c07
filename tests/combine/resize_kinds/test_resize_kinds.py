"""resize of other types of adapters: their deltas as PEFT merges them, the LoRA that comes out as
PEFT loads it."""

import json

import click.testing
import peft
import pytest
import torch
from peft.tuners import oft
from safetensors.torch import load_file
from torch import nn

from adapterkit import resize
from adapterkit.adapters.kinds import lokr
from adapterkit.cli import main
from adapterkit.core.adapter.peft import read_adapter
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.registry import members
from adapterkit.kernels.rotations import less_identity, skew
from tests.support.kinds import (
    CASES,
    CONFIGS,
    FULL,
    LINEAR,
    OFT,
    SIMPLE,
    Case,
    deltas,
    flat,
    net,
    resized,
    rewritten,
    trained,
)
from tests.support.usual import usual


def test_every_type_is_tested():
    assert set(members("kinds")) | {"dora"} == set(CONFIGS) == {case.kind for case in CASES}
    assert all(getattr(peft.PeftType, name.upper()) for name in members("kinds"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_at_full_rank_the_lora_is_the_adapter(case, base, oracle_of, tmp_path):
    """And what PEFT loads of it is: its deltas, the trained head, a plain config."""
    adapter, want = oracle_of(case)
    resized(case, base, adapter, tmp_path / "out", rank=FULL)
    actual = deltas(base, tmp_path / "out")
    assert {name for name, delta in want.items() if delta.any()} == set(actual)
    for name, delta in actual.items():
        assert torch.linalg.norm(delta - want[name]) <= 3e-6 * torch.linalg.norm(want[name]), name
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (
        config["peft_type"] == "LORA"
        and not config["use_dora"]
        and config["modules_to_save"] == ["head"]
    )
    old, new = (
        load_file(adapter / "adapter_model.safetensors"),
        load_file(tmp_path / "out" / "adapter_model.safetensors"),
    )
    read_adapter(LocalFolder(tmp_path / "out"))  # which refuses what the config does not speak of
    heads = [key for key in old if ".head." in key]
    assert len(heads) == 2 and all(torch.equal(old[key], new[key]) for key in heads)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rank", usual([1, 3], {3}))
def test_at_a_smaller_rank_it_is_the_best_approximation(case, rank, base, oracle_of, tmp_path):
    """The error is that of the dense decomposition's truncation, and the receipt says it."""
    adapter, want = oracle_of(case)
    metrics = resized(case, base, adapter, tmp_path / "out", rank=rank)
    actual = deltas(base, tmp_path / "out")
    for name, delta in actual.items():
        s = torch.linalg.svdvals(flat(name, want[name]))
        size, best = float(torch.linalg.norm(s)), float(torch.linalg.norm(s[rank:]))
        assert int((torch.linalg.svdvals(flat(name, delta)) > 1e-6 * s[0]).sum()) <= rank, name
        assert float(torch.linalg.norm(delta - want[name])) == pytest.approx(
            best, rel=1e-5, abs=3e-6 * size
        ), name
        assert metrics[name]["error"] == pytest.approx(best / size, rel=1e-4, abs=1e-3), name
        assert metrics[name]["norm"] == pytest.approx(size, rel=1e-5), name


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.targets[:2] in (LINEAR[:2], ["fit", "wide"], ["fit", "deep.1"])],
    ids=str,
)
def test_energy_and_threshold_cut_at_the_expected_rank(case, base, oracle_of, tmp_path):
    adapter, want = oracle_of(case)
    spectra = {
        name: torch.linalg.svdvals(flat(name, delta)) for name, delta in want.items() if delta.any()
    }
    for name, metric in resized(case, base, adapter, tmp_path / "energy", energy=0.8).items():
        if name in spectra:
            squares = spectra[name].square()
            assert metric["rank"] == int((squares.cumsum(0) < 0.8 * squares.sum()).sum()) + 1, name
    for name, metric in resized(case, base, adapter, tmp_path / "ratio", sv_ratio=4).items():
        if name in spectra:
            assert metric["rank"] == int((spectra[name] * 4 >= spectra[name][0]).sum()), name
    resized(case, base, adapter, tmp_path / "size", max_size="5KB")
    assert (tmp_path / "size" / "adapter_model.safetensors").stat().st_size <= 5000
    assert set(deltas(base, tmp_path / "size")) == set(spectra)


def test_the_ranknum_of_old_files_counts(base, tmp_path):
    case = SIMPLE["adalora"]
    adapter = trained(case, base, tmp_path / "adapter")
    rewritten(adapter, lambda t: t.update({"base_model.model.fit.ranknum": torch.tensor([7.0])}))
    resized(case, base, adapter, tmp_path / "out", rank=FULL)
    want, actual = deltas(base, adapter), deltas(base, tmp_path / "out")
    assert all(
        torch.allclose(actual[name], want[name], rtol=1e-5, atol=1e-6) for name in ("fit", "tall")
    )


def test_a_plan_knows_the_largest_rank_of_each_cut(base, oracle_of, tmp_path, monkeypatch):
    """With a size none may have more than so many times the rank that all could have alike."""
    monkeypatch.setattr("adapterkit.verbs.combine.tasks.truncate.SHARES", 2)
    adapter, _ = oracle_of(Case("oft", ["wide", "fit"], OFT, base=True))

    def most(**cut):
        plan = resize(adapter, base=base, out=tmp_path / "out", dry_run=True, **cut)
        return {
            task.name: task.max_outputs[0].shape[0]
            for task in plan.shards[0].tasks
            if task.name in ("wide", "fit")
        }

    assert most(rank=3) == {"wide": 3, "fit": 3}
    assert most(energy=0.5) == {"wide": 8, "fit": 12}
    alike = 4 * (36 + 8 + 12 + 12)  # bytes of rank 1 for both
    assert most(max_size=str(4 * alike)) == {"wide": 8, "fit": 8}


@pytest.mark.parametrize("kind", ["adalora", "oft", "vera"])
def test_trained_biases_are_kept(kind, base, tmp_path):
    only = {"adalora": "lora_only"}.get(kind, f"{kind}_only")
    case = Case(kind, ["fit", "tall"], {"oft_block_size": 2} if kind == "oft" else {}, base=True)
    adapter = trained(case, base, tmp_path / "adapter", bias=only)
    resized(case, base, adapter, tmp_path / "out", rank=2)
    was = peft.PeftModel.from_pretrained(net(base), adapter).base_model.model.fit.bias
    now = peft.PeftModel.from_pretrained(net(base), tmp_path / "out").base_model.model.fit.bias
    assert torch.equal(was, now) and not torch.equal(now, net(base).fit.bias)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["bias"] == "lora_only"


def test_dora_without_its_base_stays_dora(base, tmp_path):
    case = Case("dora", ["fit", "tall"], {"r": 4})
    adapter = trained(case, base, tmp_path / "adapter")
    resized(case, base, adapter, tmp_path / "out", rank=4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_dora"]
    want, actual = deltas(base, adapter), deltas(base, tmp_path / "out")
    assert all(torch.allclose(actual[name], want[name], atol=1e-5) for name in want)


@pytest.mark.parametrize("what", ["gpt2", "square"])
def test_weights_stored_in_out_are_seen_as_such(what, tmp_path):
    """GPT-2's layers: c_attn (32, 96), c_proj of the attention (32, 32)."""
    from tests.support import oracle

    name = {"gpt2": "c_attn", "square": "attn.c_proj"}[what]
    folder = tmp_path / "base"
    oracle.save_base(oracle.gpt2(), folder, "fp32")
    for kind, options in [("vera", {"r": 5}), ("dora", {"r": 3}), ("adalora", {"init_r": 3})]:
        extra = {"adalora": {"total_step": 10}, "dora": {"use_dora": True}}.get(kind, {})
        config = CONFIGS[kind](
            target_modules=[name], fan_in_fan_out=True, task_type="CAUSAL_LM", **extra, **options
        )
        model = peft.get_peft_model(oracle.load(oracle.gpt2, folder), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / kind)
        resize(tmp_path / kind, base=folder, out=tmp_path / f"{kind}-out", rank=FULL)
        merged = [
            peft.PeftModel.from_pretrained(oracle.load(oracle.gpt2, folder), tmp_path / which)
            .double()
            .merge_and_unload()
            .state_dict()
            for which in (kind, f"{kind}-out")
        ]
        untouched = oracle.load(oracle.gpt2, folder).double().state_dict()
        for key in untouched:
            assert torch.allclose(merged[0][key], merged[1][key], atol=1e-5), (kind, key)
        changed = [key for key in untouched if not torch.equal(merged[1][key], untouched[key])]
        assert changed == [
            f"transformer.h.{i}.{'attn.' * (what == 'gpt2')}{name}.weight" for i in range(2)
        ]


def test_a_large_full_factor_is_not_fully_decomposed(base, tmp_path, monkeypatch):
    """The product's leading triplets need only the leading ones of each factor."""
    monkeypatch.setattr(lokr, "SMALL", 0)
    case = Case("lokr", LINEAR, {"r": 50, "alpha": 4})
    adapter = trained(case, base, tmp_path / "adapter")
    resized(case, base, adapter, tmp_path / "out", rank=2)
    want, actual = deltas(base, adapter), deltas(base, tmp_path / "out")
    for name, delta in actual.items():
        best = torch.linalg.norm(torch.linalg.svdvals(want[name])[2:])
        assert float(torch.linalg.norm(delta - want[name])) == pytest.approx(
            float(best), rel=1e-4, abs=1e-5
        ), name


@pytest.mark.parametrize("terms", [None, 1, 2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize("eps", [None, 1e-3, 100.0])
def test_rotations_are_pefts(terms, eps):
    upper = (
        torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.3
    )
    module = oft.layer.OFTRotationModule(
        4,
        10,
        5,
        20,
        coft=eps is not None,
        eps=eps or 0.0,
        use_cayley_neumann=terms is not None,
        num_cayley_neumann_terms=terms or 5,
    )
    module.weight = nn.Parameter(upper.clone(), requires_grad=False)
    want = module.get_weight() - torch.eye(20, dtype=torch.float64)
    actual = torch.block_diag(*less_identity(skew(upper, 5, eps), terms))
    # PEFT takes eps / sqrt(blocks) in float32
    assert torch.allclose(actual, want, atol=1e-12, rtol=1e-6)


# -- the command -----------------------------------------------------------------------------------


def test_the_command_plans_and_writes(base, tmp_path):
    adapter = trained(SIMPLE["oft"], base, tmp_path / "adapter")
    words = [
        "resize",
        str(adapter),
        "--base",
        str(base),
        "--rank",
        "4",
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    planned = click.testing.CliRunner().invoke(main, [*words, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    assert {c["name"] for c in plan["computed"]} >= {"fit", "tall"} and not (
        tmp_path / "out"
    ).exists()
    done = click.testing.CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["parameters"]["fit"]["rank"] == 4
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert size <= plan["totals"]["bytes_written"]


def test_an_unneeded_base_is_noted(base, tmp_path):
    case = Case("dora", ["fit"], {"use_dora": False}, base=True)
    model = peft.get_peft_model(net(base), peft.LoraConfig(target_modules=["fit"]))
    model.save_pretrained(tmp_path / "adapter")
    receipt = resize(tmp_path / "adapter", base=base, out=tmp_path / "out", rank=2).data
    assert any("not needed" in note for note in receipt["notes"]), case
