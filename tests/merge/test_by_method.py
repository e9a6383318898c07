"""merge --method: W + method(w₁Δ₁, w₂Δ₂, ...), rounded once, wherever the weights lie."""

import itertools
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit.core.adapter.peft import read_adapter
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import Damaged, MultipleErrors, Refused
from adapterkit.core.tasks.rows import EditedTensor
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.verbs.combine.methods.gta import Gta
from adapterkit.verbs.combine.tasks.combine import module_seeds
from tests.support import experts, gguf_files, one_file, oracle, quantized_llama
from tests.support.combining import options_of
from tests.support.forks import command
from tests.support.methods import METHODS, combined, record
from tests.support.oracle import Exact, assert_all_rounded, load, stored
from tests.support.quantized_llama import FEW, FORMS
from tests.support.usual import usual

NAMES = [name for name, kind in METHODS.items() if kind.acts_on != "covariances"]
WEIGHTS = (0.7, 1.2)
MODULES = (["q_proj", "v_proj", "down_proj"], ["q_proj", "k_proj", "down_proj"])
TIES = {"method": "ties", "density": 0.5}
Adapted = tuple[Path, list[Path]]


def products_of(adapters: list[Path]) -> dict[str, dict[int, Product]]:
    """scale · b @ a in float64, by module and number."""
    found: dict[str, dict[int, Product]] = {}
    for number, folder in enumerate(adapters):
        adapter, tensors = read_adapter(LocalFolder(folder), 0), stored(folder)
        for lora in adapter.loras:
            _, scale = adapter.rank_and_scale(lora.module)
            a, b = tensors[lora.a.key].double(), tensors[lora.b.key].double()
            found.setdefault(lora.module, {})[number] = Product(b * scale, a)
    return found


@pytest.fixture(scope="session")
def llamas(cached_folder: Callable[..., Path]) -> Callable[[str], Adapted]:
    """A tiny Llama, and two adapters with modules of their own and in common."""

    def make(dtype: str) -> Adapted:
        base = cached_folder(
            f"by-method-{dtype}", lambda folder: oracle.save_base(oracle.llama(), folder, dtype)
        )
        train = lambda i: (
            lambda folder: oracle.train(
                load(oracle.llama, base), folder, seed=i, r=2 + i, target_modules=MODULES[i]
            )
        )
        return base, [cached_folder(f"by-method-{dtype}-{i}", train(i)) for i in (0, 1)]

    return make


def pairs(adapters: list[Path]) -> list[tuple[Path, float]]:
    return list(zip(adapters, WEIGHTS, strict=True))


def expected(base: Path, adapters: list[Path], name: str, **given) -> dict[str, Exact]:
    """By the method's own function, module by module."""
    before, values = stored(base), {}
    for module, products in products_of(adapters).items():
        method, weights = record(name, **given), [WEIGHTS[number] for number in products]
        seeds = module_seeds(0, f"{module}/0")
        delta = combined(method, [*products.values()], weights, seeds)
        weight = before[f"{module}.weight"].double()
        values[f"{module}.weight"] = Exact(weight + delta, weight.abs() + delta.abs(), 8)
    return values


# a method computes in float64, and who rounds knows no method
@pytest.mark.parametrize(
    ("name", "dtype"),
    usual(
        itertools.product(NAMES, ["bf16", "fp32"]),
        lambda row: row[1] == "bf16" or row[0] in ("linear", "ties", "karcher"),
    ),
)
def test_merges_by_every_method_equal_combine_then_merge(
    name: str, dtype: str, llamas, tmp_path: Path
) -> None:
    base, adapters = llamas(dtype)
    options = options_of(name)
    given = {"density": 0.5, **options.get("settings", {})}
    adapterkit.merge(
        base, pairs(adapters), out=tmp_path / "out", method=name, verify=True, **options
    )
    right = expected(base, adapters, name, **given)
    assert_all_rounded(stored(tmp_path / "out"), right, stored(base))
    adapterkit.verify(tmp_path / "out", base=base, adapters=adapters)


def test_an_element_that_is_wrong_is_found(llamas, tmp_path: Path) -> None:
    base, adapters = llamas("bf16")
    receipt = adapterkit.merge(base, adapters, out=tmp_path / "out", **TIES).data
    assert receipt["recipe"]["options"]["method"] == "ties"
    key, path = "model.layers.1.mlp.down_proj.weight", tmp_path / "out/model.safetensors"
    tensors = load_file(path)
    tensors[key][-1, -1] += 0.5
    save_file(tensors, path, {"format": "pt"})
    (tmp_path / "out/adapterkit.json").unlink()
    from adapterkit.core.verify.row_checks import check_rows

    plan = adapterkit.merge(base, adapters, out=tmp_path / "again", dry_run=True, **TIES)
    with pytest.raises(Damaged, match=key):
        check_rows(LocalFolder(tmp_path / "out"), plan)


def test_draws_are_those_of_the_seed_and_of_combine(llamas, tmp_path: Path) -> None:
    base, adapters = llamas("fp32")
    how = {"method": "dare_linear", "density": 0.5}
    for seed in (0, 0, 1):
        out = tmp_path / "out"
        adapterkit.merge(base, adapters, out=out, seed=seed, overwrite=True, **how)
        out.rename(tmp_path / f"{len(list(tmp_path.iterdir()))}")
    one, two, other = (stored(path) for path in sorted(tmp_path.iterdir()))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    by_hand(base, adapters, one, tmp_path, **how)


def by_hand(base: Path, adapters: list[Path], ours: dict[str, Tensor], home: Path, **how) -> None:
    """The same by way of an adapter whose rank is full."""
    adapterkit.combine(adapters, out=home / "combined", base=base, rank=4096, **how)
    adapterkit.merge(base, [home / "combined"], out=home / "merged", overwrite=True)
    before, theirs = stored(base), stored(home / "merged")
    assert ours.keys() == theirs.keys()
    changed = {key for key in before if not torch.equal(before[key], ours[key])}
    assert changed == {key for key in before if not torch.equal(before[key], theirs[key])} != set()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-5, msg=key)


# -- weights and densities by module ---------------------------------------------------------------


def test_weights_and_densities_of_modules(llamas, tmp_path: Path) -> None:
    base, adapters = llamas("fp32")
    adapterkit.merge(
        base, pairs(adapters), out=tmp_path / "out", method="gta", density=0.5,
        settings={"consensus": "sum", "divide": "weights"},
        weight_for=["2:layers.1.*=-0.4"],
        density_for=["1:q_proj=0.2", "layers.0.*(v|k|down)_proj=0.8"],
    )  # fmt: skip
    before, right = stored(base), {}
    for module, products in products_of(adapters).items():
        first = "layers.0." in module
        second = 0.8 if first and "q_proj" not in module else 0.5
        densities = (0.2 if "q_proj" in module else second, second)
        method = Gta(
            consensus="sum", divide="weights", densities=tuple(densities[n] for n in products)
        )
        weights = [WEIGHTS[0] if n == 0 else 1.2 if first else -0.4 for n in products]
        delta = combined(method, [*products.values()], weights)
        weight = before[f"{module}.weight"].double()
        right[f"{module}.weight"] = Exact(weight + delta, weight.abs() + delta.abs(), 8)
    assert_all_rounded(stored(tmp_path / "out"), right, before)
    adapterkit.verify(tmp_path / "out", base=base, adapters=adapters)


def test_weight_0_takes_no_part(llamas, tmp_path: Path) -> None:
    base, adapters = llamas("bf16")
    adapterkit.merge(base, {adapters[0]: 1, adapters[1]: 0}, out=tmp_path / "both", **TIES)
    adapterkit.merge(base, adapters[:1], out=tmp_path / "first", **TIES)
    both, first = stored(tmp_path / "both"), stored(tmp_path / "first")
    assert all(torch.equal(both[key], first[key]) for key in first if "k_proj" not in key)


# -- where the weights lie -------------------------------------------------------------------------

PLACES = {
    "transposed": (oracle.gpt2, ["c_attn", "c_proj"]),
    "fused": (oracle.neox, ["query_key_value", "dense"]),
    "convolutions": (oracle.net, ["embed", "line", "image", "point", "volume"]),
}


@pytest.mark.parametrize("method", ["ties", "dare_ties", "karcher"])
@pytest.mark.parametrize("place", PLACES)
def test_merges_by_method_on_every_kind_of_layer(place: str, method: str, tmp_path: Path) -> None:
    build, targets = PLACES[place]
    base, adapters = tmp_path / "base", [tmp_path / "a0", tmp_path / "a1"]
    base.mkdir()
    oracle.save_base(build(), base, "fp32")
    for i, folder in enumerate(adapters):
        oracle.train(load(build, base), folder, seed=i, r=2 + i, target_modules=targets)
    how = {"method": method} | ({} if method == "karcher" else {"density": 0.5})
    adapterkit.merge(base, adapters, out=tmp_path / "out", verify=True, **how)
    by_hand(base, adapters, stored(tmp_path / "out"), tmp_path, **how)


@pytest.mark.parametrize("kind", usual(experts.MODELS, {"mixtral"}))
def test_merges_by_method_of_experts_equal_one_delta_each(kind: str, tmp_path: Path) -> None:
    """One delta of each, whether they are stored one by one or as a stack."""
    model, adapters = experts.tiny(kind), [tmp_path / "a0", tmp_path / "a1"]
    with oracle.quiet():
        model.save_pretrained(tmp_path / "base")
    for i, folder in enumerate(adapters):
        parameters = [f"mlp.experts.{name}" for name in experts.EXPERTS][i:]
        oracle.train(
            experts.tiny(kind), folder, seed=i, target_modules=[], target_parameters=parameters
        )
    adapterkit.merge(tmp_path / "base", adapters, out=tmp_path / "out", verify=True, **TIES)
    by_hand(tmp_path / "base", adapters, stored(tmp_path / "out"), tmp_path, **TIES)


@pytest.mark.parametrize("tied", ["untie", "fold"])
def test_merges_by_method_of_tied_embeddings(tied: str, tmp_path: Path) -> None:
    base, adapters = tmp_path / "base", [tmp_path / "a0", tmp_path / "a1"]
    oracle.save_base(oracle.tied_llama(), base, "fp32")
    for i, folder in enumerate(adapters):
        model = load(oracle.tied_llama, base)
        oracle.train(model, folder, seed=i, target_modules=["embed_tokens", "q_proj"])
    adapterkit.merge(base, adapters, out=tmp_path / "out", tied=tied, verify=True, **TIES)
    ours = stored(tmp_path / "out")
    assert ("lm_head.weight" in ours) == (tied == "untie")
    right = {key: value.value for key, value in expected_embedding(base, adapters).items()}
    torch.testing.assert_close(ours["model.embed_tokens.weight"], right["embed"], atol=1e-6, rtol=0)


def expected_embedding(base: Path, adapters: list[Path]) -> dict[str, Exact]:
    (products,) = [p for m, p in products_of(adapters).items() if m.endswith("embed_tokens")]
    delta = combined(record("ties", density=0.5), [*products.values()], [1.0, 1.0]).T
    value = (stored(base)["model.embed_tokens.weight"].double() + delta).float()
    return {"embed": Exact(value, value, 1)}


def test_merges_by_method_do_not_depend_on_shards(llamas, tmp_path: Path) -> None:
    base, adapters = llamas("bf16")
    load(oracle.llama, base).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    for out, more in ({"one": {}, "same": {}, "other": {"max_shard_size": "40KB"}}).items():
        source = base if out == "one" else tmp_path / "base"
        adapterkit.merge(source, adapters, out=tmp_path / out, verify=True, **TIES, **more)
    one, same, other = (stored(tmp_path / out) for out in ("one", "same", "other"))
    for state in (same, other):
        assert state.keys() == one.keys()
        assert all(torch.equal(one[key], state[key]) for key in one)
    names = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert names == sorted(path.name for path in (tmp_path / "same").glob("*.safetensors"))
    untouched = [name for name in names if "norm" in name]
    assert not untouched or all(
        (tmp_path / "base" / n).read_bytes() == (tmp_path / "same" / n).read_bytes()
        for n in untouched
    )


@pytest.mark.parametrize("form", usual([n for n, f in FORMS.items() if f.writable], FEW))
def test_merges_by_method_into_quantized_bases_are_verified(
    form: str, cached_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """In its own format, each weight encoded once: rows are recomputed by --verify."""
    base = cached_folder(f"formats-{form}", lambda out: quantized_llama.base(FORMS[form], out))
    adapters = []
    for i in (0, 1):
        train = lambda folder, i=i: oracle.train(
            quantized_llama.llama(), folder, size=0.3, seed=i, target_modules=MODULES[i]
        )
        adapters.append(cached_folder(f"by-method-forged-{i}", train))
    adapterkit.merge(base, adapters, out=tmp_path / "out", verify=True, **TIES)
    adapterkit.merge(base, adapters, out=tmp_path / "floats", dequantize=True, dtype="fp32", **TIES)
    adapterkit.combine(adapters, out=tmp_path / "both", rank=4096, **TIES)
    adapterkit.merge(
        base, [tmp_path / "both"], out=tmp_path / "right", dequantize=True, dtype="fp32"
    )
    ours, right = stored(tmp_path / "floats"), stored(tmp_path / "right")
    for key, value in right.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-4, msg=key)


def test_merges_by_method_into_gguf(tmp_path: Path) -> None:
    _, message, tensors = gguf_files.llama()
    base, adapters = tmp_path / "m.gguf", [tmp_path / "a0", tmp_path / "a1"]
    gguf_files.write(base, "llama", message, tensors)
    for i, folder in enumerate(adapters):
        oracle.train(gguf_files.llama()[0], folder, seed=i, target_modules=MODULES[i])
    adapterkit.merge(base, adapters, out=tmp_path / "ours.gguf", verify=True, **TIES)
    adapterkit.combine(adapters, out=tmp_path / "both", rank=4096, **TIES)
    adapterkit.merge(base, [tmp_path / "both"], out=tmp_path / "right.gguf")
    ours, right = (gguf_files.stored(tmp_path / f"{name}.gguf") for name in ("ours", "right"))
    gguf_files.same(ours, right)


@pytest.mark.parametrize("family", usual(one_file.FAMILIES, {"flux", "sd15"}))
def test_merges_by_method_into_image_files(family: str, tmp_path: Path) -> None:
    """Of each tensor of the file the method takes the adapters' whole deltas."""
    base = one_file.write_family(family, tmp_path / "base.safetensors")
    factors = [one_file.factors_of(family, rank=rank) for rank in (2, 3)]
    adapters = {
        one_file.write_adapter(own, tmp_path / f"{i}.safetensors"): WEIGHTS[i]
        for i, own in enumerate(factors)
    }
    adapterkit.merge(base, adapters, out=tmp_path / "out.safetensors", verify=True, **TIES)
    before, ours = load_file(base), load_file(tmp_path / "out.safetensors")
    alone = [one_file.expected(family, own) for own in factors]
    for key, value in before.items():
        deltas = [(one[key].double() - value).view(len(value), -1) for one in alone]
        if not any(delta.any() for delta in deltas):
            assert torch.equal(ours[key], value)
            continue
        products = [Product(delta, torch.eye(delta.shape[1]).double()) for delta in deltas]
        delta = combined(record("ties", density=0.5), products, WEIGHTS).view(value.shape)
        torch.testing.assert_close(ours[key], (value + delta).float(), atol=1e-5, rtol=0, msg=key)


def test_another_kind_together_with_factors(tmp_path: Path) -> None:
    """A Kronecker product, which no factors of low rank hold, and a LoRA of the same tensor."""
    base = one_file.write_family("flux", tmp_path / "base.safetensors")
    name, own = "double_blocks.0.img_attn.qkv", torch.Generator().manual_seed(1)
    w1, w2, a, b = (
        torch.randn(shape, generator=own) for shape in ((2, 2), (12, 4), (2, 8), (24, 2))
    )
    key, lora = f"lora_unet_{name.replace('.', '_')}", {"lora_down.weight": a, "lora_up.weight": b}
    adapters = [tmp_path / "lokr.safetensors", tmp_path / "lora.safetensors"]
    for path, parts in zip(adapters, ({"lokr_w1": w1, "lokr_w2": w2}, lora), strict=True):
        tensors = {f"{key}.{role}": value for role, value in parts.items()}
        save_file(tensors | {f"{key}.alpha": torch.tensor(2.0)}, path)
    out, weight = tmp_path / "out.safetensors", f"{one_file.DENOISER}{name}.weight"
    deltas = [torch.kron(w1, w2).double(), b.double() @ a.double()]
    products = [Product(delta, torch.eye(8).double()) for delta in deltas]
    for method in ("ties", "knots", "mean"):
        how = {} if method == "mean" else {"density": 0.5}
        adapterkit.merge(base, adapters, out=out, method=method, overwrite=True, verify=True, **how)
        right = load_file(base)[weight] + combined(record(method, **how), products, [1.0, 1.0])
        torch.testing.assert_close(load_file(out)[weight], right.float(), atol=1e-5, rtol=1e-5)


# -- refused ---------------------------------------------------------------------------------------

BAD = {
    "no such method": ({"method": "tise"}, "ties"),
    "covariances": ({"method": "regmean"}, "needs the layers' inputs"),
    "no method": ({"density": 0.5}, "--density is given without --method"),
    "all modules": ({"method": "linear", "settings": {"strength": "strongest"}}, "combine them"),
    "no option of it": ({"method": "linear", "density": 0.5}, "density"),
    "one that is missing": ({"method": "ties"}, "density"),
    "PEFT's order": ({"method": "ties", "density": 0.5, "compat": "peft"}, "--compat"),
    "a density for none": (
        {**TIES, "density_for": ["nowhere=0.1"]}, "--density-for",
    ),
    "no densities": ({"method": "karcher", "density_for": ["q_proj=0.1"]}, "a density"),
    "two densities": ({**TIES, "density_for": ["1:q_proj=0.1"]}, "--method gta"),
    "not a share": ({**TIES, "density_for": ["q_proj=1.5"]}, "density 1.5"),
    "weights of slerp": (
        {"method": "slerp", "settings": {"t": 0.5}, "weight_for": ["q_proj=1"]}, "--weight-for",
    ),
    "karcher's": ({"method": "karcher", "weight_for": ["1:q_proj=-1"]}, "none below 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_invalid_merges_by_method_are_refused(case: str, llamas, tmp_path: Path) -> None:
    (base, adapters), (options, said) = llamas("bf16"), BAD[case]
    with pytest.raises((Refused, MultipleErrors)) as error:
        adapterkit.merge(base, adapters, out=tmp_path / "out", **options)
    assert said in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("regspan", ["--set", "per=layer", "--weight-for", "q_proj=0.2"]),
        ("regmean", []),
        ("linear", ["--set", "strength=strongest"]),
    ],
)
def test_the_refusal_of_a_method_prints_the_commands_for_it(method, more, llamas, tmp_path):
    """With the call's paths, weights and options; FILE stands for one of statistics."""
    base, (one, other) = llamas("bf16")
    out, adapters = tmp_path / "out", [f"{one}=0.5", str(other)]
    done = command("merge", base, *adapters, "--method", method, *more, "--out", out)
    files = [] if method == "linear" else ["--stats", "FILE"] * 2
    words = ["adapterkit", "combine", *adapters, "--method", method, *more, *files]
    printed = [shlex.split(text) for text in done.stderr.splitlines()[-2:]]
    assert printed == [
        [*words, "--out", "combined"],
        ["adapterkit", "merge", str(base), "combined", "--out", "merged"],
    ]
    assert done.returncode == (1 if method == "linear" else 2) and not out.exists()


@pytest.mark.parametrize(
    ("config", "said"), [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "biases of factors")]
)
def test_adapters_without_a_plain_delta_are_refused(
    config: dict, said: str, llamas, tmp_path: Path
) -> None:
    base, adapters = llamas("bf16")
    model = load(oracle.llama, base)
    if "lora_bias" in config:
        model = oracle.llama(attention_bias=True)
        base = tmp_path / "base"
        oracle.save_base(model, base, "bf16")
    oracle.train(model, tmp_path / "a", target_modules=["q_proj"], **config)
    with pytest.raises((Refused, MultipleErrors), match=said):
        adapterkit.merge(base, [adapters[0], tmp_path / "a"], out=tmp_path / "out", **TIES)


def test_the_claim_on_memory_holds(llamas, tmp_path: Path) -> None:
    """A dense delta is made by a task, whose claim has it."""
    base, adapters = llamas("bf16")
    plan = adapterkit.merge(base, adapters, out=tmp_path / "out", dry_run=True, **TIES)
    edited = [task for task in plan.shards[0].tasks if isinstance(task, EditedTensor)]
    assert edited
    for task in edited:
        size = task.step.shape[0] * task.step.shape[1]
        assert task.memory >= 2 * size + 8 * size
    sums = adapterkit.merge(base, adapters, out=tmp_path / "out", dry_run=True, method="mean")
    assert not sums.shards[0].tasks, "factors are streamed"
    card = json.loads(json.dumps(plan.recipe()))
    assert card["options"]["density"] == 0.5


def test_a_file_of_weights(llamas, tmp_path: Path) -> None:
    """Of adapters, modules and singular triplets, as `combine` takes them."""
    base, adapters = llamas("fp32")
    triplets = "model.layers.0.self_attn.q_proj"
    table = {
        "adapters": [str(path) for path in adapters],
        "per": "direction",
        "default": list(WEIGHTS),
        "modules": {triplets: [[0.5, 2.0], -1.0], "model.layers.1.mlp.down_proj": [0, 0.3]},
    }
    (tmp_path / "weights.json").write_text(json.dumps(table))
    how = {"weights": tmp_path / "weights.json", "method": "ties", "density": 0.5}
    adapterkit.merge(base, adapters, out=tmp_path / "out", verify=True, **how)
    adapterkit.combine(adapters, out=tmp_path / "both", rank=4096, **how)
    adapterkit.merge(base, [tmp_path / "both"], out=tmp_path / "right")
    ours, right = stored(tmp_path / "out"), stored(tmp_path / "right")
    for key, value in right.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-5, msg=key)
