"""Folding into checkpoints whose weights are integers, and into GGUF files."""
