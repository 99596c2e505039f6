"""Measurement: speed of a Program beside the machine's roofline, and a server under load."""
