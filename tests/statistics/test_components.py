"""How many principal components `stats` keeps, and what EVA makes of too few."""

import pytest
from safetensors.torch import load_file

import adapterkit
from adapterkit.core.errors import Refused

TARGETS = "q_proj,down_proj"


def test_the_requested_number_of_components_is_collected(base, texts, tmp_path):
    files = {}
    for count in (5, 40, 256):  # the widths are 32 and 48
        out = tmp_path / f"{count}.safetensors"
        options = {"what": "pca", "targets": TARGETS, "components": count}
        plan = adapterkit.stats(base(), data=texts, out=out, dry_run=True, **options)
        assert plan.options["components"] == count
        adapterkit.stats(base(), data=texts, out=out, **options)
        files[count] = load_file(out)
        size = sum(tensor.nbytes for tensor in files[count].values())
        assert plan.totals()["bytes_changed"] == size < plan.totals()["bytes_written"]
    for key, tensor in files[256].items():
        if key.endswith("components"):
            for count in (5, 40):
                assert len(files[count][key]) == min(count, len(tensor))
    few, more = tmp_path / "5.safetensors", tmp_path / "40.safetensors"
    init = lambda stats: adapterkit.init(
        base(), method="eva", rank=8, targets=TARGETS, stats=stats, out=tmp_path / "out"
    )
    with pytest.raises(Refused, match="collect them with components 16"):
        init(few)
    init(more)
