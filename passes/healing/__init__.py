"""Training what a lossy rewrite left: targets from the dense model, the loop and its promises, and what may help it."""
