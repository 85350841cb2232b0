"""Numerical solvers that know matrices and moments, and no graph."""
