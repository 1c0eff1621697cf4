"""Models in a page beside wllama and onnxruntime-web, interleaved in one run: `python -m benchmarks.web`."""
