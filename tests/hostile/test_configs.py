"""Adapters that are damaged, foreign or hostile: refused by name, or provably the same plan; never
a silent change."""

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import regex

import adapterkit
from adapterkit import merge
from adapterkit.core.errors import AdapterkitError, Failed, Refused
from adapterkit.core.inputs.base_door import Base
from adapterkit.core.merge.plan import plan_merge
from adapterkit.core.merge.verb import MergeOptions
from adapterkit.core.patterns import matcher
from tests.support.planned import BASE, configured, meaning, refusal
from tests.support.raw_files import (
    GOLDEN,
    ROWS,
    WIDTH,
    AdapterFiles,
    Stored,
    adapter_config,
    base,
    decomposed,
    everything_else,
    file_of,
    llama,
    normal,
    pair,
    plain,
    tensors_file,
    token_rows,
)
from tests.support.usual import usual

# -- values --

WRONG = [
    *(("r", v) for v in (0, -1, 10**9, 2**31, 10**50, 4.0, 4.5, "4", None, True, [4], {})),
    *(("r", v) for v in (math.nan, ...)),
    *(("lora_alpha", v) for v in (math.nan, math.inf, -math.inf, "16", None, True, [8])),
    *(("lora_alpha", v) for v in ({"a": 1}, ...)),
    *(("peft_type", v) for v in ("LOHA", "", None, 5, ["LORA"], "../LORA", ...)),
    *(("use_rslora", v) for v in ("false", 1, 0.5, [True], {})),
    *(("use_dora", v) for v in ("no", 1, True)),
    *(("lora_bias", v) for v in ("none", True, 2)),
    *(("rank_pattern", {"down_proj": v}) for v in (0, 2.0, "2", -1, None, 3)),
    *(("rank_pattern", v) for v in ({"q_proj": 0}, [2], "2", 2, {}, ...)),
    *(("alpha_pattern", {"q_proj": v}) for v in (math.nan, math.inf, "3", None, [3.5])),
    *(("alpha_pattern", v) for v in ([3.5], "x", 3)),
    *(("init_lora_weights", v) for v in ("unknown", "trueish", "gaussianx", 5, ["gaussian"])),
    ("init_lora_weights", {"a": 1}),
    *(("layer_replication", v) for v in ([[0, 10**9]], [[0, 10**15]], [[0]], ["01"], [[-1, 2]])),
    *(("layer_replication", v) for v in ([[0, 1.5]], "0-2", [[True, 2]])),
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
        plan_merge(Base(BASE), [(folder, 1.0)], MergeOptions())


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


# -- patterns --

SLOW = "(.*?)*?" * 8 + "q$9"
BROKEN = {
    "a class": "[", "a group": "(", "breaks out of ours": "q_proj)|(?:.*",
    "counts": "a{1000000000}", "counts of counts": "(?:a{1000}){1000}",
    "nested": "(" * 400 + "a" + ")" * 400, "recursion": "(?R)+",
    "long": "a|" * 600,
    "long and plain": "a" * 10**6, "fuzzy": "foo{e<=3}", "lookbehind": "(?<=a*)b",
}  # fmt: skip


def exploding(name: str, *values: str) -> pytest.MarkDecorator:
    """Every pattern with every value; the one that takes its time with the first."""
    patterns = {"slow": SLOW, **BROKEN}
    rows = usual(
        itertools.product(patterns.values(), values),
        lambda row: row[0] != SLOW or row[1] == values[0],
    )
    ids = [f"{pattern}-{value}" for pattern, value in itertools.product(patterns, values)]
    return pytest.mark.parametrize(("pattern", name), rows, ids=ids)


@exploding("key", "rank_pattern", "alpha_pattern")
def test_a_pattern_of_a_config_that_explodes_is_refused(key, pattern, frugal):
    with frugal(1.6):
        message = refusal(configured(**{key: {pattern: 2, "down_proj": 2}}))
    assert key in message
    assert "pattern" in message


@exploding("option", "include", "exclude")
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
    from adapterkit.core import patterns

    monkeypatch.setattr(patterns, "TOTAL_TIMEOUT", 0.0)
    matches = matcher("a.*b", "here")
    matches("x" * 100_000)
    with pytest.raises(Refused, match="takes seconds"):
        matches("x")


def test_a_process_that_waits_refuses_no_sound_pattern(monkeypatch):
    """Seconds count in which the processor matches, not those in which the process waits."""
    from adapterkit.core import patterns

    compile = regex.compile

    def search(pattern: str, text: str, timeout: float) -> object:
        time.sleep(0.3)
        return compile(pattern).search(text, timeout=timeout)

    monkeypatch.setattr(patterns, "TOTAL_TIMEOUT", 0.2)
    monkeypatch.setattr(regex, "compile", lambda pattern: Mock(search=partial(search, pattern)))
    matches = matcher("a.*b", "here")
    assert [matches(text) for text in ("axb", "x", "ab")] == [True, False, True]


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


# -- what is never followed --

WATCHED = """
import json, sys
from pathlib import Path
here, out = sys.argv[1:]
import adapterkit.core.merge.verb, adapterkit.core.engine.local, regex
seen = []
def audit(event, args):
    calls = "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "urllib."
    if event.startswith(calls):
        seen.append([event, repr(args)])
    elif event == "open" and isinstance(args[0], str):
        seen.append([event, args[0]])
    elif event == "import":
        seen.append([event, args[0]])
sys.addaudithook(audit)
adapterkit.core.merge.verb.merge(here + "/base", [here + "/adapter"], out=out)
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
def test_references_in_a_config_change_no_byte(key, value):
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
        command, capture_output=True, text=True, timeout=240, cwd=tmp_path / "adapter", env=env
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
    strangers = [what for what in opened if not what.startswith(env["PYTHONPATH"])]
    assert not [what for what in strangers if "adapter/" in what and what.endswith(".py")]
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


# -- values that are no numbers --


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("golden, ending", [
    ("plain", "down_proj.lora_A.weight"),
    ("plain", "0.q_proj.lora_B.weight"),
    ("decomposed", "1.up_proj.lora_magnitude_vector"),
    ("decomposed", "0.up_proj.lora_B.bias"),
    ("everything_else", "embed.lora_embedding_B"),
    ("everything_else", "conv.lora_A.weight"),
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


# -- a file that adapterkit makes for itself -------------------------------------------------------


def test_deltas_of_a_file_of_our_own_are_refused_from_elsewhere(tmp_path):
    """An adapter of q_proj that would change lm_head too, which no other reader shows."""
    delta = {"0.diff": normal(ROWS, WIDTH, seed=3)}
    record = {"name": "lm_head", "kind": "full", "alpha": 1.0, "rank": 1,
              "leaves": ["weight"], "rows": None}  # fmt: skip
    stored = tensors_file(delta)
    length = int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8 : 8 + length])
    header = {"__metadata__": {"modules": json.dumps([record])}} | header
    model = llama().write(tmp_path / "base")
    files = pair("model.layers.0.self_attn.q_proj", WIDTH, WIDTH)
    adapter = AdapterFiles(adapter_config(target_modules=["q_proj"]), files).folder()
    adapter = adapter.write(tmp_path / "adapter")
    honest = adapterkit.merge(model, adapter, out=tmp_path / "honest").data["parameters"]
    assert not any("lm_head" in name for name in honest)
    (adapter / "added_deltas.safetensors").write_bytes(file_of(header, stored[8 + length :]))
    for call in (
        lambda: adapterkit.merge(model, adapter, out=tmp_path / "out"),
        lambda: adapterkit.merge(model, {adapter: 0.5}, method="ties", out=tmp_path / "out"),
        lambda: adapterkit.combine([adapter, adapter], out=tmp_path / "out"),
        lambda: adapterkit.inspect(adapter, base=model),
        lambda: adapterkit.verify(tmp_path / "honest", base=model, adapters=[adapter]),
        lambda: adapterkit.resize(adapter, rank=2, out=tmp_path / "out"),
    ):
        with pytest.raises(Refused, match="added_deltas.safetensors is a file that adapterkit"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("files", [plain, decomposed, everything_else, token_rows])
def test_inspect_names_every_module_that_a_merge_changes(files, tmp_path):
    base().write(tmp_path / "base")
    adapter = files().folder().write(tmp_path / "adapter")
    changed = adapterkit.merge(tmp_path / "base", adapter, out=tmp_path / "out").data["parameters"]
    text = json.dumps(adapterkit.inspect(adapter, base=tmp_path / "base"))
    assert changed and not [key for key in changed if key.rpartition(".")[0] not in text]


# -- a base whose config leads elsewhere, or never ends --------------------------------------------


@pytest.mark.timeout(120)  # only what hangs takes so long
@pytest.mark.parametrize("config", [
    {"model_type": "//evilhost/share"}, {"model_type": "{here}"}, {"model_type": "../../x"},
    {"model_type": "x" * 300}, {"model_type": "llama", "num_labels": 2 * 10**9},
    {"model_type": "llama", "text_config": {"num_labels": 2 * 10**9}},
    {"model_type": "bart", "decoder_layers": 10**9}, {"model_type": "swin", "depths": [10**8, 2]},
    {"model_type": "x", "encoder": {"num_hidden_layers": 10**8}},
    {"model_type": "x", "parts": [{"layers_per_block": 10**9}]},
    {"model_type": "llama", "num_hidden_layers": []}, {"model_type": "llama", "n_layer": {}},
])  # fmt: skip
def test_a_config_opens_no_file_and_builds_no_endless_model(config, tmp_path, monkeypatch):
    """A type is a name, not a path to code; what is counted is held against the stored tensors."""
    (tmp_path / "modeling_x.py").symlink_to("/dev/zero")
    config = json.loads(json.dumps(config).replace("{here}", str(tmp_path)))
    model = llama()
    own = json.loads(model.content["config.json"]) | config
    model.content["config.json"] = json.dumps(own).encode()
    model.write(tmp_path / "base")
    files = pair("model.layers.0.self_attn.q_proj", WIDTH, WIDTH)
    adapter = AdapterFiles(adapter_config(target_modules=["q_proj"]), files).folder()
    adapter.write(tmp_path / "adapter")
    looks, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path=".": looks.append(str(path)) or scandir(path))
    for call in (
        lambda: adapterkit.inspect(tmp_path / "base"),
        lambda: adapterkit.merge(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out"),
    ):
        with contextlib.suppress(AdapterkitError):
            call()
    assert not [path for path in looks if "evilhost" in path or path == str(tmp_path)]
