"""Sums of bytes: by this package's compiled code where that is there, otherwise as Python does it."""

import zlib
from collections.abc import Callable

#: CRC-32 of bytes, which continues a sum; see :func:`zlib.crc32`.
crc32: Callable[[memoryview, int], int] = zlib.crc32

try:
    from .. import _C
except ImportError:
    # what a file holds is said without a build, too
    pass
else:
    if _C.crc32_instructions():
        crc32 = _C.crc32
