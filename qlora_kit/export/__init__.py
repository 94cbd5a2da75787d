"""Merged full-precision models, and the proof that they are the same model."""
