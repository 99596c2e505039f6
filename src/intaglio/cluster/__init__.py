"""A router process before several replicas: HTTP front, replica processes, administration. Placement is in `router`."""
