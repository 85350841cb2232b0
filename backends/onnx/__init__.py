"""ONNX models through onnx_ir, ONNX Runtime as the machine: read, spliced, lowered into model-local functions, run, timed."""
