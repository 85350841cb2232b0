"""A cache of its own for every test, as the engine's tests have it."""

from __future__ import annotations

from tests.engine.conftest import cache

__all__ = ["cache"]
