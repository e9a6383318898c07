"""Random jobs on image and video models; `python -m tests.fuzz.run --what images` for more."""

import pytest

from tests.support.usual import usual

from . import images

pytestmark = pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")
# tests/merge/test_one_file.py has the layers of every family
SOME = ("sdxl", "sd3", "flux", "wan_i2v", "sana")
ROWS = [(kind, seed) for seed, kind in enumerate(images.KINDS)]


@pytest.mark.parametrize(("kind", "seed"), usual(ROWS, lambda row: row[0] in SOME))
def test_random_image_jobs_equal_the_reference(kind, seed, tmp_path):
    outcome = images.run(kind, seed, tmp_path)
    assert not outcome.wrong and not outcome.refusals, outcome
