"""Debugging: compare a model with transformers, two runs, or a run with its journal; find the port for a model."""
