"""Model files and folders: how each becomes a graph, and how a graph becomes a file."""
