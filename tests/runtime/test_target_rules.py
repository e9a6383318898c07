"""Targets on plain trees of modules: which are meant, and what is refused."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adapterkit import LoraConfig, MultipleErrors, Refused
from adapterkit.runtime.targets import LiveResolver

pytestmark = pytest.mark.quick


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


class Outer(nn.Module):
    """The model of the guide's paragraph on rank_pattern."""

    def __init__(self):
        super().__init__()
        self.foo = linear()
        self.module = nn.ModuleDict({
            "foo": linear(),
            "foobar": linear(),
            "module": nn.ModuleDict({"foo": linear(), "barfoo": linear()}),
        })  # fmt: skip


FOOS = ["foo", "module.foo", "module.module.foo"]
PATTERNS = [
    ({"foo": 42}, dict.fromkeys(FOOS, 42)),
    ({"^foo": 42}, {"foo": 42}),
    ({"^module.foo": 42}, {"module.foo": 42}),
    ({"module.foo": 42}, {"module.foo": 42, "module.module.foo": 42}),
    ({"^foo": 42, "^module.module.foo": 55}, {"foo": 42, "module.module.foo": 55}),
    ({"foo$": 42}, dict.fromkeys(FOOS, 42)),  # no need for $
    ({"^foo": 1, "foo": 2}, {"foo": 1, "module.foo": 2, "module.module.foo": 2}),  # the first one
    ({"foo": 2, "^foo": 1}, dict.fromkeys(FOOS, 2)),
]


@pytest.mark.parametrize("pattern, changed", PATTERNS, ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_of_the_guide(pattern, changed, rslora):
    ends = ["foo", "foobar", "barfoo"]
    config = LoraConfig(8, 16, ends, rank_pattern=pattern, rslora=rslora)
    targets = {target.path: target for target in LiveResolver(Outer(), config).resolve()}
    assert {path: x.rank for path, x in targets.items() if x.rank != 8} == changed
    for target in targets.values():
        root = target.rank**0.5 if rslora else target.rank
        assert target.scale == 16 / root and target.kind == "linear"
    # alpha by the same rules, and apart from the ranks
    config = LoraConfig(8, 16, ends, alpha_pattern=pattern, rslora=rslora)
    scales = {
        x.path: x.scale * (8**0.5 if rslora else 8) for x in LiveResolver(Outer(), config).resolve()
    }
    alphas = {path: pytest.approx(alpha) for path, alpha in changed.items()}
    assert scales == {path: alphas.get(path, pytest.approx(16)) for path in targets}


class Layer(nn.Module):
    def __init__(self, modules: dict[str, nn.Module]):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class Model(nn.Module):
    """Two layers with an embedding, convolutions, attention, experts and a head."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(
            Layer({
                "attention": nn.MultiheadAttention(8, 2),
                "q": nn.Linear(8, 8),
                "norm": nn.LayerNorm(8),
                "experts": Experts(),
            })
            for _ in range(2)
        )  # fmt: skip
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])})
        self.grouped = nn.Conv2d(4, 4, 3, groups=4)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.head = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(8, 8))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 8))
        self.down = nn.Parameter(torch.randn(3, 8, 16))
        self.norm = nn.Parameter(torch.ones(8))


def names(config: LoraConfig, model: nn.Module | None = None) -> list[str]:
    return [target.name for target in LiveResolver(model or Model(), config).resolve()]


def test_name_suffixes_full_names_and_regular_expressions():
    assert names(LoraConfig(targets=["q"])) == ["layers.0.q", "layers.1.q"]
    assert names(LoraConfig(targets=["0.q", "head"])) == ["layers.0.q", "head"]
    assert names(LoraConfig(targets=r".*\.q|head")) == ["layers.0.q", "layers.1.q", "head"]
    assert names(LoraConfig(targets=r"q|head")) == ["head"]  # the whole name
    assert names(LoraConfig(targets="all-linear")) == [
        "layers.0.q", "layers.1.q", "encoder.layers.0", "encoder.layers.1", "encoder.layers.2",
        "head",
    ]  # fmt: skip
    attentions = ["layers.0.attention", "layers.1.attention"]
    assert names(LoraConfig(targets=["attention"])) == attentions
    assert names(LoraConfig(targets=["attention", "out_proj"])) == attentions  # both projections


def test_layers_of_a_model_that_starts_with_its_list_of_layers():
    """PEFT wants a module around the list, and matches none of these."""
    assert names(LoraConfig(targets=["q"], layers=1)) == ["layers.1.q"]
    assert names(LoraConfig(targets=["q"], layers=[1], layers_pattern="layers")) == ["layers.1.q"]
    config = LoraConfig(targets=["layers.0.q", "q"], layers=1)
    assert names(config) == ["layers.0.q", "layers.1.q"]  # a whole name in any layer


def test_layers_of_usual_targets():
    """Of gemma4 they are a regular expression, with which PEFT forgets the layers."""
    layers = [nn.ModuleDict({"q_proj": linear(), "o_proj": linear()}) for _ in range(2)]
    tower = nn.ModuleDict({"layers": nn.ModuleList(layers)})
    model = nn.ModuleDict({"language_model": tower, "vision": copy.deepcopy(tower)})
    model.config = SimpleNamespace(model_type="gemma4")
    paths = [f"language_model.layers.{i}.q_proj" for i in range(2)]
    assert names(LoraConfig(), model) == paths
    assert names(LoraConfig(layers=1), model) == paths[1:]


def test_excluded_modules_are_not_targets():
    assert names(LoraConfig(targets=["q"], exclude=["0.q"])) == ["layers.1.q"]
    assert names(LoraConfig(targets=["q"], exclude=r".*\.1\.q")) == ["layers.0.q"]
    config = LoraConfig(targets=["q", "head", "lm_head"], modules_to_save=["lm_head", "layers.0"])
    assert names(config) == ["layers.1.q", "head"]
    assert "head" in names(LoraConfig(targets="all-linear"))
    assert names(LoraConfig(targets="all-linear", modules_to_save=["ead", "ers.0"])) == [
        "layers.1.q", "encoder.layers.1", "encoder.layers.2",
    ]  # fmt: skip


@pytest.mark.parametrize("targets, entry", [("lm_head", "head"), ("0.q", "rs.0"), ("q", "q")])
def test_a_target_that_is_trained_in_full_by_the_end_of_its_name(targets, entry):
    """PEFT leaves out those of whole names, and fails for others."""
    config = LoraConfig(targets=[targets], modules_to_save=[entry])
    with pytest.raises(Refused, match=f"modules_to_save {entry} means|no module is a target"):
        LiveResolver(Model(), config).resolve()


def test_parameters_in_the_order_of_the_code():
    config = LoraConfig(4, 8, [], parameters=["down", "up"], rank_pattern={"experts.up": 2})
    targets = LiveResolver(Model(), config).resolve()
    assert [(x.path, x.leaf, x.kind, x.rank, x.scale) for x in targets] == [
        (f"layers.{i}.experts", leaf, "parameter", rank, 8 / rank)
        for i in range(2)
        for leaf, rank in (("up", 2), ("down", 4))
    ]


def test_adapters_on_the_model_are_no_targets():
    model = Model()
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            module.adapterkit = nn.ModuleDict(
                {"q": linear(), "x": nn.ModuleDict({"head": linear()})}
            )
    for config in (LoraConfig(targets=["q", "head"]), LoraConfig(targets="all-linear")):
        assert names(config, model) == names(config)
    with pytest.raises(Refused, match="'x.head' matches none"):
        LiveResolver(model, LoraConfig(targets=["x.head"])).resolve()
    assert LiveResolver(model, LoraConfig(modules_to_save=["head"])).saved() == ["lm_head", "head"]


class QuantizedLinear(nn.Module):
    """As those of GPTQ or HQQ: no nn.Linear, and no weight."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 8, 6
        self.register_buffer("qweight", torch.zeros(8, 3, dtype=torch.uint8))


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 8, 6
        self.inner = nn.Linear(8, 6)


def test_quantized_layers_are_linear_and_containers_are_not():
    model = nn.ModuleDict({"a": QuantizedLinear(), "b": Wrapper()})
    assert names(LoraConfig(targets="all-linear"), model) == ["a", "b.inner"]
    assert {x.kind for x in LiveResolver(model, LoraConfig(targets=["a", "b"])).resolve()} == {
        "linear"
    }


def test_tied_heads_share_the_embeddings_factors():
    model = Model()
    model.lm_head.weight = model.embed_tokens.weight
    for target in ("embed_tokens", "lm_head"):
        config = LoraConfig(targets=[target], tie=True, rank_pattern={"embed_tokens": 3})
        targets = LiveResolver(model, config).resolve()
        assert [(x.path, x.tied, x.rank) for x in targets] == [
            ("embed_tokens", None, 3),
            ("lm_head", "embed_tokens", 3),
        ]
    config = LoraConfig(targets=["q"], modules_to_save=["lm_head"], tie=True)
    assert LiveResolver(model, config).saved() == ["embed_tokens", "lm_head"]


REFUSALS = [
    (LoraConfig(targets=["qq", "q", "hed"]), ["'qq' matches none", "'hed' matches none", "'head'"]),
    (LoraConfig(targets=r".*\.query"), ["no module is a target"]),
    (LoraConfig(), ["no usual targets of Model"]),
    (
        LoraConfig(targets=["q"], exclude=["k", r"layers.7"]),
        ["exclude: 'k'", "exclude: 'layers.7'"],
    ),
    (LoraConfig(targets=["q"], exclude=["q"]), ["no module is a target", "check exclude"]),
    (LoraConfig(targets=["q"], exclude=r"k.*"), ["exclude: 'k.*' matches none"]),
    (LoraConfig(targets=["q"], layers=[0, 7, 9]), ["no target in layer 7", "no target in layer 9"]),
    (LoraConfig(targets=["q"], layers=0, layers_pattern="h"), ["no target in layer 0"]),
    (
        LoraConfig(targets=["q"], rank_pattern={"k": 2, "q": 3}, alpha_pattern={"layer": 2}),
        ["rank_pattern: 'k' matches none", "alpha_pattern: 'layer' matches none"],
    ),
    (
        LoraConfig(targets=["norm"]),
        ["layers.0.norm is a LayerNorm", "layers.1.norm", "exclude it from targets"],
    ),
    (LoraConfig(targets=["layers"]), ["layers is a ModuleList", "target the layers inside it"]),
    (LoraConfig(targets=["experts"]), ["is a Experts", "parameters=['experts.up']"]),
    (LoraConfig(targets=["out_proj"]), ["read by MultiheadAttention", "target the attention"]),
    (LoraConfig(targets=[], parameters=["upp", "up"]), ["parameters: 'upp' matches none", "'up'"]),
    (LoraConfig(targets=[], parameters=["experts.norm"]), ["experts.norm with shape (8,)"]),
    (LoraConfig(targets=[], parameters=["scale"]), ["scale of the model itself"]),
    (
        LoraConfig(targets=["q"], parameters=["0.q.weight"]),
        ["layers.0.q is a target, and so is a parameter of it"],
    ),
    (
        LoraConfig(targets=[], parameters=["up"], modules_to_save=["experts"]),
        ["inside experts, which is fully trained"],
    ),
    (LoraConfig(targets=["attention"], dora=True), ["dora on layers.0.attention"]),
    (LoraConfig(targets=["attention"], lora_bias=True), ["lora_bias on layers.1.attention"]),
    (LoraConfig(targets=["embed_tokens"], lora_bias=True), ["lora_bias on embed_tokens"]),
    (
        LoraConfig(targets=["embed_tokens", "grouped"], invocation_tokens=[1]),
        ["invocation_tokens on embed_tokens", "invocation_tokens on grouped"],
    ),
    (LoraConfig(6, targets=["grouped"]), ["rank 6 on grouped", "a multiple of the 4 groups"]),
    (LoraConfig(targets=["embed_tokens"], tie=True), ["tie = True", "tied weights"]),
    (LoraConfig(targets=r"(.*a)*b"), ["no module is a target"]),
]


@pytest.mark.parametrize("config, texts", REFUSALS, ids=lambda x: "" if isinstance(x, list) else x)
def test_invalid_targets_are_refused_before_anything_changes(config, texts):
    model = Model()
    before = copy.deepcopy(model.state_dict()), str(model)
    with pytest.raises(Refused) as caught:
        LiveResolver(model, config).resolve()
    for text in texts:
        assert text in str(caught.value)
    assert str(model) == before[1] and set(model.state_dict()) == set(before[0])


def test_all_offenders_at_once():
    config = LoraConfig(
        targets=["norm", "x", "out_proj"], exclude=["y"], parameters=["z"], rank_pattern={"w": 1}
    )
    with pytest.raises(MultipleErrors) as caught:
        LiveResolver(Model(), config).resolve()
    problems = [error.problem for error in caught.value.errors]
    assert len(problems) == 8, problems  # two norms and two projections


def test_attention_with_two_widths():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=4)})
    with pytest.raises(Refused, match="factors on attention"):
        LiveResolver(model, LoraConfig(targets=["attention"])).resolve()


def test_modules_that_are_trained_in_full():
    def saved(*entries: str, task: str | None = None) -> list[str]:
        return LiveResolver(Model(), LoraConfig(modules_to_save=entries, task_type=task)).saved()

    assert saved() == []
    assert saved("head") == ["lm_head", "head"]
    assert saved("rm") == saved("norm") == ["layers.0.norm", "layers.1.norm"]
    assert saved("lm_head", "norm") == ["layers.0.norm", "layers.1.norm", "lm_head"]
    assert saved("layers.0", "q") == ["layers.0", "layers.1.q", "encoder.layers.0"]
    assert saved("m_head", task="SEQ_CLS") == ["lm_head"]  # no classifier, and no score
    with pytest.raises(Refused) as caught:
        saved("embed", "heads", "layers")
    for text in ("'embed' matches none", "'heads' matches none", "layers is a ModuleList"):
        assert text in str(caught.value)
    model = nn.ModuleDict({"classifier": linear(), "inner": nn.ModuleDict({"score": linear()})})
    config = LoraConfig(task_type="TOKEN_CLS")
    assert LiveResolver(model, config).saved() == ["classifier", "inner.score"]


def test_a_shared_module_is_trained_once():
    model = Model()
    model.other = model.head
    assert LiveResolver(model, LoraConfig(modules_to_save=["head", "other"])).saved() == [
        "lm_head", "head",
    ]  # fmt: skip
    assert LiveResolver(model, LoraConfig(modules_to_save=["other"])).saved() == ["other"]


def test_rows_of_tokens():
    def rows(tokens, **settings) -> dict[str, tuple[int, ...]]:
        config = LoraConfig(targets=["q"], trainable_tokens=tokens, **settings)
        return LiveResolver(Model(), config).tokens()

    assert rows(None) == {}
    assert rows([3, 1]) == {"embed_tokens": (3, 1)}
    assert rows({"embed_tokens": [0], "lm_head": [19]}) == {"embed_tokens": (0,), "lm_head": (19,)}
    refusals = [
        ([20, 3, 21], "embed_tokens has no rows [20, 21]"),
        ({"embed": [1]}, "'embed' matches none"),
        ({"norm": [1]}, "layers.0.norm is a LayerNorm"),
    ]
    for tokens, text in refusals:
        with pytest.raises(Refused) as caught:
            rows(tokens)
        assert text in str(caught.value)
    with pytest.raises(Refused, match="embed_tokens is fully trained"):
        rows([1], modules_to_save=["embed_tokens"])
    plain = nn.ModuleDict({"embed_tokens": nn.Embedding(4, 2), "q": linear()})
    config = LoraConfig(targets=["q"], trainable_tokens=[1])
    assert LiveResolver(plain, config).tokens() == {"embed_tokens": (1,)}
