"""Measurements: each script compares with what others have, and writes its figures to docs/benchmarks."""
