"""From graphs to sites: one detector a kind, written once against the Graph protocol."""
