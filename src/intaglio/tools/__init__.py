"""Tools: measuring and checking what the rest runs. May know every room; only the command line knows them."""
