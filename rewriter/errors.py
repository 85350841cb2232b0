"""What a user reads when something is wrong: one line, and the exit code that goes with it."""

from __future__ import annotations


class RewriteError(ValueError):
    """Bad input or usage: the text says what was given, what is allowed and what to do (exit 2)."""

    exit_code = 2


class BoundExceeded(RewriteError):
    """A bound that the user set does not hold with nothing lossy left to give up (exit 3)."""

    exit_code = 3


class NothingToDo(RewriteError):
    """No site matched, or none was worth rewriting (exit 1)."""

    exit_code = 1
