"""Factors of convolutions in one, two or three dimensions."""

from torch import Tensor
from torch.nn import functional as F

from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.site import Host, Site

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


class ConvPatch(FactorsPatch):
    """y + weight·scale·(b ∗ (a ∗ x)): a (r, in, *kernel), b (out, r, 1, ...), delta (out, in,
    *kernel).

    a has the host's stride, padding, its mode, and dilation: exactly the convolution with the delta
    (PEFT 0.21 drops dilation and the padding's mode). With groups, as in PEFT, a has all inputs, b
    (out, r / groups, 1, ...) has groups, and no weight of the host equals it.
    """

    kind, axis = "conv", 0
    takes = ("dora", "lora_bias")

    @classmethod
    def shapes(cls, host: Host, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        kernel = host.kernel_size
        points = (1,) * len(kernel)
        return (
            (rank, host.in_channels, *kernel),
            (host.out_channels, rank // host.groups, *points),
        )

    @classmethod
    def refusal_reason(cls, host: Host, rank: int) -> tuple[str, str] | None:
        expected = f"a multiple of the {host.groups} groups"
        return (f"rank {rank}", expected) if rank % host.groups else None

    def product(self, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        host: Host = self.host
        convolve, padding = CONVOLUTIONS[a.ndim - 3], host.padding
        if host.padding_mode != "zeros":
            x = F.pad(x, host._reversed_padding_repeated_twice, mode=host.padding_mode)
            padding = 0
        u = convolve(x, a, None, host.stride, padding, host.dilation)
        return convolve(u, b, bias, groups=host.groups)

    def dense(self, a: Tensor, b: Tensor) -> Tensor:
        """(out, in, *kernel), with the inputs of all groups."""
        groups = a.shape[0] // b.shape[1]
        left = b.reshape(groups, -1, b.shape[1])  # (groups, out / groups, r / groups)
        right = a.reshape(groups, b.shape[1], -1)  # (groups, r / groups, in · kernel)
        return (left @ right).reshape(b.shape[0], *a.shape[1:])

    def unmergeable(self, site: Site, weight: float) -> str | None:
        if site.host.groups != 1:
            return "its factors join the inputs of all groups"
        return super().unmergeable(site, weight)
