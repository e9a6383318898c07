"""Options of methods: each in the type of its field."""

import pytest

from adapterkit.core.errors import Refused
from adapterkit.core.registry import create


def test_numbers_as_they_come_from_the_command_line():
    gamma = create("inits", "lora_ga", {"stable_gamma": 9.0}).stable_gamma
    niter = create("inits", "pissa", {"niter": 4.0}).niter
    assert (gamma, niter) == (9, 4) and type(gamma) is type(niter) is int
    assert create("inits", "eva", {"whiten": True, "rho": 3}).whiten is True


@pytest.mark.parametrize("method, settings, problems", [
    ("pissa", {"niter": 2.5}, ["--set niter = 2.5", "a whole number"]),
    ("pissa", {"niter": float("inf")}, ["--set niter = inf", "a whole number"]),
    ("lora_ga", {"stable_gamma": "many"}, ["--set stable_gamma = 'many'", "a whole number"]),
    ("eva", {"whiten": "no", "rho": "x"}, ["--set whiten = 'no'", "true or false",
     "--set rho = 'x'", "a finite number"]),
    ("eva", {"rho": True}, ["--set rho = True", "a finite number"]),
    ("eva", {"tau": 0.9}, ["--set tau is unknown", "rho, whiten, adjust_scaling_factors"]),
    ("corda", {"method": "kpm"}, ["--set method is unknown", "corda_method"]),
])  # fmt: skip
def test_invalid_settings_of_inits_are_refused(method, settings, problems):
    with pytest.raises(Refused) as refusal:
        create("inits", method, settings)
    assert all(problem in str(refusal.value) for problem in problems)
