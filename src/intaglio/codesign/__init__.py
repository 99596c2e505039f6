"""Co-design: modelled time and memory of serving a model on chips, and their comparison with measurements.

Steps: simulate.py, steps.py, fusions.py, physics.py. Serving: serving.py (with the engine itself), queue.py, fleet.py,
disaggregated.py (event by event), steady.py and ratio.py (searches); placement.py, memory.py and engines.py describe a
server. Measured kernels: validate.py, regime.py, calibrate.py, and of serving engines engine_tables.py,
recurrent_tables.py, kernel_fit.py, kernel_facts.py. Measured servers: measured.py and ranking.py. Rows and conditions
of measurements: table_rows.py, conditions.py. Closed forms compared with the simulator: agreement.py, kernel_cases.py.
Writing of chip files and library files: written.py.
"""
