"""resize of other types of adapters: their deltas as PEFT merges them, the LoRA that comes out as
PEFT loads it."""

import json
import re
import warnings
from dataclasses import dataclass, field

import click.testing
import peft
import pytest
import torch
from peft.tuners import oft
from safetensors.torch import load_file, save_file
from torch import nn

from adapterkit import resize
from adapterkit.adapters.kinds import lokr
from adapterkit.adapters.kinds.oft import less_identity, skew
from adapterkit.adapters.peft import read_adapter
from adapterkit.checkpoint.folder import LocalFolder
from adapterkit.cli import main
from adapterkit.errors import Refused
from adapterkit.registry import members

CONFIGS = {
    "adalora": peft.AdaLoraConfig, "dora": peft.LoraConfig, "loha": peft.LoHaConfig, "lokr": peft.LoKrConfig,
    "oft": peft.OFTConfig, "vera": peft.VeraConfig,
}  # fmt: skip
FULL = 10_000  # a rank above all


class Net(nn.Module):
    """Sizes that hurt: square, tall, wide, three elements, a prime, kernels of several shapes."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(30, 12)
        self.fit = nn.Linear(12, 12)
        self.tall = nn.Linear(6, 35)
        self.wide = nn.Linear(36, 8, bias=False)
        self.tiny = nn.Linear(3, 1)
        self.prime = nn.Linear(13, 7)
        self.deep = nn.Sequential(nn.Linear(16, 20), nn.Linear(20, 4))
        self.image = nn.Conv2d(6, 10, 3)
        self.strip = nn.Conv2d(4, 6, (3, 1))
        self.point = nn.Conv2d(6, 10, 1)
        self.line = nn.Conv1d(4, 6, 3)
        self.head = nn.Linear(5, 2)


LINEAR = ["fit", "tall", "wide", "tiny", "prime", "deep.0", "deep.1"]


@dataclass(frozen=True)
class Case:
    kind: str
    targets: list[str]
    options: dict = field(default_factory=dict)
    base: bool = False
    pruned: dict | None = None  # AdaLoRA's rank_pattern

    def __str__(self):
        options = "-".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.kind}-{options}-{'+'.join(self.targets)}{'-base' * self.base}{'-pruned' * bool(self.pruned)}"


PRUNED = {
    "fit.lora_E": [True, False, True, True], "tall.lora_E": [False] * 4, "wide.lora_E": [True] * 4,
    "prime.lora_E": [False, False, True, False],
}  # fmt: skip
OFT = {"oft_block_size": 2, "use_cayley_neumann": False}
CASES = [
    Case("adalora", LINEAR, {"init_r": 4, "lora_alpha": 3}),
    Case("adalora", LINEAR, {"init_r": 1, "lora_alpha": 0}, base=True),
    Case("adalora", ["image", "point", "wide"], {"init_r": 5, "lora_alpha": 7}, base=True),
    Case(
        "adalora", ["fit", "tall", "wide", "prime"], {"init_r": 4, "lora_alpha": 3}, pruned=PRUNED
    ),
    Case(
        "adalora",
        ["fit", "wide", "prime"],
        {"init_r": 4, "lora_alpha": 0},
        pruned={k: PRUNED[k] for k in PRUNED if "tall" not in k},
    ),
    Case("dora", [*LINEAR, "tokens"], {"r": 2, "lora_alpha": 5}, base=True),
    Case("dora", ["image", "point", "line", "fit"], {"r": 3, "use_rslora": True}, base=True),
    Case("loha", LINEAR, {"r": 1, "alpha": 3}),
    Case("loha", LINEAR, {"r": 3, "alpha": 2}),
    Case(
        "loha",
        LINEAR,
        {
            "r": 2,
            "alpha": 8,
            "rank_pattern": {"wide": 5, "deep.0": 3},
            "alpha_pattern": {"^fit": 1},
        },
        base=True,
    ),
    Case("loha", ["image", "line", "point", "fit"], {"r": 2}, base=True),
    Case("loha", ["image", "fit"], {"r": 2, "use_effective_conv2d": True}),
    Case(
        "loha", ["image", "strip", "line", "fit"], {"r": 3, "use_effective_conv2d": True}, base=True
    ),
    Case("lokr", LINEAR, {"r": 1, "alpha": 3}),
    Case("lokr", LINEAR, {"r": 50, "alpha": 4}),
    Case("lokr", LINEAR, {"r": 1, "alpha": -2, "decompose_both": True}),
    Case(
        "lokr",
        LINEAR,
        {"r": 2, "decompose_factor": 2, "rank_pattern": {"tall": 1}, "alpha_pattern": {"tall": 5}},
        base=True,
    ),
    Case("lokr", ["image", "point", "fit"], {"r": 50}),
    Case("lokr", ["image", "strip", "line", "fit"], {"r": 1}, base=True),
    Case("lokr", ["image"], {"r": 1, "use_effective_conv2d": True}),
    Case("oft", [*LINEAR[:3], "deep.0"], OFT, base=True),
    Case(
        "oft",
        ["fit", "wide", "tokens", "tall", "point"],
        {"oft_block_size": 3, "block_share": True, "use_cayley_neumann": False},
        base=True,
    ),
    Case("oft", ["fit", "tokens"], {"oft_block_size": 4, "num_cayley_neumann_terms": 5}, base=True),
    Case(
        "oft", ["wide", "fit"], {"r": 3, "oft_block_size": 0, "coft": True, "eps": 0.7}, base=True
    ),
    Case("vera", LINEAR, {"r": 4}, base=True),
    Case("vera", ["fit", "deep.1"], {"r": 40}, base=True),
]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_file(Net().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def net(base):
    model = Net()
    model.load_state_dict(load_file(base / "model.safetensors"))
    return model


def trained(case, base, folder, **more):
    """The case's adapter, all its parameters random, saved by PEFT."""
    extra = {"adalora": {"total_step": 10}, "dora": {"use_dora": True}}.get(case.kind, {})
    config = CONFIGS[case.kind](
        target_modules=list(case.targets),
        **(extra | case.options | {"modules_to_save": ["head"]} | more),
    )
    model = peft.get_peft_model(net(base), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "original_module" not in name:
            nn.init.normal_(parameter, std=0.5)
    if case.pruned:
        model.peft_config["default"].rank_pattern = dict(case.pruned)
    model.save_pretrained(folder)
    return folder


def deltas(base, folder):
    """Merged weight minus base of every module that PEFT adapts, float64."""
    model = peft.PeftModel.from_pretrained(net(base), folder).double()
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "merge") and hasattr(layer, "base_layer"):
            before = layer.base_layer.weight.data.clone()
            with torch.no_grad():
                layer.merge()
            found[name] = layer.base_layer.weight.data - before
    return found


@pytest.fixture(scope="module")
def oracle_of(base, tmp_path_factory):
    """A case's adapter and its deltas, made once."""
    known = {}

    def make(case):
        if str(case) not in known:
            folder = trained(case, base, tmp_path_factory.mktemp("adapter"))
            known[str(case)] = folder, deltas(base, folder)
        return known[str(case)]

    return make


def flat(name, delta):
    return delta.T if name == "tokens" else delta.reshape(len(delta), -1)


def resized(case, base, adapter, out, **how):
    return resize(adapter, out=out, base=base if case.base else None, **how).data["parameters"]


def test_every_type_is_tested():
    assert (
        set(members("adapters.kinds")) | {"dora"} == set(CONFIGS) == {case.kind for case in CASES}
    )
    assert all(getattr(peft.PeftType, name.upper()) for name in members("adapters.kinds"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_at_full_rank_the_lora_is_the_adapter(case, base, oracle_of, tmp_path):
    """And what PEFT loads of it is: its deltas, the trained head, a plain config."""
    adapter, want = oracle_of(case)
    resized(case, base, adapter, tmp_path / "out", rank=FULL)
    got = deltas(base, tmp_path / "out")
    assert {name for name, delta in want.items() if delta.any()} == set(got)
    for name, delta in got.items():
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
@pytest.mark.parametrize("rank", [1, 3])
def test_at_a_smaller_rank_it_is_the_best_approximation(case, rank, base, oracle_of, tmp_path):
    """The error is that of the dense decomposition's truncation, and the receipt says it."""
    adapter, want = oracle_of(case)
    metrics = resized(case, base, adapter, tmp_path / "out", rank=rank)
    got = deltas(base, tmp_path / "out")
    for name, delta in got.items():
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
def test_other_cuts(case, base, oracle_of, tmp_path):
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
    want, got = deltas(base, adapter), deltas(base, tmp_path / "out")
    assert all(
        torch.allclose(got[name], want[name], rtol=1e-5, atol=1e-6) for name in ("fit", "tall")
    )


def test_a_plan_knows_the_largest_rank_of_each_cut(base, oracle_of, tmp_path, monkeypatch):
    """With a size none may have more than so many times the rank that all could have alike."""
    monkeypatch.setattr("adapterkit.verbs.resize.SHARES", 2)
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
    want, got = deltas(base, adapter), deltas(base, tmp_path / "out")
    assert all(torch.allclose(got[name], want[name], atol=1e-5) for name in want)


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


def test_a_large_whole_factor_is_not_decomposed_in_full(base, tmp_path, monkeypatch):
    """The product's leading triplets need only the leading ones of each factor."""
    monkeypatch.setattr(lokr, "SMALL", 0)
    case = Case("lokr", LINEAR, {"r": 50, "alpha": 4})
    adapter = trained(case, base, tmp_path / "adapter")
    resized(case, base, adapter, tmp_path / "out", rank=2)
    want, got = deltas(base, adapter), deltas(base, tmp_path / "out")
    for name, delta in got.items():
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
    got = torch.block_diag(*less_identity(skew(upper, 5, eps), terms))
    # PEFT takes eps / sqrt(blocks) in float32
    assert torch.allclose(got, want, atol=1e-12, rtol=1e-6)


# -- refusals --------------------------------------------------------------------------------------


def edited(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def rewritten(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


SIMPLE = {
    "adalora": Case("adalora", ["fit", "tall"], {"init_r": 3}),
    "loha": Case("loha", ["fit", "tall"], {"r": 2}),
    "lokr": Case("lokr", ["fit", "tall"], {"r": 1}),
    "oft": Case("oft", ["fit", "tall"], {"oft_block_size": 3}, base=True),
    "vera": Case("vera", ["fit", "tall"], {"r": 3}, base=True),
}


@pytest.fixture(params=SIMPLE)
def simple(request, base, tmp_path):
    case = SIMPLE[request.param]
    return case, trained(case, base, tmp_path / "adapter")


def refused(case, base, adapter, tmp_path, match, **how):
    with pytest.raises(Refused) as caught:
        resized(case, base, adapter, tmp_path / "out", **({"rank": 2} | how))
    assert re.search(match, str(caught.value)), str(caught.value)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_an_unknown_setting_is_refused(simple, base, tmp_path):
    case, adapter = simple
    text = refused(case, base, edited(adapter, use_magic=True, more_magic=3), tmp_path, "use_magic")
    assert "more_magic" in text and "2 problems" in text


def test_settings_that_make_no_sense_are_refused(simple, base, tmp_path):
    case, adapter = simple
    for key in members("adapters.kinds")[case.kind].settings:
        now = json.loads((adapter / "adapter_config.json").read_text())[key]
        refused(case, base, edited(adapter, **{key: "many"}), tmp_path, f"{key} = 'many'")
        edited(adapter, **{key: now})
    refused(case, base, edited(adapter, modules_to_save="head"), tmp_path, "modules_to_save")


@pytest.mark.parametrize(
    "kind", [kind for kind in SIMPLE if kind != "oft"]
)  # whose modules have one
def test_a_missing_tensor_is_refused(kind, base, tmp_path):
    adapter = rewritten(
        trained(SIMPLE[kind], base, tmp_path / "adapter"),
        lambda t: t.pop(next(k for k in t if ".fit." in k)),
    )
    refused(SIMPLE[kind], base, adapter, tmp_path, "fit has .*\n.*also ")


def test_a_tensor_of_another_shape_is_refused_with_all_others(simple, base, tmp_path):
    case, adapter = simple

    def cut(tensors):
        for key in [k for k in tensors if ".fit." in k or ".tall." in k]:
            tensors[key] = torch.zeros(5, 4)

    text = refused(case, base, rewritten(adapter, cut), tmp_path, "fit: ")
    assert "tall: " in text


def test_a_tensor_of_another_type_of_adapter_is_refused(simple, base, tmp_path):
    case, adapter = simple
    key = "base_model.model.fit.boft_R"
    refused(
        case, base, rewritten(adapter, lambda t: t.update({key: torch.ones(1)})), tmp_path, "boft_R"
    )


def test_a_module_inside_another_adapters_layer_is_refused(simple, base, tmp_path):
    case, adapter = simple

    def wrap(tensors):
        for key in [k for k in tensors if ".fit." in k]:
            tensors[key.replace(".fit.", ".fit.base_layer.")] = tensors.pop(key)

    refused(case, base, rewritten(adapter, wrap), tmp_path, "fit.base_layer.* lies inside")


def test_integers_are_refused(simple, base, tmp_path):
    case, adapter = simple

    def count(tensors):
        key = next(k for k in tensors if ".fit." in k)
        tensors[key] = tensors[key].int()

    refused(case, base, rewritten(adapter, count), tmp_path, "is I32")


def test_another_base_is_refused(simple, base, tmp_path):
    """Its `fit` has other shapes, its `tall` is missing."""
    _, adapter = simple
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    save_file({"fit.weight": torch.zeros(11, 11)}, other / "model.safetensors")
    with pytest.raises(Refused) as caught:
        resize(adapter, base=other, out=tmp_path / "out", rank=2)
    assert "no matrix tall.weight" in str(caught.value) and "fit: " in str(caught.value)


def test_keeping_alpha_is_refused(simple, base, tmp_path):
    case, adapter = simple
    refused(case, base, adapter, tmp_path, "--alpha keep", alpha="keep")


@pytest.mark.parametrize("kind", ["oft", "vera"])
def test_without_its_base_it_is_refused(kind, base, tmp_path):
    adapter = trained(SIMPLE[kind], base, tmp_path / "adapter")
    refused(
        Case(kind, []),
        base,
        adapter,
        tmp_path,
        f"a {kind.upper()} adapter without its base.*\n.*--base BASE",
    )


def test_other_verbs_point_here(base, tmp_path):
    from adapterkit import merge

    adapter = trained(SIMPLE["loha"], base, tmp_path / "adapter")
    with pytest.raises(Refused, match="(?s)peft_type 'LOHA'.*adapterkit resize"):
        merge(base, [adapter], out=tmp_path / "out")


def test_types_that_nobody_knows_are_refused(base, tmp_path):
    adapter = edited(trained(SIMPLE["loha"], base, tmp_path / "adapter"), peft_type="IA3")
    refused(
        SIMPLE["loha"],
        base,
        adapter,
        tmp_path,
        "peft_type 'IA3'\n  expected: LORA, ADALORA, LOHA, LOKR, OFT, VERA",
    )
    refused(SIMPLE["loha"], base, edited(adapter, peft_type=None), tmp_path, "peft_type None")


def test_vera_without_its_projections_is_refused(base, tmp_path):
    adapter = trained(SIMPLE["vera"], base, tmp_path / "adapter", save_projection=False)
    refused(
        SIMPLE["vera"], base, adapter, tmp_path, "(?s)save_projection false.*adapterkit extract"
    )
    refused(
        SIMPLE["vera"],
        base,
        edited(adapter, save_projection=True),
        tmp_path,
        "no vera_A and no vera_B",
    )


def test_oft_of_a_kernel_is_refused(base, tmp_path):
    case = Case("oft", ["image", "fit"], {"oft_block_size": 3}, base=True)
    refused(
        case, base, trained(case, base, tmp_path / "adapter"), tmp_path, "image: OFT of a kernel"
    )


def test_the_series_of_old_peft_is_refused(base, tmp_path):
    adapter = edited(trained(SIMPLE["oft"], base, tmp_path / "adapter"), peft_version="0.17.1")
    refused(SIMPLE["oft"], base, adapter, tmp_path, "use_cayley_neumann, and peft_version 0.17.1")


def test_a_whole_w2_on_a_conv1d_is_refused(base, tmp_path):
    """PEFT's product there is a permuted one: no Kronecker product."""
    case = Case("lokr", ["line"], {"r": 50})
    refused(case, base, trained(case, base, tmp_path / "adapter"), tmp_path, "line: PEFT's product")


def test_a_kernel_of_one_axis_needs_the_base(base, tmp_path):
    case = Case("loha", ["line", "strip", "fit"], {"r": 2, "use_effective_conv2d": True})
    text = refused(
        case, base, trained(case, base, tmp_path / "adapter"), tmp_path, "line: a kernel"
    )
    assert "strip: a kernel" in text and "fit" not in text


def test_a_grouped_convolution_is_refused(tmp_path):
    """Its weight does not show it: (8, 1, 7, 7) could be a convolution of one channel."""
    import transformers

    from tests.support import oracle

    oracle.save_base(
        transformers.ConvNextModel(
            transformers.ConvNextConfig(hidden_sizes=[8], depths=[1], num_stages=1)
        ),
        tmp_path,
        "fp32",
    )
    model = transformers.ConvNextModel.from_pretrained(tmp_path)
    peft.get_peft_model(model, peft.LoHaConfig(target_modules=["dwconv"], r=1)).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(Refused, match="dwconv has 8 groups"):
        resize(tmp_path / "adapter", base=tmp_path, out=tmp_path / "out", rank=1)


def test_a_wrong_rank_pattern_is_refused(base, tmp_path):
    case = Case(
        "adalora",
        ["fit", "prime"],
        {"init_r": 4},
        pruned={k: PRUNED[k] for k in ("fit.lora_E", "prime.lora_E")},
    )
    adapter = trained(case, base, tmp_path / "adapter")
    refused(case, base, edited(adapter, rank_pattern=None), tmp_path, "(?s)fit: .*prime: ")
    refused(
        case,
        base,
        edited(adapter, rank_pattern={"fit.lora_E": [1, 0]}),
        tmp_path,
        "lists of true and false",
    )


def test_an_adapter_pruned_to_nothing_is_refused(base, tmp_path):
    case = Case("adalora", ["tall"], {"init_r": 4}, pruned={"tall.lora_E": [False] * 4})
    refused(
        case, base, trained(case, base, tmp_path / "adapter"), tmp_path, "no module with factors"
    )


def test_dora_of_a_changed_base_is_refused(base, tmp_path):
    case = Case("dora", ["fit"], base=True)
    adapter = edited(trained(case, base, tmp_path / "adapter"), init_lora_weights="pissa")
    refused(case, base, adapter, tmp_path, "initialised by pissa")


def test_dora_of_a_row_of_zeros_has_no_value(base, tmp_path):
    from adapterkit.errors import Unrecoverable

    case = Case("dora", ["fit"], base=True)
    adapter = trained(case, base, tmp_path / "adapter")
    rewritten(adapter, lambda t: [t[k][0].zero_() for k in t if "lora_B" in k])
    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(base / "model.safetensors")
    tensors["fit.weight"][0] = 0
    save_file(tensors, broken / "model.safetensors")
    (broken / "config.json").write_text("{}")
    with pytest.raises(Unrecoverable, match="delta of fit is not finite"):
        resize(adapter, base=broken, out=tmp_path / "out", rank=2)


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


def test_a_base_that_is_not_needed_is_said_to_be_so(base, tmp_path):
    case = Case("dora", ["fit"], {"use_dora": False}, base=True)
    model = peft.get_peft_model(net(base), peft.LoraConfig(target_modules=["fit"]))
    model.save_pretrained(tmp_path / "adapter")
    receipt = resize(tmp_path / "adapter", base=base, out=tmp_path / "out", rank=2).data
    assert any("not needed" in note for note in receipt["notes"]), case
