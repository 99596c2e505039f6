"""Write docs/accuracy.md: errors of modelled times against measured tables, and what the model leaves out.

    python scripts/accuracy.py TABLES            compute the errors of kernels, and write the page
    python scripts/accuracy.py TABLES --servers  also serve the loads of TABLES/serving.csv (minutes)
    python scripts/accuracy.py TABLES --engines  compute only those of engines' kernels
    python scripts/accuracy.py                   write the page from the figures of earlier runs

TABLES is a folder of `<chip>_<table>.csv` and `engines/<chip>/<engine>_<table>.csv`, as `intaglio validate` reads them.
The page's text is scripts/accuracy/page.md, its figures are in scripts/accuracy/figures.json.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from intaglio.chips import target
from intaglio.chips.engine_kernels import GENERATIONS, entries
from intaglio.codesign import measured
from intaglio.codesign.engine_tables import COLUMNS, engine_target, kinds, read_rows, tables_of, validate_engines
from intaglio.codesign.kernel_fit import Case, calibrate_kernel
from intaglio.codesign.regime import CAUSES, REGIMES
from intaglio.codesign.validate import SERVING, Errors, Record, as_dict, errors_as_dict, predict, tables, validate
from intaglio.codesign.validate import measured as measured_us

ROOT = Path(__file__).parents[1]
TEXT, DATA, PAGE = (ROOT / p for p in ("scripts/accuracy/page.md", "scripts/accuracy/figures.json", "docs/accuracy.md"))
MIN_US = 20.0  # of rows that count, except of collectives
LIMITS = {
    "attention_decode": (15, 22), "attention_prefill": (15, 22), "collectives": (8, 12), "experts": (15, 22),
    "matmul": (5, 8), "matmul fp8": (8, 13),
}  # fmt: skip
POINTS = 24  # rows to which the kernel of an engine is calibrated
PRODUCT_BARS, ATTENTION_BARS = (10, 12, 8), (15, 20, 12)
BARS = {  # table of engines -> bars of the median error: test half, with another chip's constants, calibrated
    **dict.fromkeys(("gemm", "mla_bmm", "scale_matrix", "computescale"), PRODUCT_BARS),
    **dict.fromkeys(("context_attention", "generation_attention", "context_mla", "generation_mla"), ATTENTION_BARS),
    "moe": (15, 25, 15), "custom_allreduce": (10, 15, 10), "gdn": (20, 25, 15), "mamba2": (20, 25, 15),
}  # fmt: skip
EVERY = 40  # rows of each table, of which sample() takes one
Figures = dict[str, Any]


def kept(r: Record) -> Figures:
    """A Record for the data file: errors with two decimals, no rows of the table."""
    return rounded({k: v for k, v in as_dict(r).items() if k != "worst"})


def rounded(figures: Figures) -> Figures:
    """Figures with two decimals."""
    return json.loads(json.dumps(figures), parse_float=lambda text: round(float(text), 2))


def kernels(folder: Path) -> list[Figures]:
    """Errors of each chip, table, format and split, with those of its regimes over all rows of the split."""
    out = []
    for split in ("fit", "test"):
        whole = {(r.chip, r.table, r.dtype): r for r in validate(folder, split, 0.0, 0)}
        longer = {(r.chip, r.table, r.dtype): r for r in validate(folder, split, MIN_US, 0)}
        for key, r in whole.items():
            every = kept(r)
            shown = every if r.table == "collectives" else kept(longer[key])
            del shown["halves"]  # all of its rows are of one half
            out.append(shown | {"split": split, "regimes": every["regimes"], "causes": every["causes"]})
    return out


def sample(folder: Path) -> dict[str, float]:
    """Median error in per cent of every EVERY-th row of each table; compared with the data file's by a test."""
    out = {}
    for (chip, table), rows in tables(folder).items():
        mine = rows[::EVERY]
        error = predict(target(chip), table, mine) / measured_us(mine) - 1
        out[f"{chip} {table}"] = round(float(np.median(np.abs(error))) * 100, 2)
    return out


def servers(file: Path) -> list[Figures]:
    """Errors of the test half of measured servers, by engine and class of model."""
    rows = [r for r in measured.rows(file) if r.split == "test"]
    found = measured.agreements(list(measured.compare_all(rows)))
    return [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(a).items() if k != "worst"} for a in found
    ]


def engine_kernels(folder: Path) -> tuple[list[Figures], list[str]]:
    """Errors of serving engines' kernels: (figures of each kernel, remarks on what is not covered).

    Those of the engine's kernel by half, with its regimes over all rows; of the chip's own library (`chip`), of the
    constants of another generation of chips (`other`), and after calibration with POINTS rows (`calibrated`), on rows
    of the test half that no fit saw.
    """
    whole, left = validate_engines(folder, MIN_US, 0)
    chip = {(r.chip, r.table, r.dtype): r for r in validate_engines(folder, MIN_US, 0, "test", "chip")[0]}
    more = dict[tuple[str, str, str], Figures]()
    for path, name, engine, table in tables_of(folder):
        if table not in COLUMNS:
            continue
        rows, _ = read_rows(path, table, MIN_US, "test")
        for (kernel, dtype), mine in kinds(rows).items():
            out = more.setdefault((name, f"{engine}_{table} {kernel}", dtype), {})
            case, on = Case(target(name), COLUMNS[table][0], tuple(mine)), engine_target(name, engine)
            if other := other_generation(engine, kernel, on.library.generation):
                predicted = predict(engine_target(name, engine, other), case.table, mine)
                out["other"] = errors_as_dict(Errors.of(predicted, measured_us(mine)))
            found = calibrate_kernel(case, on, POINTS)[1] if len(mine) > 1 else None
            if found:
                out["calibrated"] = {"rows": found.rows, "median_abs_error_pct": found.median}
    for r in whole:
        key = r.chip, r.table, r.dtype
        more[key] = kept(r) | rounded(more.get(key, {}))
        if key in chip:
            more[key]["chip_library"] = kept(chip[key])["median_abs_error_pct"]
    return [more[r.chip, r.table, r.dtype] for r in whole], left


def other_generation(engine: str, kernel: str, own: str) -> str:
    """Another generation than `own` that an engine's kernel has constants for; "" if it has not both."""
    having = {g for entry in entries(engine) if entry["kernel"] == kernel for g in GENERATIONS if g in entry}
    return next((g for g in sorted(having - {own}) if own in having), "")


def gather(folder: Path, old: Figures, with_servers: bool, only_engines: bool) -> Figures:
    """The contents of the data file. old: those of an earlier run; what is not computed anew stays."""
    engines, left = engine_kernels(folder / "engines")
    out = {**old, "engines": engines, "left": left}
    if not only_engines:
        out |= {"kernels": kernels(folder), "sample": sample(folder)}
    if with_servers:
        out["servers"] = servers(folder / SERVING)
    return out


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(e: Figures) -> list[str]:
    """Rows, median, mean and bias of some errors, as text."""
    median, mean, bias = e["median_abs_error_pct"], e["mean_abs_error_pct"], e["bias_pct"]
    return [f"{e['rows']:,}", f"{median:.1f}", f"{mean:.1f}", f"{bias:+.1f}"]


def kernel_table(found: Sequence[Figures]) -> str:
    """Errors of the rows that were fitted and of those that were not."""
    known = {(r["chip"], r["table"], r["dtype"], r["split"]): r for r in found}
    rows = []
    for chip, table, dtype in sorted({key[:3] for key in known}):
        fit, test = (known.get((chip, table, dtype, split)) for split in ("fit", "test"))
        median, mean = LIMITS.get(f"{table} {dtype}", LIMITS[table])
        fitted = cells(fit)[:3] if fit else [""] * 3
        limit = f"{median} / {mean}" if test else "none"
        rows.append([chip, words(table), dtype, *fitted, *(cells(test) if test else [""] * 4), limit])
    headers = ["chip", "table", "format", "rows fitted", "median %", "mean %", "rows tested", "median %", "mean %"]
    return markdown([*headers, "bias %", "limit of median / mean %"], rows)


def words(table: str) -> str:
    """The name of a table with spaces."""
    return table.replace("_", " ")


def judged(found: Sequence[Figures]) -> list[Figures]:
    """The figures of the test split of each chip, or those of `fit` of a chip that has no other."""
    tested = {r["chip"] for r in found if r["split"] == "test"}
    mine = [r for r in found if r["split"] == "test" or r["chip"] not in tested]
    return sorted(mine, key=lambda r: (r["chip"], r["table"], r["dtype"]))


def regime_table(found: Sequence[Figures]) -> str:
    """Median errors by regime."""
    rows = []
    for r in judged(found):
        mine = [r["regimes"].get(name) for name in REGIMES]
        shown = [f"{e['median_abs_error_pct']:.1f} ({e['rows']:,})" if e else "" for e in mine]
        rows.append([r["chip"], words(r["table"]), r["dtype"], *shown])
    return markdown(["chip", "table", "format", *REGIMES], rows)


def cause_table(found: Sequence[Figures]) -> str:
    """Number of rows with large errors by cause, for each chip."""
    rows = judged(found)
    chips = sorted({r["chip"] for r in rows})
    total = {chip: Counter[str]() for chip in chips}
    for r in rows:
        total[r["chip"]].update(r["causes"])
    body = [[why, *(f"{total[chip][name]:,}" for chip in chips)] for name, why in CAUSES.items()]
    return markdown(["cause", *chips], body)


def engine_table(found: Sequence[Figures]) -> str:
    """Errors of serving engines' kernels by name: medians of the halves, and with other constants."""
    rows = []
    for r in sorted(found, key=lambda r: (r["chip"], r["table"], r["dtype"])):
        engine, table, kernel = parts_of(r["table"])
        halves = [r["halves"].get(half) for half in ("fit", "test")]
        counts = [f"{h['rows']}" if h else "" for h in halves]
        medians = [
            r.get("chip_library"),
            *(median(h) for h in halves),
            median(r.get("other")),
            median(r.get("calibrated")),
        ]
        test = halves[1]
        rows.append(
            [r["chip"], engine, words(table), kernel, r["dtype"], " + ".join(filter(None, counts)),
             *("" if m is None else f"{m:.1f}" for m in medians), f"{test['bias_pct']:+.1f}" if test else ""]
        )  # fmt: skip
    headers = ["chip", "engine", "table", "kernel", "format", "rows fit + test", "chip's library", "fit", "test"]
    return markdown([*headers, "other chip's constants", "calibrated", "bias of test"], rows)


def parts_of(table: str) -> tuple[str, str, str]:
    """(engine, table, kernel) of the name of a Record of engines."""
    name, _, kernel = table.partition(" ")
    engine, _, table = name.partition("_")
    return engine, table, kernel


def median(e: Figures | None) -> float | None:
    """The median error of some errors, if there are any."""
    return e["median_abs_error_pct"] if e else None


def engine_summary(found: Sequence[Figures]) -> str:
    """Kernels within the bar of their table, and the median of their medians, for each chip and table."""
    rows = []
    for chip in sorted({r["chip"] for r in found}):
        for table, bars in BARS.items():
            mine = [r for r in found if r["chip"] == chip and parts_of(r["table"])[1] == table]
            cells = [chip, words(table), f"{len(mine)}"]
            for what, bar in zip(("test", "other", "calibrated"), bars, strict=True):
                errors = [median(r["halves"].get("test") if what == "test" else r.get(what)) for r in mine]
                known = [e for e in errors if e is not None]
                cells.append(
                    f"{np.median(known):.1f} ({sum(e <= bar for e in known)} of {len(known)} at {bar})" if known else ""
                )
            rows.append(cells)
    headers = ["chip", "table", "kernels", "test half", "other chip's constants", "calibrated"]
    return markdown(headers, rows)


def server_table(found: Sequence[Figures]) -> str:
    """Errors of measured servers."""
    names = ("tpot", "ttft"), ("tpot_bias", "ttft_bias")
    rows = [
        [r["engine"], r["group"], f"{r['rows']:,}", f"{r['derived']:,}", *(f"{100 * r[n]:.1f}" for n in names[0]),
         *(f"{100 * r[n]:+.1f}" for n in names[1])]
        for r in found
    ]  # fmt: skip
    return markdown(["engine", "models", "rows", "derived", "TPOT %", "TTFT %", "TPOT bias %", "TTFT bias %"], rows)


def agreement_table(found: dict[str, dict[str, list[float]]]) -> str:
    """For each kernel the medians and maxima over all chips of abs(ratio - 1), see scripts/agreement.py."""
    rows = []
    for kind, chips in found.items():
        median = max(chips, key=lambda c: chips[c][1])
        worst = max(chips, key=lambda c: chips[c][2])
        calls = [f"{count:.0f}" for count in sorted(count for count, *_ in chips.values())]
        rows.append(
            [kind, f"{len(chips)}", " to ".join(dict.fromkeys((calls[0], calls[-1]))),
             f"{np.median([c[1] for c in chips.values()]):.1%}", f"{chips[median][1]:.1%} ({median})",
             f"{chips[worst][2]:.0%} ({worst})"]
        )  # fmt: skip
    headers = ["kernel", "chips", "calls of each", "median of the chips' medians", "largest median", "worst call"]
    return markdown(headers, rows)


def page(figures: Figures) -> str:
    """The text of docs/accuracy.md."""
    parts = {
        "kernels": kernel_table(figures["kernels"]), "regimes": regime_table(figures["kernels"]),
        "causes": cause_table(figures["kernels"]), "engines": engine_table(figures["engines"]),
        "engine_summary": engine_summary(figures["engines"]),
        "left": "\n".join(f"- {line}" for line in left_out(figures["left"])),
        "servers": server_table(figures["servers"]), "agreement": agreement_table(figures["agreement"]),
    }  # fmt: skip
    text = TEXT.read_text()
    for name, value in parts.items():
        assert f"{{{{{name}}}}}" in text, f"{TEXT} has no {{{{{name}}}}}"
        text = text.replace(f"{{{{{name}}}}}", value)
    return text


def left_out(lines: Sequence[str]) -> list[str]:
    """Remarks of validate_engines() without repetition: one line for each table that no closed form covers."""
    whole, rest = dict[str, list[str]](), list[str]()
    for line in lines:
        name, _, why = line.partition(": ")
        chip, _, stem = name.partition(" ")
        engine, _, table = stem.partition("_")
        if why.startswith("this table"):
            whole.setdefault(f"`{table}`", []).append(f"{engine} on {chip}")
        else:
            rest.append(f"{chip} {engine} `{table}`: {why}")
    return [f"{table}: {', '.join(where)}" for table, where in sorted(whole.items())] + rest


def main() -> None:
    """Write the page and, if a folder is given, its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", nargs="?", type=Path, help="folder of measured tables")
    parser.add_argument("--servers", action="store_true", help="also serve the loads of TABLES/serving.csv")
    parser.add_argument("--engines", action="store_true", help="compute only the errors of engines' kernels anew")
    asked = parser.parse_args()
    figures: Figures = json.loads(DATA.read_text()) if DATA.exists() else {}
    if asked.tables:
        figures = gather(asked.tables, figures, asked.servers, asked.engines)
        DATA.write_text(json.dumps(figures, indent=1) + "\n")
    PAGE.write_text(page(figures))


if __name__ == "__main__":
    main()
