"""Progress of long work: a rich bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Shows bars on stderr when it is a terminal and `quiet` is not asked."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """The items, with a bar that says how far and how long."""
        from rich.console import Console
        from rich.progress import track

        console = Console(stderr=True)
        if self.quiet or not console.is_terminal:
            yield from items
            return
        yield from track(items, what, total=total, console=console, transient=True)
