"""Every mutation of one key of an adapter is refused, or means what it says."""

import math
from collections.abc import Iterator

import numpy as np
import pytest

from adapterkit.core.errors import AdapterkitError, Refused
from tests.support.planned import configured, meaning, planned, with_tensors
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
    base_tensors,
    llama,
    normal,
    pair,
)


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
        ("lora_A", "lora_B"), ("lora_B", "lora_A"), ("lora_A.weight", "lora_A.default.weight"),
        ("lora_A", "lora_C"), ("lora_A", "lora_a"), ("lora_", "vera_"), (".weight", ".bias"),
        (".bias", ".weight"), ("layers.0", "layers.1"), ("layers.1", "layers.0"),
        ("layers.0", "layers.7"), ("q_proj", "up_proj"), ("up_proj", "down_proj"),
        ("up_proj", "q_proj"), ("embedding_A", "embedding_B"), ("score", "model.norm"),
        ("score", "model.layers.0.q_proj"), ("model.embed", "score"),
        (".lora", ".base_layer.lora"), ("lora_magnitude_vector", "lora_magnitude"),
        ("conv", "norm"), ("token_adapter.trainable_tokens_delta", "trainable_tokens"),
        (".up_proj.bias", ".up_proj.base_layer.bias"),
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
    """up_proj's under down_proj's name and the other way round: turned round they would fit, but
    these are no Conv1D."""
    mlp = "model.layers.0.mlp."
    tensors = pair(mlp + "down_proj", HIDDEN, WIDTH) | pair(mlp + "up_proj", WIDTH, HIDDEN)
    with pytest.raises(Refused):
        planned(AdapterFiles(adapter_config(), tensors), on=llama())


def test_a_saved_module_without_its_bias_is_refused():
    """PEFT saves a module's whole state: a head without the bias that the base has would keep the
    old bias."""
    adapter = configured(modules_to_save=["score"])
    adapter.tensors[PREFIX + "score.weight"] = normal(3, WIDTH, seed=9)
    with pytest.raises(Refused):
        planned(adapter, on=with_tensors(**{"score.bias": normal(3)}))
