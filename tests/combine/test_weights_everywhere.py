"""A file of weights read by combine, merge and the runtime, and PEFT's reading of what they write:
one result, on every kind of layer, from numbers of adapters to those of singular triplets."""

import copy
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapterkit
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import Refused
from adapterkit.core.inputs.weights_file import (
    WeightsFile,
    named_adapter,
    read_weights,
    write_weights,
)
from adapterkit.runtime import load
from adapterkit.runtime.patches.factors import FactorsPatch
from tests.support import deltas, experts, oracle

LEVELS = ("adapter", "module", "direction")
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": list(experts.EXPERTS)}
ALL = {"target_modules": [*deltas.LAYERS, "attention"]}
MODELS = {
    "every layer": (oracle.net, [ALL, ALL | {"r": 3}]),
    "llama": (oracle.llama, [{"target_modules": ["q_proj", "up_proj", "embed_tokens"]},
                             {"target_modules": ["q_proj", "down_proj"], "r": 2}]),
    "gpt2": (oracle.gpt2, [{"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True},
                           {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}]),
    "mixtral": (lambda: experts.tiny("mixtral"), [EXPERTS, EXPERTS | {"r": 3}]),
    "gpt_oss": (lambda: experts.tiny("gpt_oss"), [EXPERTS, EXPERTS | {"r": 3}]),
}  # fmt: skip
TOKENS = torch.tensor([[5, 9, 3, 17, 4, 30, 8], [6, 20, 11, 22, 9, 7, 12]])


@pytest.fixture(scope="session", params=MODELS)
def files(request, cached_folder) -> tuple[object, Path, list[Path]]:
    """What builds a model, its folder, and two adapters of it."""
    build, configs = MODELS[request.param]
    name = f"weighted-{request.param}"
    base = cached_folder(name, lambda folder: oracle.save_base(build(), folder, "fp32"))
    train = lambda seed, config: (
        lambda folder: oracle.train(oracle.load(build, base), folder, seed=seed, **config)
    )
    adapters = [
        cached_folder(f"{name}-{seed}", train(seed, config)) for seed, config in enumerate(configs)
    ]
    return build, base, adapters


def sites_of(model: nn.Module, folders: list[Path]) -> dict[str, list[int]]:
    """Names of all modules and parameters with factors; how many directions each adapter has."""
    handle = load(model, folders[0], name="0")
    handle.load(folders[1], name="1")
    counts: dict[str, list[int]] = {}
    for number, adapter in enumerate(handle.state.adapters.values()):
        for site, part in adapter.patches():
            assert isinstance(part, FactorsPatch)
            lefts, rights = part._matrices()
            count = len(lefts) * min(part.stored_rank, lefts[0].shape[0], rights[0].shape[1])
            counts.setdefault(part.named(site.path), [0, 0])[number] = count
    handle.detach()
    return counts


def chosen(level: str, model: nn.Module, folders: list[Path]) -> WeightsFile:
    """Weights of a level, some of which are missing, 0, or below it."""
    draw = random.Random(0)
    modules: dict[str, tuple] = {}
    for name, counts in sites_of(model, folders).items() if level != "adapter" else ():
        if draw.random() < 0.8:
            one = [round(draw.uniform(-1, 2), 3) for _ in folders]
            several = [tuple(round(draw.uniform(-1, 2), 3) for _ in range(n)) for n in counts]
            pairs = zip(one, several, counts, strict=True)
            is_list = lambda n: level == "direction" and n and draw.random() < 0.7
            modules[name] = tuple(s if is_list(n) else o for o, s, n in pairs)
    adapters = tuple(named_adapter(str(folder), LocalFolder(folder)) for folder in folders)
    return WeightsFile(adapters, (0.7, -0.4), modules, level)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone().double() for name, value in model.state_dict().items()}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"  # others have no float64
    return model.double().eval()(TOKENS).logits


def assert_near(actual: Tensor, expected: Tensor, name: str = "") -> None:
    assert float((actual.double() - expected).norm()) <= 1e-6 * float(expected.norm()), name


@pytest.mark.parametrize("level", LEVELS)
def test_all_readers_agree(files, level: str, tmp_path: Path):
    build, base, folders = files
    built = lambda: oracle.load(build, base)
    path = tmp_path / "weights.json"
    weights = chosen(level, built(), folders)
    write_weights(weights, path)
    assert read_weights(LocalFolder(path)) == weights
    adapterkit.combine(folders, weights=path, base=base, out=tmp_path / "both")
    receipt = adapterkit.merge(base, folders, weights=path, out=tmp_path / "merged")
    if level == "direction":
        assert receipt.data["recipe"]["options"]["weights_file"]["per"] == level
        adapterkit.verify(tmp_path / "merged", base=base, adapters=folders)
    merged = state_of(oracle.load(build, tmp_path / "merged"))
    oracle.merge(base, tmp_path / "both", out=tmp_path / "from-both")
    handle = load(built(), folders, weights=path)
    if not isinstance(handle.model, oracle.Net):
        expected = logits(oracle.load(build, tmp_path / "merged"))
        assert float((expected - logits(built())).norm()) > 1e-2 * float(expected.norm())
        assert_near(logits(handle.model), expected, "runtime")
        assert_near(logits(oracle.peft_model(built(), tmp_path / "both")), expected, "PEFT")
    handle.model.float()
    handle.merge()
    for name, value in state_of(oracle.load(build, tmp_path / "from-both")).items():
        assert_near(merged[name], value, name)
    for name, value in state_of(handle.model).items():
        assert_near(merged[name], value, name)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_weights_of_modules_survive_the_round_trip(files, level: str, tmp_path: Path):
    """What `active` and `merged` say is what acts, wherever it is given again."""
    build, base, folders = files
    path = tmp_path / "weights.json"
    write_weights(chosen(level, oracle.load(build, base), folders), path)
    handle = load(oracle.load(build, base), folders, weights=path)
    names = list(handle.active)
    active = handle.active
    handle.merge()
    expected = state_of(handle.model)

    def again(adapters) -> None:
        for name, value in state_of(adapters.model).items():
            assert torch.equal(value, expected[name]), name

    merged = handle.merged
    handle.unmerge()
    handle.merge(merged)
    again(handle)
    handle.unmerge()
    handle.activate(None)
    handle.activate(pickle.loads(pickle.dumps(active)))
    handle.merge(handle.active)
    with handle.disabled():
        pass
    again(handle)
    handle.unmerge()
    again_of = copy.deepcopy(handle.model)._adapterkit
    again_of.merge(again_of.active)
    again(again_of)
    handle.activate(dict(reversed(handle.active.items())))
    one = {names[0]: handle.active[names[0]]}
    handle.merge(one)
    alone = state_of(handle.model)
    handle.unmerge()
    if build not in (oracle.net, oracle.llama, oracle.gpt2):
        with pytest.raises(Refused, match="weights of . modules"):
            handle.combine(one, name="own")  # without a base, experts have one name
        return
    handle.combine(one, name="own")
    handle.activate("own")
    handle.merge()
    for name, value in state_of(handle.model).items():
        assert_near(value, alone[name], name)


def test_weights_of_directions_are_refused_for_other_directions(two, tmp_path: Path):
    base, (plain, dora) = two
    file = file_of([plain], tmp_path / "w.json", modules={NAME: (DIRECTIONS,)}, per="direction")
    handle = load(oracle.load(oracle.llama, base), plain, weights=file)
    handle.load(dora, name="dora")
    before = handle.active
    with pytest.raises(Refused, match="directions of dora on .*: it has more than low-rank"):
        handle.activate({"dora": before[plain.name]})
    with pytest.raises(Refused, match="directions of dora on "):
        handle.merge({"dora": before[plain.name]})
    assert handle.active == before and not handle.merged


def test_folders_of_one_name_have_numbers(two, tmp_path: Path):
    """As the experts of a router have."""
    base, folders = two
    own = [shutil.copytree(f, tmp_path / f"run{n}" / "last") for n, f in enumerate(folders)]
    file = tmp_path / "w.json"
    adapters = tuple(named_adapter(str(folder), LocalFolder(folder)) for folder in own)
    write_weights(WeightsFile(adapters, (0.5, 0.25)), file)
    handle = load(oracle.load(oracle.llama, base), own, weights=file)
    assert handle.active == {"last": 0.5, "last-2": 0.25}
    assert [a.config.dora for a in handle.state.adapters.values()] == [False, True]


@pytest.fixture
def two(cached_folder) -> tuple[Path, list[Path]]:
    """A llama and two adapters, one of which is a DoRA at a module."""
    base = cached_folder("weights-base", lambda f: oracle.save_base(oracle.llama(), f, "fp32"))
    configs = [{"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"], "use_dora": True}]
    train = lambda config: lambda f: oracle.train(oracle.load(oracle.llama, base), f, **config)
    return base, [cached_folder(f"weights-{n}", train(config)) for n, config in enumerate(configs)]


NAME = "model.layers.0.self_attn.q_proj"
DIRECTIONS = (1.0, 2.0, 3.0, 4.0)


def file_of(folders: list[Path], path: Path, **more) -> Path:
    adapters = tuple(named_adapter(str(folder), LocalFolder(folder)) for folder in folders)
    write_weights(WeightsFile(adapters, (1.0,) * len(adapters), **more), path)
    return path


def test_invalid_files_of_weights_are_refused_everywhere(two, tmp_path: Path):
    base, (plain, _) = two
    twin = oracle.edit_config(plain, tmp_path / "twin", r=4, lora_alpha=9)
    file = file_of([plain, twin], tmp_path / "w.json")
    call = {"weights": file, "out": tmp_path / "out"}
    with pytest.raises(Refused, match="is not the adapter .*adapter_config.json differ"):
        adapterkit.combine([plain, plain], **call)
    with pytest.raises(Refused, match="adapters: 1, but the file has weights of 2"):
        adapterkit.merge(base, plain, **call)
    with pytest.raises(Refused, match="=0.5 and in --weights"):
        adapterkit.merge(base, [f"{plain}=0.5", twin], **call)
    with pytest.raises(Refused, match="--weights and --weight-for are given"):
        adapterkit.combine([plain, twin], weight_for=["q_proj=1"], **call)
    with pytest.raises(Refused, match="--weights and --lbw are given"):
        adapterkit.merge(base, lbw=["ALL"], **call)
    with pytest.raises(Refused, match="sets the weights too"):
        adapterkit.combine([plain, twin], method="slerp", settings={"t": 0.3}, **call)
    unknown = file_of([plain, twin], tmp_path / "w.json", modules={"q_prjo": (1.0, 2.0)})
    for refused in (
        lambda: adapterkit.combine([plain, twin], weights=unknown, out=tmp_path / "out"),
        lambda: adapterkit.merge(base, [plain, twin], weights=unknown, out=tmp_path / "out"),
        lambda: load(oracle.load(oracle.llama, base), [plain, twin], weights=unknown),
    ):
        with pytest.raises(Refused, match="weights of 1 modules that no adapter has: q_prjo"):
            refused()
    few = file_of([plain, twin], tmp_path / "w.json", modules={NAME: ((1.0,), 2.0)}, per=LEVELS[2])
    for refused in (
        lambda: adapterkit.combine([plain, twin], weights=few, out=tmp_path / "out"),
        lambda: adapterkit.merge(base, [plain, twin], weights=few, out=tmp_path / "out"),
    ):
        with pytest.raises(Refused, match="adapter 1 has 1 weights of directions\n  expected: 4"):
            refused()
    with pytest.raises(Refused, match="it has 4 directions, not 1"):
        load(oracle.load(oracle.llama, base), [plain, twin], weights=few)
    assert not (tmp_path / "out").exists()


def test_directions_that_are_refused(two, tmp_path: Path):
    base, folders = two
    more = {"modules": {NAME: (DIRECTIONS, DIRECTIONS)}, "per": "direction"}
    file = file_of(folders, tmp_path / "w.json", **more)
    with pytest.raises(Refused, match="weights of directions of a DoRA"):
        adapterkit.combine(folders, weights=file, base=base, rank=8, out=tmp_path / "out")
    with pytest.raises(Refused, match="weights of directions for values of .*q_proj"):
        adapterkit.merge(base, folders, weights=file, out=tmp_path / "out")
    with pytest.raises(Refused, match="it has more than low-rank factors"):
        load(oracle.load(oracle.llama, base), folders, weights=file)
    twice = folders[:1] * 2
    file = file_of(twice, tmp_path / "w.json", **more)
    with pytest.raises(Refused, match="a and b separately"):
        adapterkit.combine(twice, weights=file, space="factors", out=tmp_path / "out")
    handle = load(oracle.load(oracle.llama, base), folders[0], name="a", trainable=True)
    handle.load(folders[0], name="b")
    with pytest.raises(Refused, match="directions of a .*: it is trainable"):
        handle.activate(["a", "b"], weights=file)
    assert handle.active == {"a": 1.0}


def test_active_directions_follow_moves_of_the_model(two, tmp_path: Path):
    """Stand-ins of directions follow the model, a change of factors, and what is switched off."""
    base, (plain, _) = two
    more = {"modules": {NAME: (DIRECTIONS,)}, "per": "direction"}
    file = file_of([plain], tmp_path / "w.json", **more)
    handle = load(oracle.load(oracle.llama, base), plain, weights=file)
    tokens, model = TOKENS, handle.model
    before = model(tokens).logits
    with handle.disabled():
        assert not torch.equal(model(tokens).logits, before)
    assert torch.equal(model(tokens).logits, before)
    assert handle.active == {plain.name: 1.0}
    assert_near(model.double()(tokens).logits, before.double())
    model.float()
    handle.merge()
    handle.unmerge()
    assert torch.equal(model(tokens).logits, before)
    handle.rescale(2.0, name=plain.name)
    handle.activate(plain.name, weights=file)
    twice = model(tokens).logits
    handle.activate(plain.name)
    assert not any(name.endswith(":directions") for name, _ in model.named_parameters())
    assert not torch.equal(model(tokens).logits, twice)
    handle.save(tmp_path / "saved")
    handle.detach()
    saved = oracle.stored(tmp_path / "saved")
    assert all(torch.equal(value, saved[key]) for key, value in oracle.stored(plain).items())


def test_modules_that_are_left_out_are_known(two, tmp_path: Path):
    base, (plain, _) = two
    file = file_of([plain], tmp_path / "w.json", modules={NAME: (0.5,)})
    adapterkit.merge(base, plain, weights=file, exclude=".*layers.0.*", out=tmp_path / "out")
    zero = file_of([plain], tmp_path / "zero.json", modules={NAME: (0.0,)})
    receipt = adapterkit.merge(base, plain, weights=zero, out=tmp_path / "zero")
    assert not any(NAME in name for name in receipt.data["parameters"])


def test_adapters_are_also_found_next_to_the_file(two, tmp_path: Path):
    """So that an output is made again wherever its inputs lie together."""
    base, (plain, _) = two
    place = tmp_path / "inputs"
    for source, name in ((base, "base"), (plain, "own")):
        shutil.copytree(source, place / name)
    adapters = (named_adapter("own", LocalFolder(plain)),)
    write_weights(WeightsFile(adapters, (0.5,), {NAME: (0.25,)}), place / "w.json")
    adapterkit.merge(place / "base", weights=place / "w.json", out=tmp_path / "out")
    adapterkit.rerun(tmp_path / "out", inputs=place)
    adapterkit.report(weights=place / "w.json", out=tmp_path / "page.html")
    handle = load(oracle.load(oracle.llama, base), weights=place / "w.json")
    assert handle.active == {"own": 0.5}
