"""Pure tensor mathematics: no file, name, config, device policy or logging."""

from adapterkit.core.lazy import submodules

__getattr__ = submodules(__name__)
