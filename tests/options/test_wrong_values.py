"""Any value of any option is an error of the package, or a result."""

import inspect
import math
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

import adapterkit
from tests.support.calls import VERBS, arguments
from tests.support.usual import usual

HUGE = 10**30
VALUES = [
    None, True, False, 0, -1, 1, 2, 8.0, 1.5, 0.5, math.nan, math.inf, -math.inf, HUGE, -HUGE,
    2**63, float(HUGE), 1j, Decimal("0.5"), "", " ", "x", "4", "8.0", "0", "-3", "(", "*", "a\0b",
    "ü\n", "none", "SHA256", "cuda:99", "cpu:7", "cuda:99999999999", "1GB", "x=1", "1" * 300,
    "x" * 200, b"x", [], {}, (), [1], [None], ["x"], ["x", "y"], {"x": 1}, {"x": None}, {1: 2},
    ("x", 0.5), {"x"}, object(), Path("x"), re.compile("x"), re.compile("x", re.IGNORECASE), int,
    range(3), np.int64(3), np.float32(0.25), np.float64("nan"), np.bool_(True), np.array([1, 2]),
    np.array([]), np.str_("x"), torch.tensor(2), torch.tensor([1.5, 2]), torch.bfloat16, torch.int8,
]  # fmt: skip


# each option meets every fourth value, and each value every fourth option of each verb
@pytest.mark.parametrize("all_values", usual([False, True], {False}))
@pytest.mark.parametrize("verb", VERBS)
def test_wrong_values_of_every_option(verb, all_values, calls, tmp_path, monkeypatch):
    """Nothing but an error of ours, or a result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    function, crashes, count = getattr(adapterkit, verb), [], 0
    names = inspect.signature(function).parameters
    plan = {"dry_run": True} if "dry_run" in names else {}  # what is carried out, it has checked
    for position, name in enumerate(names):
        for value in VALUES if all_values else VALUES[position % 4 :: 4]:
            count += 1
            try:
                function(**(arguments(calls, verb, tmp_path / str(count)) | plan | {name: value}))
            except adapterkit.AdapterkitError as error:
                assert str(error)
            except Exception as error:  # what is looked for
                crashes.append(f"{name}={value!r}: {type(error).__name__}: {error}")
    assert not crashes
