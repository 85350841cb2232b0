"""Model files are hostile until proven otherwise: recognised by content, checked before anything in them is allocated or run."""
