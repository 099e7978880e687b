"""Sums of bytes and room for them: by this package's compiled code where that is there, otherwise as Python does it."""

import zlib
from collections.abc import Callable


def _nothing(_: memoryview) -> None:
    pass


#: CRC-32 of bytes, which continues a sum; see :func:`zlib.crc32`.
crc32: Callable[[memoryview, int], int] = zlib.crc32
#: Make the pages of fresh memory present at once, which takes less time than one after the other when they are filled.
populate: Callable[[memoryview], None] = _nothing

try:
    from .. import _C
except ImportError:
    # what a file holds is said without a build, too
    pass
else:
    populate = _C.populate
    if _C.crc32_instructions():
        crc32 = _C.crc32
