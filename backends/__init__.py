"""Formats and runtimes: each reads, splices, emits, runs or times; none knows a pass."""
