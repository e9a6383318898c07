"""The net saved, and the deltas of each kind's adapter."""

import warnings

import pytest
import torch
from safetensors.torch import save_file

from tests.support.kinds import Net, deltas, trained


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    save_file(Net().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def oracle_of(base, tmp_path_factory):
    """A case's adapter and its deltas, made once."""
    known = {}

    def make(case):
        if str(case) not in known:
            folder = trained(case, base, tmp_path_factory.mktemp("adapter"))
            known[str(case)] = folder, deltas(base, folder)
        return known[str(case)]

    return make
