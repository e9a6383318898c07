"""Return freed memory to the system."""

import contextlib
import ctypes
from collections.abc import Callable


def _find_trim() -> Callable[[int], object]:
    """The function by which glibc returns freed memory to the system, because it keeps as much as a
    large layer needs. Other libraries have none."""
    with contextlib.suppress(TypeError, OSError, AttributeError):
        return ctypes.CDLL(None).malloc_trim
    return lambda pad: None


return_memory = _find_trim()
