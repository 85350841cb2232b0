"""What a user reads when something is wrong: one line, and the exit code that goes with it."""

from __future__ import annotations


class RewriteError(ValueError):
    """Bad input or usage: the text says what was given, what is allowed and what to do (exit 2)."""
