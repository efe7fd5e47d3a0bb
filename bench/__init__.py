"""Benchmarks and the demo; run from the repository root, with the extras `demo` and `test` installed."""
