"""The bases, data and sizes of the suite of statistics."""

from tests.statistics.conftest import base, large, pairs, texts, tokens_here

__all__ = ["base", "large", "pairs", "texts", "tokens_here"]
