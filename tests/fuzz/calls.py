"""Random sequences of calls on a live model, held after each call against a model of its state in
numpy's float64, which knows the adapters by their files alone."""

import collections
import copy
import itertools
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors.numpy import load_file
from torch import nn
from transformers import Trainer

from adapterkit import LoraConfig, Refused
from adapterkit.runtime import Adapters, attach, load
from tests.support.beside_peft import parameters_of

PREFIX = "base_model.model."
LAYERS = ("embed_tokens", "block.up", "block.down", "head")
IDS = torch.arange(15).view(3, 5) % 11
TOLD = (
    "r", "target_modules", "use_dora", "bias", "lora_bias", "modules_to_save",
    "trainable_token_indices",
)  # fmt: skip
NAMES = ("a", "b.c", "parts", "d", "e:f")


def _in_inference_mode(value: torch.Tensor) -> None:
    with torch.inference_mode():
        value.mul_(0.9)


def _fused(value: torch.Tensor) -> None:
    value = value.detach()
    value.grad = torch.ones_like(value)
    torch.optim.SGD([value], lr=0.05, fused=True).step()


def _by_numpy(value: torch.Tensor) -> None:
    value.detach().numpy()[...] *= 1.1


WRITES: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda value: value.data.mul_(1.1),
    lambda value: value.data.copy_(value.data.flip(-1)),
    lambda value: setattr(value, "data", 0.9 * value.data),
    _in_inference_mode,
    _fused,
    _by_numpy,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """An embedding, linear layers and a norm."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.block = nn.Embedding(12, 6), Block()
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 7)

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids)
        return self.head(self.norm(x + self.block(x)))


@dataclass(frozen=True)
class Stored:
    """An adapter as its files say; scales by module."""

    tensors: dict[str, np.ndarray]
    scales: dict[str, float]
    tokens: list[int]
    settings: dict[str, Any]

    @property
    def has_biases(self) -> bool:
        return self.settings["bias"] != "none"

    @property
    def copied(self) -> set[str]:
        return set(self.settings["modules_to_save"] or ())

    def get(self, module: str, *endings: str) -> np.ndarray | None:
        keys = (f"{PREFIX}{module}.{ending}" for ending in endings)
        return next((self.tensors[key] for key in keys if key in self.tensors), None)


def read(folder: Path) -> Stored:
    """By PEFT's rules."""
    config = json.loads((folder / "adapter_config.json").read_text())
    stored = load_file(folder / "adapter_model.safetensors")
    tensors = {key: np.asarray(value, np.float64) for key, value in stored.items()}
    scales = {}
    for module in LAYERS:
        rank, alpha = (
            config[table].get(f"^{module}", config[default])
            for table, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        scales[module] = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
    return Stored(tensors, scales, config["trainable_token_indices"] or [], config)


@dataclass
class State:
    """What the model must be."""

    adapters: dict[str, Stored] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    merged: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)  # active before the merge

    @property
    def acting(self) -> list[tuple[Stored, float]]:
        return [(self.adapters[n], w) for n, w in {**self.merged, **self.active}.items()]


def outputs(base: dict[str, np.ndarray], acting: list[tuple[Stored, float]]) -> np.ndarray:
    """The net's outputs in float64."""
    x = _layer(base, acting, "embed_tokens", IDS.numpy())
    hidden = _layer(base, acting, "block.up", x)
    z = x + _layer(base, acting, "block.down", np.tanh(hidden))
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    weight, bias = (_value(base, acting, "norm", leaf) for leaf in ("weight", "bias"))
    assert weight is not None and bias is not None
    return _layer(base, acting, "head", z * weight + bias)


def _value(
    base: dict[str, np.ndarray], acting: list[tuple[Stored, float]], module: str, leaf: str
) -> np.ndarray | None:
    """A parameter, or what the last of the adapters has in its place."""
    value = base.get(f"{module}.{leaf}")
    for stored, _ in acting:
        own = stored.get(module, leaf, f"base_layer.{leaf}")
        value = value if own is None else own
    return value


def _layer(
    base: dict[str, np.ndarray], acting: list[tuple[Stored, float]], module: str, x: np.ndarray
) -> np.ndarray:
    weight, bias = (_value(base, acting, module, leaf) for leaf in ("weight", "bias"))
    assert weight is not None
    embedding = module == "embed_tokens"
    y = weight[x] if embedding else x @ weight.T + (0 if bias is None else bias)
    if embedding:
        for stored, _ in acting:
            rows = stored.get(module, "token_adapter.trainable_tokens_delta")
            for index, row in zip(stored.tokens, [] if rows is None else rows, strict=False):
                y = np.where((x == index)[..., None], row, y)
    for stored, strength in acting:
        a, b = (stored.get(module, *f"lora_{k}.weight lora_embedding_{k}".split()) for k in "AB")
        if a is None or b is None:
            continue
        scale, added = stored.scales[module], stored.get(module, "lora_B.bias")
        update = (a.T[x] if embedding else x @ a.T) @ b.T + (0 if added is None else added)
        magnitude = stored.get(module, "lora_magnitude_vector")
        if magnitude is None:
            y = y + strength * scale * update
            continue
        matrix = (weight.T if embedding else weight) + scale * b @ a  # (out, in)
        ratio = magnitude / np.linalg.norm(matrix, axis=1)
        own = 0 if bias is None else bias  # in PEFT, trained biases are the base's own
        y = y + strength * (ratio * (y - own) + own + ratio * scale * update - y)
    return y


class Run:
    """One model, and what it must be."""

    def __init__(self, seed: int, folder: Path):
        self.rng, self.folder, self.seed = random.Random(seed), folder, seed
        torch.manual_seed(seed)
        self.model = Net().eval()
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.base = {name: value.double().numpy() for name, value in self.start.items()}
        self.state, self.log = State(), list[str]()
        self.handle: Adapters | None = None
        self.files = itertools.count()
        self.counts: collections.Counter[str] = collections.Counter()
        self.pool: list[tuple[Path, Stored]] = []

    @property
    def h(self) -> Adapters:
        assert self.handle is not None
        return self.handle

    def new_folder(self) -> Path:
        return self.folder / str(next(self.files))

    def step(self) -> None:
        """One call, and all checks after it."""
        names = list(self.state.adapters)
        calls: list[Callable[[], bool]] = [self.attach, self.load]
        if names:
            calls += [self.activate, self.activate, self.rows, self.merge, self.unmerge]
            calls += [self.disabled, self.save, self.delete, self.rescale, self.swap, self.combine]
            calls += [self.write, self.write_base, self.ema, self.cast, self.groups]
            calls += [self.copy] + [self.detach] * (self.rng.random() < 0.2)
        call = self.rng.choice(calls)
        self.log.append(call.__name__)
        try:
            fits = call()
        except Refused as error:
            self.counts["refusals"] += 1
            assert self.expects_refusal, f"refused: {error}"
        else:
            assert fits, "not refused"
        self.counts[call.__name__] += 1
        self.check()

    def check(self) -> None:
        self.counts["states"] += 1
        state = self.state
        if self.handle is not None:
            assert set(self.h.names) == set(state.adapters)
            assert list(self.h.active.items()) == list(state.active.items())
            assert self.h.merged == state.merged
        self.close(self.forward(), outputs(self.base, state.acting))
        assert self.model.state_dict().keys() == self.start.keys()
        if not state.merged:
            for name, value in self.model.state_dict().items():
                assert torch.equal(value, self.start[name]), name

    def forward(self) -> torch.Tensor:
        """With gradients and without: each takes its own way."""
        self.model.zero_grad()
        y = self.model(IDS)
        with torch.no_grad():
            self.close(self.model(IDS), y.detach().double().numpy())
        return y.detach()

    def close(self, actual: torch.Tensor, expected: np.ndarray) -> None:
        np.testing.assert_allclose(actual.double().numpy(), expected, rtol=2e-4, atol=2e-4)

    # ---- the calls; each says in `expects_refusal` whether it may be refused, and returns whether
    # it may be done

    expects_refusal = False

    def needs(self, *conditions: bool) -> bool:
        self.expects_refusal = not all(conditions)
        return not self.expects_refusal

    def name(self) -> str:
        return self.rng.choice(list(self.state.adapters))

    def compatible(self, names: Iterable[str]) -> bool:
        """Whether adapters give each value once, none a bias of a module that another copied."""
        stored = [self.state.adapters[name] for name in dict.fromkeys(names)]
        if sum(one.has_biases for one in stored) > 1:
            return False
        pairs = itertools.permutations(stored, 2)
        return not any(
            one.copied & other.copied
            or set(one.tokens) & set(other.tokens)
            or any(other.get(module, "bias") is not None for module in one.copied)
            for one, other in pairs
        )

    def config(self) -> LoraConfig:
        rng = self.rng
        targets = rng.sample(LAYERS, rng.randint(1, len(LAYERS)))
        dora = rng.random() < 0.3
        copied = ["norm"] if rng.random() < 0.2 else None
        return LoraConfig(
            rng.randint(1, 4),
            rng.choice([0.5, 2, 3]),
            targets,
            rslora=rng.random() < 0.3,
            dora=dora,
            bias=rng.choice(["none", "none", "none", "all", "lora_only"]),
            lora_bias=not dora and "embed_tokens" not in targets and rng.random() < 0.3,
            init=rng.choice([False, "default"]),
            rank_pattern={targets[0]: 2} if rng.random() < 0.3 else {},
            alpha_pattern={targets[-1]: 1.5} if rng.random() < 0.3 else {},
            modules_to_save=copied,
            trainable_tokens=rng.sample(range(11), 2) if rng.random() < 0.2 else None,
        )

    def free_name(self) -> str | None:
        free = [name for name in NAMES if name not in self.state.adapters]
        return self.rng.choice(free) if free else None

    def attach(self) -> bool:
        name, config = self.free_name(), self.config()
        if name is None:
            return True
        fits = self.needs(not self.state.merged)
        first = self.handle is None
        if first:
            self.handle = attach(self.model, config, name=name, seed=self.seed)
        else:
            self.h.attach(config, name=name, seed=self.seed)
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        with torch.no_grad():
            for part in self.h.state.adapters[name].patches():
                for _, value in part[1].trained():
                    value += 0.2 * torch.randn(value.shape, generator=generator)
        folder = self.new_folder()
        self.h.save(folder, name=name)
        self.added(name, folder, first)
        self.pool.append((folder, self.state.adapters[name]))
        return fits

    def added(self, name: str, folder: Path, first: bool) -> None:
        self.state.adapters[name] = read(folder)
        if first:
            self.state.active = {name: 1.0}

    def load(self) -> bool:
        name = self.free_name()
        if name is None or not self.pool:
            return True
        fits = self.needs(not self.state.merged)
        folder, _ = self.rng.choice(self.pool)
        trainable, pad = self.rng.random() < 0.5, self.rng.choice([None, None, 8])
        first = self.handle is None
        if first:
            self.handle = load(self.model, folder, name=name, trainable=trainable, pad_rank=pad)
        else:
            self.h.load(folder, name=name, trainable=trainable, pad_rank=pad)
        self.added(name, folder, first)
        return fits

    def table(self) -> dict[str, float]:
        count = min(self.rng.choice([1, 1, 2, 3]), len(self.state.adapters))
        names = self.rng.sample(list(self.state.adapters), count)
        return {name: self.rng.choice([1.0, 1.0, 0.5, -0.7, 2.0]) for name in names}

    def activate(self) -> bool:
        table = self.rng.choice([{}, self.table(), self.table()])
        fits = self.needs(not self.state.merged, self.compatible(table))
        whole = all(weight == 1 for weight in table.values())
        argument: Any = list(table) if whole and table else table or None
        self.h.activate(argument)
        self.state.active = table
        return fits

    def rows(self) -> bool:
        names = [self.rng.choice([None, *self.state.adapters]) for _ in range(len(IDS))]
        fits = self.needs(not self.state.merged)
        with torch.no_grad(), self.h.rows(names):
            y = self.model(IDS)
        for row, name in enumerate(names):
            acting = [] if name is None else [(self.state.adapters[name], 1.0)]
            self.close(y[row], outputs(self.base, acting)[row])
        return fits

    def merge(self) -> bool:
        table = self.rng.choice([None, self.table()])
        merged = self.state.active if table is None else table
        stored = [(self.state.adapters[name], weight) for name, weight in merged.items()]
        fits = self.needs(
            bool(merged),
            not self.state.merged,
            self.compatible([*merged, *self.state.active]),
            not any(one.settings["use_dora"] and weight != 1 for one, weight in stored),
            not self.covered(merged),
            # a bias for a layer that has none
            not any(one.get("block.down", "lora_B.bias") is not None for one, _ in stored),
        )
        self.h.merge(table)
        self.state.before = dict(self.state.active)
        self.state.merged = dict(merged)
        self.state.active = {n: w for n, w in self.state.active.items() if n not in merged}
        return fits

    def covered(self, merged: Iterable[str]) -> bool:
        """Whether an adapter that stays active has values in place of what others are merged
        into."""
        staying = [self.state.adapters[n] for n in self.state.active if n not in merged]
        return any(
            (stay.tokens and one.get("embed_tokens", "lora_embedding_A") is not None)
            or any(
                stay.get(module, "bias", "base_layer.bias") is not None
                and one.get(module, "lora_B.bias") is not None
                for module in LAYERS
            )
            for stay in staying
            for one in (self.state.adapters[name] for name in merged)
        )

    def unmerge(self) -> bool:
        fits = self.needs(bool(self.state.merged))
        self.h.unmerge()
        self.state.merged, self.state.active = {}, self.state.before
        return fits

    def disabled(self) -> bool:
        fits = self.needs()
        plain = Net().eval()
        plain.load_state_dict(self.start)
        with torch.no_grad(), self.h.disabled():
            assert torch.equal(self.model(IDS), plain(IDS))
        return fits

    def save(self) -> bool:
        name, folder = self.name(), self.new_folder()
        fits = self.needs(name not in self.state.merged)
        self.h.save(folder, name=name)
        stored = read(folder)
        for module in LAYERS:  # each alone, as the file has it
            self.close(
                torch.from_numpy(outputs(self.base, [(stored, 1.0)])),
                outputs(self.base, [(self.state.adapters[name], 1.0)]),
            )
            assert stored.get(module, "lora_A.weight") is None or stored.scales[module] != 0
        self.pool.append((folder, stored))
        return fits

    def delete(self) -> bool:
        name = self.name()
        fits = self.needs(name not in self.state.active, name not in self.state.merged)
        self.h.delete(name)
        del self.state.adapters[name]
        self.state.before.pop(name, None)
        return fits

    def rescale(self) -> bool:
        name, factor = self.name(), self.rng.choice([0.5, 2.0, -1.0])
        fits = self.needs(not self.state.merged)
        self.h.rescale(factor, name=name)
        old = self.state.adapters[name]
        scales = {module: scale * factor for module, scale in old.scales.items()}
        self.state.adapters[name] = Stored(old.tensors, scales, old.tokens, old.settings)
        return fits

    def swap(self) -> bool:
        if not self.pool:
            return True
        name, (folder, stored) = self.name(), self.rng.choice(self.pool)
        self.expects_refusal = True  # other modules, kinds or ranks
        with torch.inference_mode(self.rng.random() < 0.3):
            self.h.swap(name, folder)
        self.state.adapters[name] = stored
        return not self.state.merged

    def combine(self) -> bool:
        name, table = self.free_name(), self.table()
        if name is None:
            return True
        members = [(self.state.adapters[one], weight) for one, weight in table.items()]
        whole = any(
            one.settings[key]
            for one, _ in members
            for key in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")
        )
        fits = self.needs(
            not self.state.merged, not whole, not any(m.has_biases for m, _ in members)
        )
        if self.expects_refusal or len(members) < 2:  # by rules of their own
            return True
        self.h.combine(table, name=name)
        folder = self.new_folder()
        self.h.save(folder, name=name)
        self.state.adapters[name] = stored = read(folder)
        expected = outputs(self.base, members)
        self.close(torch.from_numpy(outputs(self.base, [(stored, 1.0)])), expected)
        return fits

    def reread(self) -> None:
        """Take the adapters as their files would be now."""
        for name in self.state.adapters:
            folder = self.new_folder()
            self.h.save(folder, name=name)
            self.state.adapters[name] = read(folder)

    def write(self) -> bool:
        """Change values of an adapter in a way that no version counts."""
        fits = self.needs()
        if self.state.merged:  # which holds the values of before
            return fits
        parts = [part for _, part in self.h.state.adapters[self.name()].patches()]
        for value in {p for part in parts for p in part.parameters()}:
            self.rng.choice(WRITES)(value)
        self.reread()
        return fits

    def write_base(self) -> bool:
        fits = self.needs()
        if self.state.merged:
            return fits
        for name, value in self.start.items():
            if self.rng.random() < 0.3:
                own = self.model.get_parameter(name)
                self.rng.choice(WRITES)(own)
                value.copy_(own.detach())
        self.base = {name: value.double().numpy() for name, value in self.start.items()}
        return fits

    def ema(self) -> bool:
        """An evaluation of averages, and the weights of training again."""
        fits, own = self.needs(), list(self.h.parameters())
        if not own or self.state.merged:
            return fits
        shadows = EMAModel(own)
        shadows.shadow_params = [1.5 * shadow for shadow in shadows.shadow_params]
        state = dict(self.state.adapters)
        shadows.store(own)
        shadows.copy_to(own)
        self.reread()
        self.close(self.forward(), outputs(self.base, self.state.acting))
        shadows.restore(own)
        self.state.adapters = state
        return fits

    def cast(self) -> bool:
        """To float64 and back; what is merged then comes out in float64."""
        fits = self.needs()
        self.model.double()
        with torch.no_grad():
            self.close(self.model(IDS), outputs(self.base, self.state.acting))
        if self.state.merged:
            self.h.unmerge()
            for name, value in self.model.state_dict().items():
                assert torch.equal(value, self.start[name].double()), name
            self.state.active, self.state.merged = self.state.before, {}
        self.model.float()
        return fits

    def groups(self) -> bool:
        """What is trained decays, but for biases and norms."""
        fits, trained = self.needs(), {id(p) for p in self.h.parameters()}
        decayed = Trainer.get_decay_parameter_names(cast(Any, None), self.model)
        own = {id(p) for name, p in self.model.named_parameters() if name in {*decayed}}
        for name in self.state.adapters:
            for key, value in parameters_of(self.h, name).items():
                plain = "bias" not in key and not key.startswith(f"{PREFIX}norm.")
                assert id(value) not in trained or (id(value) in own) == plain, key
        return fits

    def copy(self) -> bool:
        """A copy goes its own way, from the same state."""
        fits = self.needs()
        twin = copy.deepcopy(self.model)
        with torch.no_grad():
            self.close(twin(IDS), outputs(self.base, self.state.acting))
        twin._adapterkit.detach()
        assert all(torch.equal(v, self.start[k]) for k, v in twin.state_dict().items())
        return fits

    def detach(self) -> bool:
        fits = self.needs()
        self.h.detach()
        self.handle, self.state = None, State()
        return fits


def run(seed: int, folder: Path, steps: int = 25) -> collections.Counter[str]:
    """A random sequence; AssertionError with the calls that led to a wrong state."""
    sequence = Run(seed, folder)
    for _ in range(steps):
        try:
            sequence.step()
        except Exception as error:  # whatever it is, the calls before belong to it
            state = sequence.state
            table = {
                name: {key: one.settings[key] for key in TOLD if one.settings[key]}
                for name, one in state.adapters.items()
            }
            where = f"seed {seed}: {' '.join(sequence.log)}"
            about = f"active {state.active}, merged {state.merged}, {table}"
            raise AssertionError(f"{where}\n{about}\n{type(error).__name__}: {error}") from error
    return sequence.counts


def run_all(seeds: Iterable[int]) -> tuple[collections.Counter[str], list[str]]:
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            try:
                counts += run(seed, Path(folder))
            except AssertionError as error:
                wrong.append(str(error))
    return counts, wrong
