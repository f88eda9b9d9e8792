"""Geometry-aware LoRA (GRIT, arXiv 2601.00231) for PyTorch Lightning."""
