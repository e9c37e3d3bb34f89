"""Find, describe, quantize, load and save checkpoints; and this project's own forward passes."""
