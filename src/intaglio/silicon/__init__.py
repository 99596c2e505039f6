"""Silicon: chips' instructions, kernels in tiles, the machine that runs and times them, and the device made of them."""
