"""One cause, one entry: what is printed of many problems, and that all of them stay at hand."""

import pytest

from adapterkit.core.errors import AdapterkitError, Damaged, MultipleErrors, Problems, Refused

pytestmark = pytest.mark.quick


def lines(errors: list[AdapterkitError]) -> list[str]:
    with pytest.raises(MultipleErrors) as caught:
        Problems(errors).raise_all()
    assert caught.value.errors == tuple(errors)
    return str(caught.value).splitlines()


def unknown(
    layer: int, where: str = "adapter", kind: type[AdapterkitError] = Refused
) -> AdapterkitError:
    name = f"model.layers.{layer}.self_attn.q_proj"
    return kind(
        f"base_model.{name}.lora_A.weight: the base has no {name}",
        expected="its parameters",
        where=where,
        hint="look",
    )


def misshaped(layer: int) -> Refused:
    actual = f"model.layers.{layer}.up_proj: shape ((8, {layer}), (64, 8))"
    return Refused(
        actual, expected=f"one that fits the base's (64, {layer + 1})", where="adapter", hint="look"
    )


def test_errors_of_one_cause_are_one_entry():
    text = lines([unknown(layer) for layer in range(140)])
    assert text[0] == "adapter: 140 problems of this kind"
    assert [line.split()[-1] for line in text[1:4]] == [
        f"model.layers.{i}.self_attn.q_proj" for i in range(3)
    ]
    assert text[4:] == ["  ... and 137 more", "  expected: its parameters", "  hint: look"]


def test_three_are_listed_each():
    text = lines([unknown(layer) for layer in range(3)])
    assert text == [
        "3 problems found",
        *(line for i in range(3) for line in f"- {unknown(i)}".splitlines()),
    ]


def test_other_places_kinds_and_words_are_other_entries():
    others = [
        unknown(1, "another"),
        unknown(12, kind=Damaged),
        Refused("use_dora: 'x.y'", expected="a flag", where="adapter", hint="look"),
    ]
    text = lines([*(unknown(layer) for layer in range(10)), *others])
    assert sum(line.startswith("- ") for line in text) == 4
    assert (
        "- another: base_model.model.layers.1.self_attn.q_proj.lora_A.weight: the base has no "
        "model.layers.1.self_attn.q_proj"
    ) in text


def test_different_expectations_stay_with_their_problem():
    text = lines([misshaped(layer) for layer in range(9)])
    assert len(text) == 6 and text[0] == "adapter: 9 problems of this kind"
    assert text[4] == "  ... and 6 more"
    assert text[2] == (
        "  model.layers.1.up_proj: shape ((8, 1), (64, 8)); expected: one that fits the base's "
        "(64, 2)"
    )


def test_keys_of_one_cause_are_counted_in_the_first_line():
    """AK401 has words for several: one expected line and one hint, also for two."""
    keys = [Refused(f"model.{i}.weight: no", expected="x", where="adapter", hint="look",
                    code="AK401") for i in range(5)]  # fmt: skip
    assert MultipleErrors(keys).text().splitlines() == [
        "adapter: 5 keys do not fit the base [AK401]",
        *(f"  model.{i}.weight: no" for i in range(3)),
        *("  ... and 2 more", "  expected: x", "  hint: look"),
    ]
    text = str(MultipleErrors(keys[:2])).splitlines()
    assert text[0] == "adapter: 2 keys do not fit the base" and len(text) == 5
