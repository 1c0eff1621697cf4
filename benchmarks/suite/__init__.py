"""Our engine and every installed peer on the same weights, interleaved in one run: `python -m benchmarks.suite`."""
