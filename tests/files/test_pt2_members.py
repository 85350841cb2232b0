"""A .pt2 of very many members is checked in a time that grows with their number, not with its square."""

from __future__ import annotations

from typing import Any

from rewriter.backends.files import pt2


class _Counted(str):
    """A member's name that counts how often it is compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        _Counted.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


class _Names:
    """An archive of many extra files."""

    def __init__(self, extras: int) -> None:
        self._held = [*map(_Counted, [*pt2._SMALL, pt2._MODEL, pt2._SAMPLES]), *(_Counted(f"extra/{i}") for i in range(extras))]

    def __contains__(self, name: str) -> bool:
        return True

    def names(self) -> list[_Counted]:
        return self._held

    def json(self, name: str) -> Any:
        return {"config": {}}

    def read(self, name: str, limit: int) -> bytes:
        return pt2._SMALL[name] or b""


def test_many_members_are_not_compared_with_each_other() -> None:
    _Counted.compared = 0
    assert len(pt2._check_members(_Names(1000))) > 1000  # type: ignore[arg-type]
    assert _Counted.compared < 50 * 1000
