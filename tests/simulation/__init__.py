"""Simulation of the engine: random events drawn from a seed, the oracle as its device, injected faults, virtual time.

One thread and no I/O, so a seed determines the whole history. `PYTHONPATH=tests python -m simulation --seed 7` prints
one.
"""
