"""As in the statistics' tests: models of which each part is large."""

from tests.statistics.conftest import large as large
