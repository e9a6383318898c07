"""Low-rank products that are never multiplied out, and decompositions into them.

| of | what is wanted | function |
|---|---|---|
| a product | its singular triplets, in float64 | `algebra.svd` |
| a matrix | the leading triplets, to 1e-6 of the largest value | `truncated.truncated_svd` |
| | the fewest for a share of the energy, or of s₁ | `truncated.leading_svd` |
| | the leading values, each to a tolerance | `leading.leading_triplets` |
| | a sum near the best of its rank, single triplets aside | `subspace.near_optimal_svd` |
| | the trailing triplets | `truncated.trailing_svd` |
| a matrix and its inputs | the sum whose outputs are nearest | `weighted.decompose_dense` |
| a covariance | principal components | `truncated.principal_components` |
"""

from adapterkit.core.lazy import submodules

__getattr__ = submodules(__name__)
