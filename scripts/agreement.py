"""Prints the error of each chip kernel's closed form relative to the simulator: python scripts/agreement.py -h."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from intaglio.chips import CHIPS, target
from intaglio.codesign.agreement import differences, random_agreements
from intaglio.codesign.kernel_cases import CASES

FIGURES = Path(__file__).parent / "accuracy/figures.json"


def save(kind: str, chip: str, calls: int, median: float, worst: float) -> None:
    """Write the differences of a kernel on a chip to the figures of docs/accuracy.md."""
    figures = json.loads(FIGURES.read_text())
    found = figures.setdefault("agreement", {}).setdefault(kind, {})
    found[chip] = [calls, round(median, 4), round(worst, 4)]
    figures["agreement"][kind] = {name: found[name] for name in CHIPS if name in found}
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


def main() -> None:
    """Print, for each chip and kernel, the median and the maximum of abs(machine seconds / closed form - 1)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chips", nargs="*", default=list(CHIPS), help=", ".join(CHIPS))
    parser.add_argument("--kernels", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--count", type=int, default=200, help="calls for each chip and kernel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="for docs/accuracy.md; then run scripts/accuracy.py")
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
            if given.save:
                save(kind, name, len(found), median, most)


if __name__ == "__main__":
    main()
