"""Fields of chips and kernel libraries as text: a value with its unit, which follows from the field's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# by the end of a field's name, the first that fits
UNITS = (
    ("bytes_per_s", "B/s"), ("bytes_per_cycle", "B/cycle"), ("bytes", "B"), ("_hz", "Hz"), ("_s", "s"), ("_w", "W"),
)  # fmt: skip
PREFIXES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9, "p": 1e-12}
JOULES = ("mac", "hbm_byte", "l2_byte", "link_byte")


def described(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, value as text with its unit) for each field of a chip or kernel library.

    A nested table, such as a chip's links, yields one pair for each of its fields, called `FIELD (TABLE)`.
    """
    for name, value in fields.items():
        if isinstance(value, Mapping):
            for inner, one in value.items():
                yield f"{inner} ({name})", quantity(inner, one)
        else:
            yield name, quantity(name, value)


def quantity(name: str, value: Any) -> str:
    """Returns a field's value as text with the unit that its name implies: hbm_bytes_per_s 3.35e12 gives 3.35 TB/s."""
    match value:
        case bool():
            return str(value).lower()  # as --set takes it
        case int() | float():
            unit = "J" if name in JOULES else next((unit for end, unit in UNITS if name.endswith(end)), "")
            return scaled(value, unit) if unit else f"{value:,}"
        case Mapping():
            named, *rest = value.items()
            return f"{named[1]}: {', '.join(f'{inner} {quantity(inner, one)}' for inner, one in rest)}"
        case [[str(), int()], *_]:  # a rate of each format
            return ", ".join(f"{format} {rate:,}" for format, rate in value)
        case [[int(), int()], *_]:  # shapes
            return ", ".join("x".join(map(str, shape)) for shape in value)
        case [] | ():
            return "none"
        case tuple() | list():
            return ("; " if isinstance(value[0], Mapping) else ", ").join(quantity("", one) for one in value)
    return str(value)


def scaled(value: float, unit: str) -> str:
    """Returns a value as text with an SI prefix and `unit`, up to six digits: 232448 and B give 232.448 kB."""
    prefix = next((prefix for prefix, size in PREFIXES.items() if abs(value) >= size), "p" if value else "")
    return f"{value / PREFIXES[prefix]:.6g} {prefix}{unit}"
