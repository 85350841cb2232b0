"""torch: ExportedPrograms as graphs, emission as plain-aten .pt2 or to ONNX."""
