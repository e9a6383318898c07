"""Options of methods: each in the type of its field."""

import pytest

from adapterkit.errors import Refused
from adapterkit.registry import create


def test_numbers_as_they_come_from_the_command_line():
    gamma = create("inits", "lora_ga", {"stable_gamma": 9.0}).stable_gamma
    niter = create("inits", "pissa", {"niter": 4.0}).niter
    assert (gamma, niter) == (9, 4) and type(gamma) is type(niter) is int
    assert create("inits", "eva", {"whiten": True, "rho": 3}).whiten is True


@pytest.mark.parametrize("method, settings, problem, expected", [
    ("pissa", {"niter": 2.5}, "--set niter is 2.5", "a whole number"),
    ("pissa", {"niter": float("inf")}, "--set niter is inf", "a whole number"),
    ("lora_ga", {"stable_gamma": "many"}, "--set stable_gamma is 'many'", "a whole number"),
    ("eva", {"whiten": "no", "rho": "x"}, "--set whiten is 'no', --set rho is 'x'",
     "true or false and a number"),
    ("eva", {"rho": True}, "--set rho is True", "a number"),
    ("eva", {"tau": 0.9}, "takes no --set tau",
     "--set rho, --set whiten, --set adjust_scaling_factors"),
    ("corda", {"method": "kpm"}, "takes no --set method", "--set corda_method"),
])  # fmt: skip
def test_wrong(method, settings, problem, expected):
    with pytest.raises(Refused) as refusal:
        create("inits", method, settings)
    assert problem in str(refusal.value) and expected in str(refusal.value)
