"""Vectors to codes and back: codebooks, rotations, bit packing, and what a quantizer is. Tensors only."""
