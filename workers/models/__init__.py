"""Checkpoints: found, described, quantized, loaded, saved; and forwards of our own."""
