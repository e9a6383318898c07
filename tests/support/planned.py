"""Plans of small hostile adapters on a small base."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import AdapterkitError
from adapterkit.core.inputs.base_door import Base
from adapterkit.core.merge.plan import plan_merge
from adapterkit.core.merge.verb import MergeOptions
from tests.support.raw_files import AdapterFiles, Stored, base, base_tensors, plain, tensors_file

BASE = base()


def planned(adapter: AdapterFiles, options: MergeOptions = MergeOptions(), on=BASE):  # noqa: B008, frozen
    return plan_merge(Base(on), [(adapter.folder(), 1.0)], options)


def refusal(adapter: AdapterFiles, **options) -> str:
    with pytest.raises(AdapterkitError) as caught:
        planned(adapter, MergeOptions(**options))
    message = str(caught.value)
    assert message.replace("\n", "").isprintable()
    assert len(message) < 20_000
    return message


def configured(**changes) -> AdapterFiles:
    """A plain adapter whose config has these changes; `...` takes a key out."""
    adapter = plain()
    config = adapter.config | changes
    return AdapterFiles({k: v for k, v in config.items() if v is not ...}, adapter.tensors)


def meaning(adapter: AdapterFiles, **options) -> str:
    """What a plan does, with the bytes themselves in place of where they are: equal meanings give
    equal outputs."""
    folder = adapter.folder()
    plan = plan_merge(Base(BASE), [(folder, 1.0)], MergeOptions(**options))
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


def with_tensors(**tensors: Stored):
    folder = base()
    folder.content["model.safetensors"] = tensors_file(base_tensors() | tensors)
    return folder
