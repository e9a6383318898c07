"""Stacks of experts along an axis, as Megatron-Bridge writes and SGLang reads them."""

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import adapterkit
from adapterkit.adapters.formats.detect import detect
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.runtime import load
from tests.formats.golden.make_sglang import STACKS as SGLANG
from tests.formats.test_servers import scale_of

GOLDEN = Path(__file__).parent / "golden"
STACKS = GOLDEN / "expert-stacks"
CASES = ("stacked", "shared", "numbered")
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX, HOME = "base_model.model.", "model.layers.0.mlp.experts."
IDS = torch.arange(6)[None]


def model_at(base: Path):
    live = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    live.set_experts_implementation("eager")
    return live.eval()


def factor(tensors: dict[str, Tensor], leaf: str, letter: str, expert: int) -> Tensor:
    """One expert's factor by the names of the three forms, in float64."""
    for key in (f"{HOME}{leaf}", f"{HOME}{expert}.{leaf}"):
        found = tensors.get(f"{PREFIX}{key}.lora_{letter}.weight")
        if found is not None:
            own = found if found.dim() == 2 else found[expert % len(found)]
            return own.double()
    raise KeyError(leaf)


def deltas(folder: Path, count: int = 3) -> dict[str, Tensor]:
    """scale · b[e] @ a[e] of each parameter in float64, (experts, out, in)."""
    tensors, config = load_file(folder / FILE), json.loads((folder / CONFIG).read_text())
    config = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False} | config
    joined: dict[str, Tensor] = {}
    for name, leaves in (
        ("gate_up_proj", ("gate_up_proj",)),
        ("gate_up_proj", ("gate_proj", "up_proj")),
        ("down_proj", ("down_proj",)),
    ):
        try:
            each = [
                torch.cat([factor(tensors, x, "B", e) @ factor(tensors, x, "A", e) for x in leaves])
                for e in range(count)
            ]
        except KeyError:
            continue
        joined[HOME + name] = scale_of(config, f"{HOME}{leaves[0]}") * torch.stack(each)
    assert len(joined) == 2
    return joined


def changes(base: Path, out: Path) -> dict[str, Tensor]:
    """What a merge in float32 changed in each stack of the model, (experts, out, in)."""
    before, after = (model_at(one).state_dict() for one in (base, out))
    turn = "gpt_oss" in (base / "config.json").read_text()
    return {
        name: (after[name].double() - value.double()).transpose(1, 2 if turn else 1)
        for name, value in before.items()
        if value.dim() == 3
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-6 * float(value.norm()), name


@pytest.fixture
def of_gpt_oss(tmp_path: Path) -> Path:
    """Shared factors for a model that keeps its matrices (in, out), gate and up by turns."""
    torch.manual_seed(0)
    out, sizes = tmp_path / "gpt_oss", {"gate_up_proj": (24, 8), "down_proj": (8, 12)}
    out.mkdir()
    tensors = {}
    for leaf, (rows, width) in sizes.items():
        shared = leaf == "gate_up_proj"
        tensors[f"{PREFIX}{HOME}{leaf}.lora_A.weight"] = torch.randn(1 if shared else 3, 2, width)
        tensors[f"{PREFIX}{HOME}{leaf}.lora_B.weight"] = torch.randn(3 if shared else 1, rows, 2)
    save_file(tensors, out / FILE)
    config = json.loads((STACKS / "shared" / CONFIG).read_text()) | {"rank_pattern": {}}
    (out / CONFIG).write_text(json.dumps(config))
    shutil.copytree(GOLDEN / "peft" / "gpt_oss" / "base", out / "base")
    return out


@pytest.fixture(params=[*CASES, "gpt_oss"])
def source(request, of_gpt_oss: Path) -> Path:
    return of_gpt_oss if request.param == "gpt_oss" else STACKS / request.param


def test_each_expert_gets_its_sum(source: Path, tmp_path: Path) -> None:
    """By a merge, by the runtime, and by PEFT on the converted file."""
    base, expected = source / "base", deltas(source)
    adapterkit.merge(base, source, out=tmp_path / "merged", dtype="fp32", verify=True)
    found = {k: v for k, v in changes(base, tmp_path / "merged").items() if k in expected}
    assert_close(found, expected)
    adapterkit.convert(source, to="peft", base=base, out=tmp_path / "plain")
    logits = model_at(tmp_path / "merged")(IDS).logits
    with warnings.catch_warnings():  # that patterns of parameters match no module
        warnings.filterwarnings("ignore", "The following rank_pattern keys")
        theirs = peft.PeftModel.from_pretrained(model_at(base), tmp_path / "plain")
    torch.testing.assert_close(theirs(IDS).logits, logits, rtol=0, atol=2e-6)
    live = model_at(base)
    load(live, tmp_path / "plain")
    torch.testing.assert_close(live(IDS).logits, logits, rtol=0, atol=2e-6)
    assert adapterkit.inspect(source, base=base)["problems"] == []


@pytest.mark.parametrize("case", ["stacked", "shared"])
def test_the_file_alone_tells_pefts_layout(case: str, tmp_path: Path) -> None:
    source = STACKS / case
    for name, base in (("alone", None), ("with base", source / "base")):
        adapterkit.convert(source, to="peft", base=base, out=tmp_path / name)
    one, two = (load_file(tmp_path / name / FILE) for name in ("alone", "with base"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert f"{PREFIX}{HOME}base_layer.lora_A.weight" in one  # gate_up_proj is the inner one


def test_single_experts_need_the_model(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="give --base"):
        adapterkit.convert(STACKS / "numbered", to="peft", out=tmp_path / "out")
    document = adapterkit.inspect(STACKS / "numbered")  # lists them one by one
    assert document["problems"] == [] and len(document["modules"]) == 9


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, tmp_path: Path) -> None:
    """PEFT's layout of a file, of what is written for SGLang, and of that from PEFT's: the same."""
    source, base = STACKS / case, STACKS / case / "base"
    adapterkit.convert(source, to="peft", base=base, out=tmp_path / "peft")
    adapterkit.convert(source, to="sglang", base=base, out=tmp_path / "sglang")
    adapterkit.convert(tmp_path / "peft", to="sglang", base=base, out=tmp_path / "again")
    if case != "stacked":  # whose factors SGLang reads of each expert, as of other adapters
        for name in ("sglang", "again"):
            tensors = load_file(tmp_path / name / FILE)
            assert tensors[f"{PREFIX}{HOME}gate_up_proj.lora_A.weight"].shape[0] == 1
            assert tensors[f"{PREFIX}{HOME}down_proj.lora_B.weight"].shape[0] == 1
        assert detect(LocalFolder(tmp_path / "sglang")).format.name == "expert-stacks"
    targets = json.loads((tmp_path / "sglang" / CONFIG).read_text())["target_modules"]
    assert {"gate_up_proj", "down_proj"} <= {*targets}
    plain = tmp_path / "peft"
    merged = [tmp_path / f"merged {name}" for name in ("peft", "sglang", "again")]
    for out, adapter in zip(merged, (plain, tmp_path / "sglang", tmp_path / "again"), strict=True):
        adapterkit.merge(base, adapter, out=out, dtype="fp32")
    first, *others = (load_file(out / "model.safetensors") for out in merged)
    for other in others:  # one rank and scale for all: scales are folded into b
        for key, value in first.items():
            torch.testing.assert_close(other[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_sglang_takes_each_form(case: str) -> None:
    for base in (None, STACKS / case / "base"):
        document = adapterkit.check(STACKS / case, program="sglang", base=base)
        verdicts = [row["verdict"] for row in document["findings"]]
        assert verdicts == ([] if case == "numbered" else ["differs"])  # one has two ranks
    rows = adapterkit.check(STACKS / case, program="peft")["findings"]
    assert any("does not read" in row["problem"] for row in rows)


@pytest.mark.parametrize("case", SGLANG)
def test_sglang_multiplies_the_sums(case: str) -> None:
    """Its own loader repeats a for gate and up, each with its rows of b."""
    folder = GOLDEN / "sglang" / case
    tensors = {key: one.double() for key, one in load_file(folder / "sglang.safetensors").items()}
    rank = json.loads((folder / CONFIG).read_text())["r"]
    found: dict[str, Tensor] = {}
    for leaf, parts in (("gate_up_proj", 2), ("down_proj", 1)):
        a, b = (tensors[key_of(leaf, letter)] for letter in "AB")
        assert a.shape[1] == parts * rank
        rows = b.chunk(parts, 1)
        products = [own @ a[:, n * rank : (n + 1) * rank] for n, own in enumerate(rows)]
        found[HOME + leaf] = tensors["scale"] * torch.cat(products, 1)
    assert_close(found, deltas(GOLDEN / SGLANG[case]))


@pytest.mark.parametrize("case", SGLANG)
def test_what_sglang_read_is_written(case: str, tmp_path: Path) -> None:
    source = GOLDEN / SGLANG[case]
    adapterkit.convert(source, to="sglang", base=source / "base", out=tmp_path / "out")
    for name in (FILE, CONFIG):
        expected = (GOLDEN / "sglang" / case / name).read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == expected


def edited(case: str, out: Path, change) -> Path:
    shutil.copytree(STACKS / case, out)
    tensors = load_file(out / FILE)
    change(tensors)
    save_file({key: one.contiguous() for key, one in tensors.items()}, out / FILE)
    return out


def key_of(leaf: str, letter: str) -> str:
    return f"{PREFIX}{HOME}{leaf}.lora_{letter}.weight"


def test_factors_shared_on_both_sides_take_the_number_from_the_model(tmp_path: Path) -> None:
    def share(tensors):
        for key in [key for key in tensors if "experts" in key]:
            tensors[key] = tensors[key][:1]

    source = edited("stacked", tmp_path / "both", share)
    with pytest.raises(AdapterkitError, match="one a and one b for all experts") as caught:
        adapterkit.convert(source, to="peft", out=tmp_path / "refused")
    command = f"adapterkit convert {source} --to peft --base BASE --out for-peft"
    assert str(caught.value).splitlines()[-1] == f"  {command}"
    base = source / "base"
    adapterkit.merge(base, source, out=tmp_path / "merged", dtype="fp32")
    found = changes(base, tmp_path / "merged")
    assert_close(found, deltas(source))


def test_gate_and_up_in_stacks_of_their_own(tmp_path: Path) -> None:
    """As SGLang's own names of Tinker's: one a for both, one b for each."""

    def part(tensors):
        a, b = (tensors.pop(key_of("gate_up_proj", letter)) for letter in "AB")
        for leaf, rows in (("gate_proj", b[:, :6]), ("up_proj", b[:, 6:])):
            tensors[key_of(leaf, "A")], tensors[key_of(leaf, "B")] = a.clone(), rows

    source = edited("shared", tmp_path / "parted", part)
    config = json.loads((source / CONFIG).read_text())
    config["rank_pattern"] = {f"experts.{leaf}": 3 for leaf in ("gate_proj", "up_proj")}
    (source / CONFIG).write_text(json.dumps(config))
    adapterkit.merge(source / "base", source, out=tmp_path / "merged", dtype="fp32")
    found = changes(source / "base", tmp_path / "merged")
    assert_close(found, deltas(source))
    assert_close(deltas(source), deltas(STACKS / "shared"))


def heights(tensors):
    tensors[key_of("gate_up_proj", "B")] = tensors[key_of("gate_up_proj", "B")][:2]


def rank(tensors):
    for letter, axis in (("A", 1), ("B", 2)):
        key = key_of("down_proj", letter)
        tensors[key] = tensors[key].narrow(axis, 0, 1)


def magnitude(tensors):
    tensors[f"{PREFIX}{HOME}down_proj.lora_magnitude_vector"] = torch.ones(8)


@pytest.mark.parametrize("change, words, more", [
    (heights, r"gate_up_proj: a \(3, 3, 8\), b \(2, 12, 3\)", {}),
    (rank, "rank 1 in the file for .*down_proj", {}),
    (magnitude, "down_proj has more than a and b", {"use_dora": True}),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(change, words: str, more, tmp_path: Path) -> None:
    source = edited("stacked", tmp_path / "wrong", change)
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps(config | more))
    if more:
        tensors = load_file(source / FILE)
        names = {key.rpartition(".lora_")[0] for key in tensors}
        tensors |= {f"{name}.lora_magnitude_vector": torch.ones(8) for name in names}
        save_file(tensors, source / FILE)
    for job in (
        lambda: adapterkit.convert(source, to="peft", out=tmp_path / "out"),
        lambda: adapterkit.merge(source / "base", source, out=tmp_path / "out"),
    ):
        with pytest.raises(AdapterkitError, match=words):
            job()
    assert not (tmp_path / "out").exists()


def test_a_base_with_another_number_of_experts_is_refused(of_gpt_oss: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterkitError, match="8"):
        adapterkit.merge(of_gpt_oss / "base", STACKS / "stacked", out=tmp_path / "out")
    four = edited("stacked", tmp_path / "four", lambda tensors: tensors.update(
        {k: torch.cat([v, v[:1]]) for k, v in tensors.items() if "experts" in k}
    ))  # fmt: skip
    with pytest.raises(AdapterkitError, match=r"factors of \(12, 8\)"):
        adapterkit.merge(four / "base", four, out=tmp_path / "out")
