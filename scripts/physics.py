"""Search for modelled steps that break a physical bound, on random chips, models, layouts and loads.

python scripts/physics.py -h; the bounds are those of codesign/physics.py.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np

from intaglio.codesign.physics import all_cards, draw, violations


def main() -> None:
    """Print each draw that breaks a property, and how many draws break each one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="draws")
    parser.add_argument("--seed", type=int, default=None, help="of the first draw; the others follow. Default: random")
    parser.add_argument("--cards", action="store_true", help="shipped configs instead of small random models; slow")
    given = parser.parse_args()
    first = int(np.random.default_rng().integers(10**9)) if given.seed is None else given.seed
    broken, cards = Counter[str](), all_cards()
    for seed in range(first, first + given.count):
        d = draw(np.random.default_rng(seed), cards[seed % len(cards)] if given.cards else None)
        for why in violations(d):
            broken[why.split(":")[0]] += 1
            print(f"seed {seed}: {d}: {why}", flush=True)
    print(f"{given.count} draws from seed {first}; broken: {dict(broken) or 'none'}")


if __name__ == "__main__":
    main()
