"""One file a family of structured matrices."""
