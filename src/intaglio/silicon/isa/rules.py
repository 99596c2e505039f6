"""Rules for single instructions: a chip refuses an instruction that it lacks, or with a wrong memory or shape."""

from __future__ import annotations

from intaglio.chips import ChipError, ChipSpec, Target
from intaglio.silicon.isa.instruction import REGISTRY, Instruction, region_fields


def refusal(i: Instruction, target: Target) -> str:
    """Returns an error text that says why a chip refuses an instruction; "" if the chip accepts it."""
    why = missing_on(target.chip, type(i)) or wrong_memory(i) or wrong_shape(i)
    if why or i.engine not in ("MXU", "ATT"):
        return why
    try:
        i.cost(target)
    except ChipError as e:  # the array takes no operands of this format
        return str(e)
    return ""


def missing_on(chip: ChipSpec, cls: type[Instruction]) -> str:
    """Returns an error text if a chip does not have an instruction, else "".

    The text says why the chip does not have it. cls: class of the instruction.
    """
    if cls.engine == "ATT" and not chip.att_lanes:
        return f"{chip.name} has no fused attention engine (att_lanes=0)"
    if cls.engine == "NET" and chip.links.max_chips < 2:
        return f"{chip.name} has no links to other chips (max_chips={chip.links.max_chips})"
    if cls.optional and cls.__name__ not in chip.extra_instructions:
        has = ", ".join(chip.extra_instructions) or "none"
        return f"{chip.name} does not have this instruction; its extra_instructions are {has}"
    return ""


def wrong_memory(i: Instruction) -> str:
    """Returns an error text if a memory region of an instruction is in the wrong memory, else "".

    A field that is named in the instruction's `hbm` must be a region of HBM. Any other region field must be in SRAM or
    in the accumulators.
    """
    for name in region_fields(type(i)):
        region = getattr(i, name)
        if region is not None and (region.space == "hbm") != (name in i.hbm):
            wanted = "hbm" if name in i.hbm else "sram or acc"
            return f"{name} is {region}; {i.engine} takes it only from {wanted}"
    return ""


def wrong_shape(i: Instruction) -> str:
    """Returns an error text if a region does not have the shape that Instruction.shapes() requires, else "".

    The text is about the first region with a wrong shape.
    """
    sizes: dict[str, int] = {}
    for name, dims in i.shapes().items():
        region = getattr(i, name)
        if region is None:
            continue
        for dim, size in zip(dims, (region.rows, region.cols), strict=True):
            wanted = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
            if size != wanted:
                known = ", ".join(f"{d} = {sizes[d]}" for d in dims if isinstance(d, str) and d in sizes)
                shape = f"[{dims[0]}, {dims[1]}]" + (f" with {known}" if known else "")
                return f"{name} is {region}; wanted {shape}"
    return ""


def check_extra_instructions(chip: ChipSpec) -> None:
    """Raise ChipError if a name in the chip's extra_instructions is not an optional instruction. Returns nothing."""
    known = sorted(name for name, cls in REGISTRY.items() if cls.optional)
    for name in chip.extra_instructions:
        if name not in known:
            why = "every chip has this instruction" if name in REGISTRY else "there is no such instruction"
            raise ChipError(f"chip {chip.name!r}: extra_instructions has {name!r}: {why}; known: {', '.join(known)}")
