"""What a fit writes and says; planted weights; what stops it, and what it goes on with."""

import os
import signal
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import AdapterkitError, Failed, Refused
from adapterkit.core.inputs.weights_file import read_weights
from adapterkit.runtime import load
from adapterkit.verbs.fit import coarse_to_fine as staircase
from adapterkit.verbs.fit.objective import TeacherObjective
from adapterkit.verbs.fit.plan import plan_fit
from adapterkit.verbs.fit.solver import Balance, Level, Point, minimize
from adapterkit.verbs.fit.verb import WeightFit
from tests.support import oracle
from tests.support.fitting import batches_of, points, runs_of
from tests.support.forks import command
from tests.support.live import llama, tokens
from tests.support.texts import save_tokenizer, write_rows

TEXTS = ["who is that?", "me too", "the others are there.", "no, they were", "hm", "is this it?",
         "or not", "what is it?"]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    return [write_rows(tmp_path / f"{name}.jsonl", *({"text": f"{name} {text}"} for text in TEXTS))
            for name in ("one", "two")]  # fmt: skip


def fitted(base, adapters, data, out, **options):
    document = adapterkit.fit(base, adapters, data=data, out=out, samples=16, **options)
    return document, read_weights(LocalFolder(out))


def zero(adapter, out):
    """An adapter whose delta is zero."""
    out.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {k: v * ("lora_A" in k) for k, v in tensors.items()}
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return out


@pytest.mark.parametrize("per", ["adapter", "module"])
def test_a_fit_finds_the_weights_of_a_known_mixture(tmp_path, per):
    """Those of a teacher that is a known mixture, in float64."""
    make = lambda: llama(num_hidden_layers=1)
    make().save_pretrained(tmp_path / "base")
    adapters = [tmp_path / name for name in "abc"]
    for seed, adapter in enumerate(adapters):
        oracle.train(make(), adapter, seed=seed, size=0.2, target_modules=["q_proj", "down_proj"])
    ids = tokens(8, 12)
    batches = batches_of([{"input_ids": ids, "labels": ids}])
    with runs_of(tmp_path / "base", adapters, tmp_path / "work", target=TeacherObjective) as runs:
        owners = [owner[0] for owner in runs.weighted_model.owners]
        groups = torch.tensor(owners if per == "adapter" else range(len(owners)))
        planted = torch.tensor([0.7, -0.3, 0.4, 1.1, 0.2, 0.9]).double()[groups]
        runs.run(planted, batches, runs.target.look)
        counts, start = groups.bincount(), torch.full_like(planted, 1 / 3)
        level = Level(start, groups, torch.ones(len(counts)).double(), 0.0, -1.0, 2.0)
        one = torch.ones(1).double()
        balance = Balance(False, torch.zeros(8).long(), torch.full((8,), 1 / 8).double(), one)

        evaluate = lambda c: Point.of(c, balance, *runs.gradients(c, batches))
        c = minimize(level, [], evaluate, enough=1e-12, share=0, steps=60).c
    assert float((c - planted).abs().max()) < 1e-3


def test_the_merged_model_has_the_printed_loss(tmp_path, base, adapters, data):
    """The merged model has the printed loss; the file has digests, and where it comes from."""
    out = tmp_path / "weights.json"
    document, weights = fitted(base, adapters, data, out, ridge=0.01, whole_model=True)
    rows = {row["row"]: row for row in document["losses"]}
    names = [
        "base",
        *(one.name for one in adapters),
        "equal",
        "start",
        "adapter",
        "layer",
        "module",
    ]
    assert list(rows) == names
    kept = [step for step in document["steps"] if step["kept"]]
    assert kept and document["written"]["per"] == kept[-1]["per"] == weights.per
    for before, step in zip([rows["start"], *kept], kept, strict=False):
        start = before["value"] if "value" in before else before["held"]
        assert step["gain"] == pytest.approx(start - step["held"]) and step["gain"] > step["error"]
    assert weights.fit["losses"] == document["losses"]
    assert weights.base.fingerprint and all(one.files for one in weights.adapters)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    # a base of its own, it has the loss that was said
    adapterkit.merge(base, adapters, weights=out, out=tmp_path / "merged", dtype="fp32")
    again = {"ridge": 1e6, "granularity": "adapter", "whole_model": True}
    found, _ = fitted(tmp_path / "merged", adapters, data, tmp_path / "again.json", **again)
    said = rows[document["written"]["per"]]["files"]
    assert found["losses"][0]["files"] == pytest.approx(said, abs=2e-5)


def test_layer_by_layer(tmp_path, base, adapters, data, large):
    """The same weights, and the same losses."""
    whole, one = fitted(base, adapters, data, tmp_path / "a.json", ridge=0.1, whole_model=True)
    layers, other = fitted(base, adapters, data, tmp_path / "b.json", ridge=0.1)
    assert one.modules.keys() == other.modules.keys() and one.modules
    for name, weights in one.modules.items():
        assert other.modules[name] == pytest.approx(weights, abs=1e-3), name
    for a, b in zip(whole["losses"], layers["losses"], strict=True):
        assert b["files"] == pytest.approx(a["files"], abs=1e-4)


def test_a_layer_at_a_time_holds_its_factors_alone(tmp_path, adapters, large):
    oracle.save_base(oracle.llama(), tmp_path / "base", "fp32")
    held = []
    with runs_of(tmp_path / "base", adapters, tmp_path / "work", whole=False) as runs:
        places, load_more = runs.weighted_model.places, runs.weighted_model.load

        def counted(*args):
            load_more(*args)
            held.append(sum(not place.patch.a.is_meta for place in places))

        runs.weighted_model.load = counted
        ids = tokens(2, 6)
        runs.gradients(
            points(runs.weighted_model.size), batches_of([{"input_ids": ids, "labels": ids}])
        )
    assert max(held) == len(places) // 2 == 2  # of one of two layers


@pytest.mark.parametrize("kind", ["nf4", "t5"])
def test_a_quantized_base_and_an_encoder_decoder_can_be_fitted(
    tmp_path, base, adapters, data, kind
):
    """A quantized one; an encoder and a decoder, of pairs."""
    folder, names, files, options = tmp_path / "base", adapters[:2], data, {"dtype": "fp32"}
    if kind == "nf4":
        adapterkit.quantize(base, to="nf4", out=folder)
        save_tokenizer(folder)
    else:
        model = oracle.t5()
        model.config.decoder_start_token_id = 1
        oracle.save_base(model, folder, "fp32")
        save_tokenizer(folder)
        names, rows = [tmp_path / "a", tmp_path / "b"], []
        for seed, name in enumerate(names):
            oracle.train(oracle.t5(), name, seed=seed, target_modules=["q", "wo"])
        rows = [{"prompt": text, "completion": text[::-1]} for text in TEXTS]
        files = [write_rows(tmp_path / "pairs.jsonl", *rows)]
    options |= {"granularity": "adapter", "ridge": 0.1}
    one, _ = fitted(folder, names, files, tmp_path / "1.json", **options)
    other, _ = fitted(folder, names, files, tmp_path / "2.json", whole_model=True, **options)
    for a, b in zip(one["losses"], other["losses"], strict=True):
        assert b["files"] == pytest.approx(a["files"], abs=1e-4)


def test_no_ridge_behind_one_that_does_worse(tmp_path, base, adapters, data, monkeypatch):
    """The one before is taken, which the next began with."""
    ridges, begins = [], []
    closely = partial(minimize, enough=1e-6)  # adapters that change little

    def badly(level, seen, evaluate):
        begins.append(len(seen))
        ridges.append(level.ridge)
        return closely(level, seen, evaluate) if len(ridges) == 1 else evaluate(seen[-1].c - 1.5)

    options = {"granularity": "adapter", "whole_model": True}
    monkeypatch.setattr(staircase, "minimize", closely)
    one, _ = fitted(base, adapters[:2], data, tmp_path / "1.json", ridge=1.0, **options)
    monkeypatch.setattr(staircase, "minimize", badly)
    document, _ = fitted(base, adapters[:2], data, tmp_path / "w.json", **options)
    assert ridges == [*staircase.RIDGES[:2]]
    assert begins[0] == 0 < begins[1]
    ((found,), (expected,)) = document["steps"], one["steps"]
    assert found == expected | {"passes": expected["passes"] + 1} and found["train_gain"] > 0


def test_a_note_where_one_alone_is_as_good(tmp_path, base, adapters, data):
    """The base, where adapters do nothing; none where the sum gains."""
    nothing, out = zero(adapters[0], tmp_path / "nothing"), tmp_path / "w.json"
    options = {"granularity": "adapter", "whole_model": True, "ridge": 0.0, "overwrite": True}
    document, _ = fitted(base, [nothing, nothing], data, out, **options)
    assert [note for note in document["notes"] if note.startswith("base alone")]
    document, _ = fitted(base, adapters, data, out, **options)
    rows = {row["row"]: row["value"] for row in document["losses"]}
    (step,) = document["steps"]
    least = min(("base", *(one.name for one in adapters)), key=rows.get)
    noted = [note for note in document["notes"] if note.startswith(f"{least} alone")]
    assert bool(noted) == (rows[least] - step["held"] <= step["error"]), (rows, step)


def test_order_duplicates_and_zeros(tmp_path, base, adapters, data):
    """The order of adapters changes nothing, equal ones have equal weights, one that does nothing
    has none."""
    a, b, _ = adapters
    options = {"granularity": "adapter", "ridge": 0.3, "whole_model": True}
    nothing = zero(a, tmp_path / "nothing")
    _, one = fitted(base, [a, b, b, nothing], data, tmp_path / "1.json", **options)
    _, other = fitted(base, [b, nothing, a, b], data, tmp_path / "2.json", **options)
    assert one.default[1] == one.default[2] and one.default[3] == 0
    first, second = one.default, other.default
    assert (second[2], second[0], second[3]) == pytest.approx(first[:3], abs=1e-4)


@pytest.mark.parametrize("options", [
    {"loss_over": "tokens"}, {"loss_over": "worst"},
    {"loss_over": "retention", "target": "teacher"},
    {"target": "teacher", "granularity": "direction"}, {"positive": True}, {"bounds": "0.3:0.4"},
], ids=str)  # fmt: skip
def test_balance_and_bounds_are_respected(tmp_path, base, adapters, data, options):
    document, weights = fitted(
        base,
        adapters[:2],
        data,
        tmp_path / "w.json",
        **({"granularity": "adapter", "whole_model": True} | options),
    )
    low, high = {"positive": (0, 2), "bounds": (0.3, 0.4)}.get(next(iter(options)), (-1, 2))
    assert all(low <= one <= high for one in weights.default)
    if options.get("target") == "teacher":
        losses = {row["row"]: row["files"] for row in document["losses"]}
        for number, adapter in enumerate(adapters[:2]):
            assert losses[adapter.name][number] == pytest.approx(0, abs=1e-4)
            assert losses["base"][number] > 1e-3
    if document["written"]["per"] == "direction":
        assert any(isinstance(w, tuple) for own in weights.modules.values() for w in own)


@pytest.mark.parametrize("per", ["adapter", "layer", "module"])
def test_the_start_of_the_closed_form(tmp_path, base, adapters, data, per):
    """It is that of regspan with the statistics of each adapter's file."""
    options = {"start": "stats", "granularity": per, "ridge": 1e6, "holdout": 0.1, "bounds": "-9:9"}
    fitted(base, adapters[:2], data, tmp_path / "w.json", **options)
    weights = read_weights(LocalFolder(tmp_path / "w.json"))
    assert weights.modules or per == "adapter"
    planned = plan_fit(WeightFit(base, adapters[:2], data=data, out=tmp_path / "x.json", samples=16,
                                 holdout=0.1))  # fmt: skip
    batches = planned.shards[0].collection.train.batches
    rows, right = {}, {}
    model = oracle.load("LlamaForCausalLM", base).eval()
    deltas = [deltas_of(adapter) for adapter in adapters[:2]]
    for number, adapter in enumerate(adapters[:2]):
        seen = {name: [] for name in deltas[0]}
        handle = load(model, adapter)
        hooks = [model.get_submodule(n).register_forward_pre_hook(partial(_see, seen[n]))
                 for n in seen]  # fmt: skip
        for batch in (one for one in batches if one.file == number):
            rows_of = (batch.inputs[key] for key in ("input_ids", "attention_mask"))
            for ids, mask in zip(*rows_of, strict=True):
                model(ids[None, mask.bool()])
        for hook in hooks:
            hook.remove()
        handle.detach()
        for name, its in seen.items():
            key = {"adapter": "", "layer": name.split(".")[2], "module": name}[per]
            x = torch.cat(its).double() / sum(map(len, its)) ** 0.5
            outputs = [(x @ delta[name].T).flatten() for delta in deltas]
            rows.setdefault(key, []).append(torch.stack(outputs, 1))
            right.setdefault(key, []).append(outputs[number])
    for key, each in rows.items():
        expected = torch.linalg.lstsq(torch.cat(each), torch.cat(right[key])[:, None]).solution
        own = [w for n, w in weights.modules.items() if key in (n, n.split(".")[2])]
        for c in own or [weights.default]:
            assert c == pytest.approx(expected.flatten().tolist(), abs=1e-4), key


@torch.no_grad()
def _see(found, module, args):
    found.append(args[0].detach()[0])


def deltas_of(adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = {k.removeprefix("base_model.model.").rpartition(".lora_")[0] for k in tensors}
    part = lambda name, x: tensors[f"base_model.model.{name}.lora_{x}.weight"].double()
    return {name: 1.5 * part(name, "B") @ part(name, "A") for name in names}


def test_combine_in_one_step(tmp_path, base, adapters, data, monkeypatch):
    """The weights are beside the output, and are those of its receipt."""
    out = tmp_path / "both"
    receipt = adapterkit.combine(adapters[:2], base=base, fit=data, out=out)
    weights = read_weights(LocalFolder(tmp_path / "both.weights.json"))
    stored = receipt.data["recipe"]["options"]["weights_file"]
    assert stored["default"] == list(weights.default)
    with pytest.raises(Refused, match="without --base"):
        adapterkit.combine(adapters[:2], fit=data, out=tmp_path / "other")


def test_nothing_better_than_the_start(tmp_path, base, adapters, data):
    """It is written, and said; weights that are given are the start."""
    given = [(adapters[0], 0.25), (adapters[1], 0.5)]
    document, weights = fitted(
        base, given, data, tmp_path / "w.json", ridge=1e6, granularity="adapter"
    )
    assert weights.default == (0.25, 0.5) and weights.per == "adapter"
    assert document["written"]["per"] == "start" and "no step" in document["written"]["reason"]


def test_the_standard_error():
    """Of paired differences, within files; against the formula."""
    files = torch.tensor([0, 0, 0, 1, 1])
    weights = torch.tensor([0.5, 0.25, 0.25, 0.5, 0.5]).double()
    balance = Balance(False, files, weights, torch.tensor([0.75, 0.25]).double())
    before, after = torch.rand(2, 5, generator=torch.Generator().manual_seed(0)).double()
    d = before - after
    first, second = d[:3] - d[:3].mean(), d[3:] - d[3:].mean()
    expected = 3 / 2 * (0.75 * weights[:3] * first).square().sum()
    expected += 2 * (0.25 * weights[3:] * second).square().sum()
    assert balance.error(before, after) == pytest.approx(float(expected.sqrt()))
    gain = balance.value(before) - balance.value(after)
    assert gain == pytest.approx(
        float(0.75 * (weights * d)[:3].sum() + 0.25 * (weights * d)[3:].sum())
    )


def test_refusals_come_together(tmp_path, base, adapters, data):
    """Before the model runs."""
    oracle.train(oracle.llama(), tmp_path / "dora", use_dora=True, target_modules=["q_proj"])
    oracle.train(oracle.llama(hidden_size=64), tmp_path / "other", target_modules=["q_proj"])
    oracle.train(oracle.llama(), tmp_path / "head", target_modules=["q_proj"],
                 modules_to_save=["lm_head"])  # fmt: skip
    twice = write_rows(tmp_path / "twice.jsonl", *({"text": TEXTS[0]} for _ in range(6)))
    few = write_rows(tmp_path / "few.jsonl", {"text": TEXTS[0]})
    with pytest.raises(AdapterkitError) as found:
        names = [tmp_path / "dora", tmp_path / "head"]
        fitted(base, names, [twice, few], tmp_path / "w.json", target="teacher", whole_model=True)
    for words in ("is a DoRA", "fully trained", "the same sample as", "1 samples with tokens"):
        assert words in str(found.value), words
    with pytest.raises(Refused, match="with shapes"):
        fitted(base, [tmp_path / "other"], data, tmp_path / "w.json")
    with pytest.raises(Refused, match="2 files for 3 adapters, with --target teacher"):
        fitted(base, adapters, data, tmp_path / "w.json", target="teacher")
    with pytest.raises(Refused, match="weights of 1 of 2 adapters"):
        fitted(base, [(adapters[0], 0.5), adapters[1]], data, tmp_path / "w.json")
    (tmp_path / "w.json").write_text("{}")
    with pytest.raises(Refused):
        fitted(base, adapters, data, tmp_path / "w.json", overwrite=True)


def test_another_file_of_weights_is_not_replaced(tmp_path, base, adapters, data):
    out, options = (
        tmp_path / "w.json",
        {"granularity": "adapter", "ridge": 1.0, "whole_model": True},
    )
    fitted(base, adapters[:1], data, out, **options)
    with pytest.raises(Refused, match="a file of this name exists"):
        fitted(base, adapters[:1], data, out, **options)
    fitted(base, adapters[:1], data, out, overwrite=True, **options)


def test_losses_that_are_not_finite(tmp_path, adapters, data):
    model = oracle.llama()
    with torch.no_grad():
        model.lm_head.weight[0] = 3e38
    oracle.save_base(model, tmp_path / "base", "fp32")
    save_tokenizer(tmp_path / "base")
    with pytest.raises(Failed, match="the loss of .*jsonl, line .* is not finite"):
        fitted(tmp_path / "base", adapters, data, tmp_path / "w.json", whole_model=True)


def test_killed_and_resumed(tmp_path, base, adapters, data):
    """The bits of a fit that nothing stopped; another job's journal is refused."""
    options = {"whole_model": True, "granularity": "layer", "ridge": 0.1}
    expected, one = fitted(base, adapters[:2], data, tmp_path / "a.json", **options)
    out = tmp_path / "b.json"
    for batches in (5, 7):
        pid = os.fork()
        if pid == 0:  # never returns
            kill = partial(_kill, iter(range(batches)))
            fitted(base, adapters[:2], data, out, resume=True, progress=kill, **options)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert not out.exists() and len(os.listdir(tmp_path / ".b.json.adapterkit/work")) > 4
    with pytest.raises(Refused, match="another job"):
        fitted(base, adapters[:2], data, out, resume=True, **options | {"ridge": 0.5})
    calls = []
    found, other = fitted(base, adapters[:2], data, out, resume=True, progress=calls.append,
                          **options)  # fmt: skip
    assert all(found[key] == expected[key] for key in ("losses", "steps", "spread"))
    assert (one.default, one.modules) == (other.default, other.modules)
    assert not (tmp_path / ".b.json.adapterkit").exists()


def test_a_finished_fit_has_a_receipt_and_is_not_made_again(tmp_path, base, adapters, data):
    out, calls, options = tmp_path / "w.json", [], {"granularity": "adapter", "ridge": 1.0}
    document, _ = fitted(base, adapters[:2], data, out, **options)
    assert adapterkit.verify(out)["files"] == 1
    again, _ = fitted(base, adapters[:2], data, out, resume=True, progress=calls.append, **options)
    assert again == document and not calls


def _kill(left, _):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_fit_command_plans_writes_and_prints(tmp_path, base, adapters, data):
    words = ["fit", base, *adapters[:2], "--data", f"{data[0]}=2", "--data", data[1]]
    planned = command(*words, "--out", tmp_path / "w.json", "--samples", "12", "--dry-run")
    assert planned.returncode == 0 and "weights per module" in planned.stdout, planned.stderr
    assert not list(tmp_path.glob("*w.json*"))
    options = ["--samples", "12", "--granularity", "adapter", "--whole-model"]
    done = command(*words, "--out", tmp_path / "w.json", *options)
    assert done.returncode == 0, done.stderr
    for text in ("base", "equal", "start", "a weight for each adapter", "±", "w.json: "):
        assert text in done.stdout
