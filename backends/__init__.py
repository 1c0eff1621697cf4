"""Targets by name: the class that builds an artefact, and the function that loads one without what building needs."""

from __future__ import annotations

BACKENDS = {
    "cpu": "sylvester.backends.cpu:Cpu",
    "cuda": "sylvester.backends.cuda.backend:Cuda",
    "null": "sylvester.backends.null:Null",
    "onnx": "sylvester.backends.onnx.backend:Onnx",
    "reference": "sylvester.backends.reference:Reference",
    "wasm": "sylvester.backends.wasm:Wasm",
}
LOADERS = {
    "cpu": "sylvester.backends.cpu_runtime:load",
    "cuda": "sylvester.backends.cuda.runtime:load",
    "null": "sylvester.backends.null:load",
    "onnx": "sylvester.backends.onnx.runtime:load",
    "reference": "sylvester.backends.reference:load",
    "wasm": "sylvester.backends.wasm_runtime:load",
}
