"""Adapters that are damaged, foreign or hostile: refused by name, or provably the same plan; never a silent change."""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import adapterkit
from adapterkit import merge
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import AdapterkitError, Failed, Refused
from adapterkit.patterns import matcher
from adapterkit.planning.merge.job import Options
from adapterkit.planning.merge.plan import plan_merge
from tests.support.raw_files import (
    DTYPES,
    GOLDEN,
    HIDDEN,
    PREFIX,
    SIZES,
    WIDTH,
    AdapterFiles,
    Stored,
    adapter_config,
    base,
    base_tensors,
    llama,
    normal,
    pair,
    plain,
    tensors_file,
)

BASE = base()


def planned(adapter: AdapterFiles, options: Options = Options(), on=BASE):  # noqa: B008, frozen
    return plan_merge(on, [(adapter.folder(), 1.0)], options)


def refusal(adapter: AdapterFiles, **options) -> str:
    with pytest.raises(AdapterkitError) as caught:
        planned(adapter, Options(**options))
    message = str(caught.value)
    assert message.replace("\n", "").isprintable()
    assert len(message) < 20_000
    return message


def configured(**changes) -> AdapterFiles:
    """A plain adapter whose config has these changes; `...` takes a key out."""
    adapter = plain()
    config = adapter.config | changes
    return AdapterFiles({k: v for k, v in config.items() if v is not ...}, adapter.tensors)


# -- values ----------------------------------------------------------------------------------------------------------

WRONG = [
    *(("r", v) for v in (0, -1, 10**9, 2**31, 10**50, 4.0, 4.5, "4", None, True, [4], {}, math.nan, ...)),
    *(("lora_alpha", v) for v in (math.nan, math.inf, -math.inf, "16", None, True, [8], {"a": 1}, ...)),
    *(("peft_type", v) for v in ("LOHA", "", None, 5, ["LORA"], "../LORA", ...)),
    *(("use_rslora", v) for v in ("false", 1, 0.5, [True], {})),
    *(("use_dora", v) for v in ("no", 1, True)),
    *(("lora_bias", v) for v in ("none", True, 2)),
    *(("rank_pattern", {"down_proj": v}) for v in (0, 2.0, "2", -1, None, 3)),
    *(("rank_pattern", v) for v in ({"q_proj": 0}, [2], "2", 2, {}, ...)),
    *(("alpha_pattern", {"q_proj": v}) for v in (math.nan, math.inf, "3", None, [3.5])),
    *(("alpha_pattern", v) for v in ([3.5], "x", 3)),
    *(("init_lora_weights", v) for v in ("unknown", "trueish", "gaussianx", 5, ["gaussian"], {"a": 1})),
    *(("layer_replication", v) for v in ([[0, 10**9]], [[0, 10**15]], [[0]], ["01"], [[-1, 2]], [[0, 1.5]], "0-2",
    [[True, 2]])),
    *(("modules_to_save", v) for v in ("lm_head", ["ghost"], [5], {"a": 1}, [["score"]], [""])),
    *(("target_parameters", v) for v in ("experts", [1], {"a": 1})),
    *(("trainable_token_indices", v) for v in ([0], {"embed": [0]}, "0", 5, {"ghost": []})),
    *(("task_type", v) for v in (["CAUSAL_LM"], {"a": 1}, 5)),
    *(("peft_version", v) for v in (0.18, ["0.18"])),
]  # fmt: skip


@pytest.mark.parametrize("key, value", WRONG, ids=lambda v: str(v)[:30])
def test_a_value_out_of_range_is_refused_by_name(key, value, frugal):
    with frugal():
        message = refusal(configured(**{key: value}))
    assert key in message or (key == "trainable_token_indices" and "rows" in message)


@pytest.mark.parametrize(
    "text", ["1e400", "-1e400", "1" + "0" * 400, "NaN", "-Infinity", "9" * 5000]
)
def test_numbers_that_only_json_can_write_are_refused(text):
    folder = plain().folder()
    config = folder.content["adapter_config.json"].replace(
        b'"lora_alpha": 8', f'"lora_alpha": {text}'.encode()
    )
    folder.content["adapter_config.json"] = config
    with pytest.raises(AdapterkitError, match=r"lora_alpha|digits"):
        plan_merge(BASE, [(folder, 1.0)], Options())


OTHER = {
    "aLoRA": {"alora_invocation_tokens": [1, 2]},
    "Arrow": {"arrow_config": {"top_k": 2}},
    "KaSA": {"kasa_config": {"beta": 1}},
    "QALoRA": {"use_qalora": True},
    "BD-LoRA": {"use_bdlora": {"nblocks": 2}},
    "Megatron": {"megatron_config": {"tensor_model_parallel_size": 2}},
}


@pytest.mark.parametrize("name", OTHER)
def test_other_arithmetic_is_refused_by_name(name):
    message = refusal(configured(**OTHER[name]))
    assert next(iter(OTHER[name])) in message
    assert name.lower() in message.lower().replace("activated lora", "alora")


@pytest.mark.parametrize("value", [True, 1, "x", [0], {"a": None}, 0.5])
def test_an_unknown_setting_counts_when_it_is_set(value):
    message = refusal(configured(new_kind_of_scaling=value, another=value))
    assert "new_kind_of_scaling" in message
    assert "another" in message


@pytest.mark.parametrize("value", [False, None, 0, "", [], {}, 0.0])
def test_an_unknown_setting_that_is_off_changes_nothing(value):
    assert meaning(configured(new_kind_of_scaling=value)) == meaning(plain())


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq", "PiSSA"]
)
def test_an_adapter_of_a_changed_base_needs_the_word(init):
    assert "--base-is-residual" in refusal(configured(init_lora_weights=init))
    assert meaning(configured(init_lora_weights=init), base_is_residual=True) == meaning(plain())


# -- patterns --------------------------------------------------------------------------------------------------------

SLOW = "(.*?)*?" * 8 + "q$9"
BROKEN = {
    "a class": "[", "a group": "(", "breaks out of ours": "q_proj)|(?:.*", "counts": "a{1000000000}",
    "counts of counts": "(?:a{1000}){1000}", "nested": "(" * 400 + "a" + ")" * 400, "recursion": "(?R)+",
    "long": "a|" * 600,
    "long and plain": "a" * 10**6, "fuzzy": "foo{e<=3}", "lookbehind": "(?<=a*)b",
}  # fmt: skip


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", [SLOW, *BROKEN.values()], ids=["slow", *BROKEN])
def test_a_pattern_of_a_config_that_explodes_is_refused(key, pattern, frugal):
    with frugal(1.6):
        message = refusal(configured(**{key: {pattern: 2, "down_proj": 2}}))
    assert key in message
    assert "pattern" in message


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("pattern", [SLOW, *BROKEN.values()], ids=["slow", *BROKEN])
def test_a_pattern_of_the_command_line_that_explodes_is_refused(option, pattern, frugal):
    with frugal(1.6):
        message = refusal(plain(), **{option: pattern})
    assert f"--{option}" in message


def test_many_modules_do_not_each_wait_for_a_slow_pattern(frugal):
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(1000)]
    matches = matcher(SLOW, "here")
    with frugal(1.6):
        for name in names:
            with pytest.raises(Refused, match="takes seconds"):
                matches(name)


def test_many_nearly_slow_names_are_refused_together(monkeypatch):
    from adapterkit import patterns

    monkeypatch.setattr(patterns, "IN_ALL", 0.0)
    matches = matcher("a.*b", "here")
    matches("x" * 100_000)
    with pytest.raises(Refused, match="takes seconds"):
        matches("x")


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.[01]\.q_proj",
        "(q|v)_proj",
        r"layers\.(?:0|1)\..*",
        "q_proj{1}",
        "^model",
        "q.proj$",
    ],
)
def test_sound_patterns_still_work(pattern):
    assert matcher(pattern, "here")("model.layers.0.q_proj")


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern"])
def test_patterns_that_mean_nothing_for_a_merge_are_never_run(key, frugal):
    with frugal():
        assert meaning(configured(**{key: "((a+)+)+$"})) == meaning(plain())


# -- what is never followed ------------------------------------------------------------------------------------------

WATCHED = """
import json, sys
from pathlib import Path
here, out = sys.argv[1:]
import adapterkit.verbs.merge, adapterkit.engines.local, regex
seen = []
def audit(event, args):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "urllib.")):
        seen.append([event, repr(args)])
    elif event == "open" and isinstance(args[0], str):
        seen.append([event, args[0]])
    elif event == "import":
        seen.append([event, args[0]])
sys.addaudithook(audit)
adapterkit.verbs.merge.merge(here + "/base", [here + "/adapter"], out=out)
print(json.dumps(seen))
"""

STRANGERS = {
    "base_model_name_or_path": [
        "/etc/hostname",
        "https://evil.example/model",
        "evil/other-model",
        "../../elsewhere",
        "file:///x",
    ],
    "auto_mapping": [{"base_model_class": "Evil", "parent_library": "evil_module"}],
    "revision": ["main; rm -rf /"],
    "megatron_core": ["evil_module"],
}


@pytest.mark.parametrize(
    "key, value", [(k, v) for k, values in STRANGERS.items() for v in values], ids=str
)
def test_what_a_config_points_at_changes_no_byte(key, value):
    assert meaning(configured(**{key: value})) == meaning(plain())


def test_nothing_is_imported_fetched_followed_or_copied(tmp_path):
    """All of it at once, in a process that reports every import, open and connection."""
    adapter = configured(**{key: values[0] for key, values in STRANGERS.items()}).folder()
    code = b"raise SystemExit('this code must not run')\n"
    adapter.content |= {
        "evil_module.py": code,
        "modeling_evil.py": code,
        "adapter_model.bin": b"cos\nsystem\n(S'id'\ntR.",
    }
    on = base(
        auto_map={"AutoModel": "modeling_evil.Evil", "AutoConfig": "evil/repo--modeling_evil.Evil"},
        backbone="evil/repo",
    )
    on.content["modeling_evil.py"] = code
    on.write(tmp_path / "base"), adapter.write(tmp_path / "adapter")
    command = [sys.executable, "-c", WATCHED, str(tmp_path), str(tmp_path / "out")]
    env = os.environ | {"PYTHONPATH": str(Path(adapterkit.__file__).parents[1])}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=tmp_path / "adapter", env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert any(event == "open" for event, _ in seen)  # the watch works
    strange = [
        (event, what)
        for event, what in seen
        if event not in ("open", "import", "socket.gethostname")
    ]
    assert not strange
    assert not [
        what
        for event, what in seen
        if event == "import" and ("evil" in what or what.startswith("peft"))
    ]
    opened = [what for event, what in seen if event == "open"]
    assert not [
        what
        for what in opened
        if "hostname" in what or "evil.example" in what or what.endswith(".bin")
    ]
    assert not [what for what in opened if "adapter/" in what and what.endswith(".py")]
    out = {p.name for p in (tmp_path / "out").iterdir()}
    assert "modeling_evil.py" in out  # the base's own code is copied
    assert not {"evil_module.py", "adapter_model.bin", "adapter_config.json"} & out
    assert (tmp_path / "out" / "modeling_evil.py").read_bytes() == code
    text = "".join(
        p.read_text(errors="replace")
        for p in (tmp_path / "out").iterdir()
        if p.suffix in (".json", ".md")
    )
    assert "/etc/hostname" not in text


# -- values that are no numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("golden, ending", [
    ("plain", "down_proj.lora_A.weight"), ("plain", "0.q_proj.lora_B.weight"), ("decomposed",
    "1.up_proj.lora_magnitude_vector"),
    ("decomposed", "0.up_proj.lora_B.bias"), ("everything_else", "embed.lora_embedding_B"), ("everything_else",
    "conv.lora_A.weight"),
])  # fmt: skip
def test_factors_that_are_not_finite_are_refused_by_name(golden, ending, bad, tmp_path):
    adapter = GOLDEN[golden]()
    key = next(k for k in adapter.tensors if k.endswith(ending))
    values = np.frombuffer(adapter.tensors[key].data, np.float32).copy()
    values[-1] = bad
    adapter.tensors[key] = Stored("F32", adapter.tensors[key].shape, values.tobytes())
    with pytest.raises(Failed, match="not finite") as caught:
        merge(
            BASE.write(tmp_path / "base"),
            [adapter.folder().write(tmp_path / "adapter")],
            out=tmp_path / "out",
        )
    assert key in str(caught.value)
    assert not (tmp_path / "out").exists()


# -- every single-key mutation ---------------------------------------------------------------------------------------


def meaning(adapter: AdapterFiles, **options) -> str:
    """What a plan does, with the bytes themselves in place of where they are: equal meanings give equal outputs."""
    folder = adapter.folder()
    plan = plan_merge(BASE, [(folder, 1.0)], Options(**options))
    payload = {0: BASE.content, 1: folder.content}

    def plain_form(value):
        if isinstance(value, TensorSpec):
            data = payload[value.folder][value.file][value.start : value.stop]
            if value.dtype in ("F16", "F32", "F64"):
                kind = {"F16": np.float16, "F32": np.float32, "F64": np.float64}[value.dtype]
                data = np.frombuffer(data, kind).astype(np.float64).tobytes()
            return ["tensor", [n for n in value.shape if n != 1], hashlib.sha256(data).hexdigest()]
        if dataclasses.is_dataclass(value):
            return [
                type(value).__name__,
                *(plain_form(getattr(value, f.name)) for f in dataclasses.fields(value)),
            ]
        if isinstance(value, (tuple, list, range, np.ndarray)):
            return [plain_form(v) for v in value]
        return repr(value)

    steps = [plain_form(step) for shard in plan.shards for step in shard.steps]
    config = plan.files["config.json"]
    return json.dumps([steps, config.decode() if isinstance(config, bytes) else "as it was"])


def names_like(key: str, adapter: AdapterFiles) -> Iterator[str]:
    """Other names for a key: near, far, in other spellings."""
    yield from (
        key + "x",
        "x" + key,
        key[:-1],
        key.upper(),
        key.removeprefix(PREFIX),
        PREFIX + key,
        key + ".weight",
    )
    for old, new in [
        ("lora_A", "lora_B"), ("lora_B", "lora_A"), ("lora_A.weight", "lora_A.default.weight"), ("lora_A", "lora_C"),
        ("lora_A", "lora_a"), ("lora_", "vera_"), (".weight", ".bias"), (".bias", ".weight"), ("layers.0", "layers.1"),
        ("layers.1", "layers.0"), ("layers.0", "layers.7"), ("q_proj", "up_proj"), ("up_proj", "down_proj"),
        ("up_proj", "q_proj"),
        ("embedding_A", "embedding_B"), ("score", "model.norm"), ("score", "model.layers.0.q_proj"), ("model.embed",
        "score"),
        (".lora", ".base_layer.lora"), ("lora_magnitude_vector", "lora_magnitude"), ("conv", "norm"),
        ("token_adapter.trainable_tokens_delta", "trainable_tokens"), (".up_proj.bias", ".up_proj.base_layer.bias"),
    ]:  # fmt: skip
        if old in key:
            yield key.replace(old, new)
    yield from adapter.tensors  # another's name: then that one is gone
    yield from (PREFIX + name for name in base_tensors())


def bodies_like(tensor: Stored) -> Iterator[Stored]:
    """Other dtypes and shapes for a tensor; those of equal bytes are reinterpretations."""
    shape, size = tensor.shape, math.prod(tensor.shape)
    values = np.frombuffer(tensor.data, np.float32).reshape(shape)
    for name in DTYPES:
        if name != "float32":
            yield Stored.of(values.astype(name))
    yield from (
        Stored(d, shape, b"\0" * (size * SIZES.get(d, 1)))
        for d in ("F8_E4M3", "F8_E5M2", "I8", "BOOL")
    )
    yield from (
        Stored("C64", shape, tensor.data * 2),
        Stored("F4", (*shape[:-1], shape[-1] * 8), tensor.data),
    )
    shapes = [
        shape[::-1],
        (size,),
        (1, *shape),
        (*shape, 1),
        (),
        (0,),
        (0, *shape[1:]),
        (*shape[:-1], 0),
        (size, 1),
        (1, size),
    ]
    for axis in range(len(shape)):
        for change in (-1, 1, shape[axis]):
            shapes.append((*shape[:axis], shape[axis] + change, *shape[axis + 1 :]))
        shapes.append((*shape[:axis], shape[axis] // 2, *shape[axis + 1 :]))
    for other in shapes:
        if other != shape:
            yield Stored(
                "F32", other, np.resize(values, math.prod(other)).astype(np.float32).tobytes()
            )


def mutations(adapter: AdapterFiles) -> Iterator[tuple[str, AdapterFiles]]:
    tensors, config = adapter.tensors, adapter.config
    for key, tensor in tensors.items():
        rest = {k: v for k, v in tensors.items() if k != key}
        yield f"drop {key}", AdapterFiles(config, rest)
        for name in dict.fromkeys(names_like(key, adapter)):
            if name != key:
                yield (
                    f"rename {key} to {name}",
                    AdapterFiles(
                        config, {k: v for k, v in rest.items() if k != name} | {name: tensor}
                    ),
                )
                if name not in tensors:
                    yield f"copy {key} as {name}", AdapterFiles(config, tensors | {name: tensor})
        for body in bodies_like(tensor):
            yield f"{key} as {body.dtype} {body.shape}", AdapterFiles(config, tensors | {key: body})
        if "lora_A" in key:
            other = key.replace("lora_A", "lora_B")
            yield (
                f"swap A and B of {key}",
                AdapterFiles(config, tensors | {key: tensors[other], other: tensor}),
            )
    for name, tensor in base_tensors().items():
        if PREFIX + name not in tensors:
            yield f"extra {name}", AdapterFiles(config, tensors | {PREFIX + name: tensor})
        yield f"extra {name}, no prefix", AdapterFiles(config, tensors | {name: tensor})
    for key in config:
        yield (
            f"config without {key}",
            AdapterFiles({k: v for k, v in config.items() if k != key}, tensors),
        )
        yield (
            f"config {key} renamed",
            AdapterFiles({k + "_" * (k == key): v for k, v in config.items()}, tensors),
        )
        for value in (
            None,
            True,
            False,
            0,
            1,
            -1,
            0.5,
            "x",
            "",
            [],
            ["x"],
            {},
            {"x": 1},
            {"": 3},
            10**20,
        ):
            yield f"config {key} = {value!r}", AdapterFiles(config | {key: value}, tensors)


def meant(name: str, adapter: AdapterFiles) -> bool:
    """Whether a mutation is a plain statement, which no reader can tell from the truth."""
    words = name.split()
    if words[0] == "config":
        # another scale; a file without these two is one of an older PEFT
        stated = (
            {"lora_alpha", "alpha_pattern", "use_rslora"}
            if "=" in words
            else {"alpha_pattern", "use_rslora"}
        )
        return bool(stated & set(words)) and "renamed" not in words
    # PEFT saves trained or resized embeddings without a word in the config
    return (
        words[0] == "extra"
        and words[1].startswith("model.embed.weight")
        and not adapter.config["modules_to_save"]
    )


EXPECTED = {"plain": 950, "decomposed": 950, "everything_else": 800, "token_rows": 550}


@pytest.mark.parametrize("golden", GOLDEN)
def test_no_mutation_of_one_key_changes_the_plan_silently(golden):
    adapter = GOLDEN[golden]()
    right = meaning(adapter)
    refused, same, silent = 0, [], []
    for name, mutant in mutations(adapter):
        try:
            got = meaning(mutant)
        except AdapterkitError:
            refused += 1
            continue
        if got == right:
            same.append(name)
        elif not meant(name, mutant):
            silent.append(name)
    assert not silent, f"{len(silent)} of {refused + len(same)}:\n" + "\n".join(silent)
    assert refused + len(same) > EXPECTED[golden]
    assert refused > 5 * len([name for name in same if not name.startswith("config")])


def test_factors_of_a_llama_are_taken():
    mlp = "model.layers.0.mlp."
    tensors = pair(mlp + "up_proj", HIDDEN, WIDTH) | pair(mlp + "down_proj", WIDTH, HIDDEN)
    assert planned(AdapterFiles(adapter_config(), tensors), on=llama())


def test_factors_of_two_modules_exchanged_are_refused():
    """up_proj's under down_proj's name and the other way round: turned round they would fit, but these are no Conv1D."""
    mlp = "model.layers.0.mlp."
    tensors = pair(mlp + "down_proj", HIDDEN, WIDTH) | pair(mlp + "up_proj", WIDTH, HIDDEN)
    with pytest.raises(Refused):
        planned(AdapterFiles(adapter_config(), tensors), on=llama())


def test_a_saved_module_without_its_bias_is_refused():
    """PEFT saves a module's whole state: a head without the bias that the base has would keep the old bias."""
    adapter = configured(modules_to_save=["score"])
    adapter.tensors[PREFIX + "score.weight"] = normal(3, WIDTH, seed=9)
    with pytest.raises(Refused):
        planned(adapter, on=with_tensors(**{"score.bias": normal(3)}))


# -- quantized bases -------------------------------------------------------------------------------------------------

SAID = {
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "awq": {"quantization_config": {"quant_method": "awq"}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4"}},
    "compressed-tensors": {"quantization_config": {"quant_method": "compressed-tensors"}},
    "torchao": {"quantization_config": {"quant_method": "torchao"}},
    "nested": {"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}},
    "older compressed-tensors": {"compression_config": {"format": "pack-quantized"}},
    "mlx": {"quantization": {"group_size": 64, "bits": 4}},
    "without a method": {"quantization_config": {"bits": 4}},
    "no map": {"quantization_config": "int8"},
}
LAYER = "model.layers.0.q_proj"
SIBLINGS = {
    "bitsandbytes 4-bit": (".weight.absmax", "F32"), "bitsandbytes int8": (".SCB", "F32"),
    "block fp8": (".weight_scale_inv", "F32"),
    "fp8": (".weight_scale", "F32"), "compressed-tensors packed": (".weight_packed", "I32"), "GPTQ": (".qweight",
    "I32"),
    "AWQ": (".qzeros", "I32"), "HQQ": (".W_q", "U8"), "AQLM": (".codebooks", "F16"), "Quanto": (".weight._data", "I8"),
    "torchao": (":qdata", "I8"), "EETQ": (".weight_scales", "F16"),
}  # fmt: skip


def quantized(message: str) -> None:
    assert "a quantized base" in message
    assert "dequantize it" in message


@pytest.mark.parametrize("name", SAID)
def test_a_base_whose_config_says_quantized_is_refused(name):
    with pytest.raises(Refused) as caught:
        planned(plain(), on=base(**SAID[name]))
    quantized(str(caught.value))
    method = SAID[name].get("quantization_config", {})
    assert not isinstance(method, dict) or method.get("quant_method", "") in str(caught.value)


def with_tensors(**tensors: Stored):
    folder = base()
    folder.content["model.safetensors"] = tensors_file(base_tensors() | tensors)
    return folder


@pytest.mark.parametrize("name", SIBLINGS)
def test_a_base_with_scales_beside_its_weights_is_refused(name):
    ending, dtype = SIBLINGS[name]
    with pytest.raises(AdapterkitError) as caught:
        planned(
            plain(),
            on=with_tensors(
                **{LAYER + ending: Stored(dtype, (4,), b"\0" * 4 * SIZES.get(dtype, 1))}
            ),
        )
    if name == "bitsandbytes int8":  # a format that is known: the rows lack their codes
        assert "I8 rows" in str(caught.value)
        return
    quantized(str(caught.value))
    assert name.split()[0] in str(caught.value)


def test_mxfp4_is_told_by_a_pair():
    blocks = {"model.experts_blocks": Stored("U8", (4,), b"\0" * 4)}
    planned(plain(), on=with_tensors(**blocks))  # a name of that ending alone says nothing
    with pytest.raises(Refused, match="MXFP4"):
        planned(
            plain(),
            on=with_tensors(**blocks, **{"model.experts_scales": Stored("U8", (4,), b"\0" * 4)}),
        )


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"])
def test_a_base_in_eight_bits_or_fewer_is_refused(dtype):
    with pytest.raises(Refused, match=dtype):
        planned(
            plain(), on=with_tensors(extra=Stored(dtype, (8,), b"\0" * (4 if dtype == "F4" else 8)))
        )


@pytest.mark.parametrize("said", [None, False])
def test_a_config_that_says_not_quantized_is_fine(said):
    planned(plain(), on=base(quantization_config=said))


@pytest.mark.parametrize("dtype", ["I8", "U8", "I32", "U32", "BOOL", "C64"])
def test_whole_numbers_are_no_weights(dtype):
    size = {"I8": 1, "U8": 1, "I32": 4, "U32": 4, "BOOL": 1, "C64": 8}[dtype]
    weight = Stored(dtype, (WIDTH, WIDTH), b"\0" * WIDTH * WIDTH * size)
    with pytest.raises(Refused, match=f"{LAYER}.weight is {dtype}"):
        planned(plain(), on=with_tensors(**{LAYER + ".weight": weight}))
