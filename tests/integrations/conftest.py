"""Programs that do not install here, as far as ours is called by them: the names, signatures and
defaults of their sources (vLLM 0.32, axolotl 0.19)."""

import dataclasses
import sys
import types
from abc import ABC, abstractmethod

import pytest


def _module(monkeypatch, name, **contents):
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    parts = name.split(".")
    for end in range(1, len(parts)):
        parent = ".".join(parts[:end])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def vllm(monkeypatch):
    """vLLM's resolvers by name, as its plugins register them."""

    @dataclasses.dataclass
    class LoRARequest:
        lora_name: str
        lora_int_id: int
        lora_path: str

        def __post_init__(self):
            if self.lora_int_id < 1:
                raise ValueError(f"id must be > 0, got {self.lora_int_id}")

    class LoRAResolver(ABC):
        @abstractmethod
        async def resolve_lora(self, base_model_name, lora_name): ...

    class Registry:
        def __init__(self):
            self.resolvers = {}

        def register_resolver(self, resolver_name, resolver):
            assert isinstance(resolver, LoRAResolver)
            self.resolvers[resolver_name] = resolver

    registry = Registry()
    _module(monkeypatch, "vllm.lora.request", LoRARequest=LoRARequest)
    names = {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": registry}
    _module(monkeypatch, "vllm.lora.resolver", **names)
    monkeypatch.delitem(sys.modules, "adapterkit.integrations.vllm", raising=False)
    yield registry.resolvers
    sys.modules.pop("adapterkit.integrations.vllm", None)


@pytest.fixture
def axolotl(monkeypatch):
    """axolotl's base class of plugins, whose hooks all do nothing."""

    class BasePlugin:
        def __init__(self): ...
        def register(self, cfg): ...
        def get_input_args(self): ...
        def post_train(self, cfg, model): ...
        def post_train_unload(self, cfg): ...

    _module(monkeypatch, "axolotl.integrations.base", BasePlugin=BasePlugin)
    monkeypatch.delitem(sys.modules, "adapterkit.integrations.axolotl", raising=False)
    yield
    sys.modules.pop("adapterkit.integrations.axolotl", None)
