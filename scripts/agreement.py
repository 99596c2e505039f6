"""How far the closed form of `linear` is from the simulator, over random products: python scripts/agreement.py -h."""

from __future__ import annotations

import argparse

import numpy as np

from intaglio.chips import CHIPS, target
from intaglio.codesign.agreement import compare, random_products


def main() -> None:
    """Print, for each chip, the median and the extremes of machine seconds over closed-form seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chips", nargs="*", default=["sohu", "tpu_v5e", "tpu_v6e"], help=", ".join(CHIPS))
    parser.add_argument("--count", type=int, default=200, help="products per chip")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print("chip        products  median |ratio - 1|  lowest  highest ratio (machine / closed form)")
    for name in given.chips:
        on, rng = target(name), np.random.default_rng(given.seed)
        found = [compare(on, p) for p in random_products(rng, on, given.count)]
        ratios = np.array([a.ratio for a in found])
        worst = found[int(np.abs(np.log(ratios)).argmax())].product
        off = np.median(np.abs(ratios - 1))
        print(
            f"{name:12}{len(found):8}  {off:17.1%}  {ratios.min():6.2f}  {ratios.max():7.2f}  worst: {worst}",
            flush=True,
        )


if __name__ == "__main__":
    main()
