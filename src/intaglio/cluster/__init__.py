"""Cluster: the router process before several replicas, with its HTTP front, replica processes and administration."""
