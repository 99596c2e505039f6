"""Co-design: modelled time and memory of serving a model on chips, and their comparison with measurements.

- One step: simulate.py, steps.py, fusions.py (kernels of serving engines); physics.py checks properties of all steps.
- A server under load: serving.py runs the engine itself; queue.py, fleet.py and disaggregated.py simulate event by
  event; steady.py and ratio.py search for the best design. placement.py, memory.py and engines.py describe a server.
- Comparison with measured kernels: validate.py, regime.py, table_rows.py, conditions.py; of serving engines
  engine_tables.py and recurrent_tables.py. Fits to them: calibrate.py, kernel_fit.py, kernel_facts.py, written.py.
- Comparison with measured servers: measured.py, ranking.py.
- Comparison of closed forms with the chip simulator: agreement.py, kernel_cases.py.
"""
