"""Inference: loads quantized checkpoints through Transformers and runs their layers. Nothing is imported here."""
