"""The `onnx` target: graphs of standard and onnxruntime's ops over one weight file, run by onnxruntime."""
