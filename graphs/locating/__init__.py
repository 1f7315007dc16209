"""Where a site's activation is in an ONNX graph, whoever made the graph."""
