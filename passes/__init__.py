"""Structures, solvers, detectors, rules and the passes named on the command line."""
