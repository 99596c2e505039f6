"""How far the closed forms of chip kernels are from the simulator: python scripts/agreement.py -h."""

from __future__ import annotations

import argparse
import time

import numpy as np

from intaglio.chips import CHIPS, target
from intaglio.codesign.agreement import differences, random_agreements
from intaglio.codesign.kernel_cases import CASES


def main() -> None:
    """Print, for each chip and kernel, the median and the maximum of abs(machine seconds / closed form - 1)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chips", nargs="*", default=list(CHIPS), help=", ".join(CHIPS))
    parser.add_argument("--kernels", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--count", type=int, default=200, help="calls for each chip and kernel")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print("kernel        chip                   calls  median   worst  ratio of the worst, its call")
    for kind in given.kernels:
        for name in given.chips:
            start = time.process_time()
            found = random_agreements(np.random.default_rng(given.seed), target(name), kind, given.count)
            median, most, worst = differences(found)
            print(
                f"{kind:13} {name:20} {len(found):7}  {median:6.1%}  {most:6.1%}  {worst.ratio:.2f} {worst.case.words}"
                f"  [{time.process_time() - start:.0f} s]",
                flush=True,
            )


if __name__ == "__main__":
    main()
