"""The shipped engine under a seeded heap of events, with the oracle as its device and faults wherever they may strike.

One thread, virtual time, no I/O: a seed is a whole history. `PYTHONPATH=tests python -m simulation --seed 7` tells it.
"""
