"""Small graphs run on one thread: two threads on a shared machine wait for each other longer than they compute."""

from __future__ import annotations

from tests.structures.conftest import one_thread

__all__ = ["one_thread"]
