"""Co-design: models of what a model's serving takes on a chip, and their comparison with measurements.

Steps: simulate.py, steps.py, physics.py. Serving: serving.py (with the engine itself), queue.py, fleet.py and
disaggregated.py (event by event), steady.py and ratio.py (searches); placement.py, memory.py and engines.py describe a
server. Measured kernels: validate.py and calibrate.py. Measured servers: measured.py and ranking.py. Closed forms and
simulator: agreement.py.
"""
