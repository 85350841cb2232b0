"""The structure compiler's engine."""
