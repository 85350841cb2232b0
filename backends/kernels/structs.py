"""What a kernel is told beside its tensors: whole numbers in the order of its struct, then a scale."""

from __future__ import annotations

import struct
from typing import ClassVar


class AbstractStruct:
    """Subclasses are dataclasses with a field for each name in `order`, and one for the scale."""

    order: ClassVar[tuple[str, ...]]
    scale: float

    def attributes(self) -> dict[str, int]:
        """As a node has them; of the scale the bits of a double."""
        (bits,) = struct.unpack("q", struct.pack("d", self.scale))
        return {**self._numbers(), "scale": bits}

    def packed(self) -> bytes:
        """The struct's bytes."""
        return struct.pack(f"{len(self.order)}qd", *self._numbers().values(), self.scale)

    def _numbers(self) -> dict[str, int]:
        return {name: int(getattr(self, name)) for name in self.order}
