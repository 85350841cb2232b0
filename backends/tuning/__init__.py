"""Adapters as torch modules that train, and fold into what the readers of adapters take."""
