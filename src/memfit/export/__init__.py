"""A checked ONNX model and the bundle that a service consumes."""
