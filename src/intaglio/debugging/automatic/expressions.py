"""Finds the expression over config.json that gives a traced value in every variant of a configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio.debugging.automatic.flatten import text
from intaglio.models.config import ACTIVATIONS, Config, PortError

Facts = dict[str, Any]
HEAD_DIM = 'c.whole("head_dim", hidden // heads)'
FIRST: dict[str, tuple[str, ...]] = {  # expressions to try first for a field
    "vocabulary": ('c.whole("vocab_size")',),
    "hidden": ('c.whole("hidden_size")',),
    "heads": ('c.whole("num_attention_heads")',),
    "kv_heads": ('c.whole("num_key_value_heads", heads)', "heads"),
    "head_dim": (HEAD_DIM, "hidden // heads"),
    "intermediate": ('c.whole("intermediate_size")', 'c.whole("n_inner", 4 * hidden)', "4 * hidden"),
    "scale": ("head_dim**-0.5",),
    "embed_scale": ("hidden**0.5",),
    "positions": ('c.whole("max_position_embeddings")',),
    "tied": ('c.flag("tie_word_embeddings")',),
    "mixture.width": ('c.whole("moe_intermediate_size")', 'c.whole("intermediate_size")'),
}  # fmt: skip
NAMES = {"hidden", "heads", "head_dim", "kv_heads", "intermediate"}  # fields that later expressions may read
MISSING = object()


@dataclass(frozen=True)
class Variant:
    """One configuration of a tiny model, and the properties that were traced with it.

    Attributes:
        config: the content of config.json.
        changes: {config key: value} for the keys whose values differ from the first variant's.
        facts: the traced values of Decoder's fields, see flatten().
    """

    config: dict[str, Any]
    changes: dict[str, Any]
    facts: Facts


def value(expression: str, variant: Variant) -> Any:
    """The value of an expression over config.json in one variant; MISSING if evaluation raises an error.

    expression: source text for a port file, over `c` (the Config) and the fields in NAMES. variant: a configuration of
    the tiny model.
    """
    c = Config(variant.config, {})
    known = {k: variant.facts[k] for k in NAMES if k in variant.facts}
    try:
        return eval(expression, {"c": c, **known})  # text that this module wrote
    except (PortError, KeyError, TypeError, ValueError, ZeroDivisionError, IndexError, AttributeError):
        return MISSING


def fits(expression: str, wanted: Sequence[Any], variants: Sequence[Variant]) -> bool:
    """True if an expression over config.json gives the wanted value in every variant.

    expression: source text for a port file. wanted: the wanted value for each of `variants`.
    """
    return all(equal(value(expression, v), w) for v, w in zip(variants, wanted, strict=True))


def equal(a: Any, b: Any) -> bool:
    """True if two values are equal. Two numbers are equal if they differ by at most 1e-4 of `b`.

    False if `a` is MISSING.
    """
    if a is MISSING:
        return False
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return bool(np.isclose(a, b, rtol=1e-4, atol=0))
    return bool(a == b)


def solve(field: str, variants: Sequence[Variant], usual: Any = MISSING) -> str | None:
    """Find an expression over config.json that gives a field's traced value in every variant. Returns its source text.

    Returns "" if the value is `usual`, the default of Decoder's field, in every variant. A value that is equal in all
    variants can always be written as a constant. Returns None if the value differs between variants and no expression
    that is tried gives it in all of them.

    field: a key of Variant.facts, or several keys joined by dots, such as mixture.width. variants: configurations of
    the tiny model with their traced values.
    """
    wanted = [_get(v.facts, field) for v in variants]
    if usual is not MISSING and all(equal(w, usual) for w in wanted):
        return ""
    constant = all(equal(w, wanted[0]) for w in wanted)
    if constant and (isinstance(wanted[0], bool) or not isinstance(wanted[0], int | float)):
        return text(wanted[0])
    for expression in (*FIRST.get(field, ()), *candidates(wanted, variants)):
        if fits(expression, wanted, variants):
            return expression
    return text(wanted[0]) if constant else None


def _get(facts: Facts, field: str) -> Any:
    for part in field.split("."):
        facts = facts.get(part) if isinstance(facts, dict) else None  # type: ignore[assignment]
    return facts


def candidates(wanted: Sequence[Any], variants: Sequence[Variant]) -> Iterator[str]:
    """Yield expressions that may give the values `wanted`, as source texts.

    An expression uses one or two keys of config.json. wanted: the wanted value for each of `variants`.
    """
    first, config = wanted[0], variants[0].config
    if isinstance(first, bool):
        for key, v in config.items():
            if isinstance(v, bool):
                yield f'c.flag("{key}")'
                yield f'not c.flag("{key}")'
    elif isinstance(first, str) and first in ACTIVATIONS.values():
        for key, v in config.items():
            if isinstance(v, str) and v in ACTIVATIONS:
                yield f'c.activation("{key}")'
    numbers = [k for k in config if any(_number(v.config.get(k)) for v in variants)]
    if isinstance(first, int) and not isinstance(first, bool):
        for key in numbers:
            yield f'c.whole("{key}")'
            yield f'int(c.get("{key}", 0))'
        for key in numbers:
            yield f'4 * c.whole("{key}")'
            yield f'c.whole("{key}") // 2'
            for other in ("num_shared_experts", "n_shared_experts", "moe_num_shared_experts"):
                if other in config:
                    yield f'c.whole("{key}") * int(c.get("{other}", 0))'
    elif isinstance(first, float):
        for key in numbers:
            for form in (
                'c.real("{0}")', '1 / c.real("{0}")', 'c.real("{0}") ** -0.5', 'c.real("{0}") ** 0.5',
                'float(c.get("{0}", 0.0))',
            ):  # fmt: skip
                yield form.format(key)
        for key in (k for k, v in config.items() if isinstance(v, bool)):
            yield f'hidden**0.5 if c.flag("{key}") else 1.0'
            yield f'head_dim**-0.5 if c.flag("{key}") else 1.0'
        for key in numbers:
            yield f'c.real("{key}") * head_dim**-0.5'
    found = [w for i, w in enumerate(wanted) if not any(equal(w, x) for x in wanted[:i])]
    if len(found) == 2:
        for key in (k for k, v in config.items() if isinstance(v, bool)):
            on = next((w for w, v in zip(wanted, variants, strict=True) if v.config.get(key) is True), MISSING)
            off = next((w for w, v in zip(wanted, variants, strict=True) if v.config.get(key) is not True), MISSING)
            if MISSING not in (on, off):
                yield f'{text(on)} if c.flag("{key}") else {text(off)}'


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
