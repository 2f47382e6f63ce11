"""The tables of experiment 4, reduced precision, and what they say in words."""

from reduced_precision import PRECISIONS
from reporting import Column, format_bytes, format_count, format_percent, format_ratio, format_seconds, table

PLAIN = "fp32"
WORTH_IT = 1.05  # what is faster by less is noise

_COST = [Column("speedup", "speedup", format_ratio), Column("weight bytes", "weights", format_bytes),
         Column("share of bytes", "of fp32", format_percent), Column("peak bytes", "peak memory", format_bytes),
         Column("error", "error", lambda error: f"{100 * error:.2g} %")]  # fmt: skip


def show(result: dict) -> str:
    ceilings, trained = result["ceilings"], _with_share(result["trained"])
    layers = _with_share(result["layers"])
    for row in layers:
        ceiling = ceilings[_ceiling_of(row["precision"])]
        row["of ceiling"] = row["FLOP/s"] / ceiling if "FLOP/s" in row and ceiling else None
    columns = [Column("layer"), Column("precision"), Column("form"), Column("seconds", "time", format_seconds)]
    extra = [Column("of ceiling", "of ceiling", format_percent)]
    if any("compile seconds" in row for row in layers):
        extra.append(Column("compile seconds", "compiling", format_seconds))
    names = [name for name in PRECISIONS if name in result["widths"][0]]
    widths = [Column("rows"), Column("width"), Column("seconds", "fp32", format_seconds)]
    answers = [Column("encode seconds", "images → tokens", format_seconds),
               Column("prefill seconds", "prefill", format_seconds)]  # fmt: skip
    right = [Column("quality", "right", format_percent), Column("changed", "answers changed")]
    note = [Column("note")] if any(row["note"] for row in (*layers, *trained)) else []
    return "\n\n".join(
        (
            "4. Reduced precision",
            table(layers, [*columns, *_COST, *extra, *note], "Layers (untrained weights: timing only)"),
            table(result["widths"], [*widths, *(Column(name, name, format_ratio) for name in names)],
                  "Speedup over fp32 of one linear layer, by width and number of rows, eager"),
            table(trained, [Column("precision"), *answers, *_COST, *right, *note],
                  f"The trained model, {trained[0]['batch']} images and prompts; error of logits, held-out scenes"),
            "\n".join(_findings(result)),
        )
    )  # fmt: skip


def _ceiling_of(precision: str) -> str:
    """The products of integers and of float8 are set beside bf16's ceiling: they may pass it."""
    return precision if precision in ("fp32", "fp16") else "bf16"


def _with_share(rows: list[dict]) -> list[dict]:
    """Each row with its weights' share of those of the plain row of the same layer."""
    plain = {row.get("layer"): row["weight bytes"] for row in rows if row["precision"] == PLAIN and row["note"] is None}
    return [
        {**row, "share of bytes": row["weight bytes"] / plain[row.get("layer")]} if "weight bytes" in row else dict(row)
        for row in rows
    ]


def _findings(result: dict) -> list[str]:
    ceilings = {name: format_count(flops, "FLOP/s") for name, flops in result["ceilings"].items()}
    most = result["ceilings"]["bf16"] / result["ceilings"]["fp32"]
    return [
        f"A matrix product reaches {ceilings['fp32']} in fp32, {ceilings['bf16']} in bf16 and {ceilings['fp16']} in "
        f"fp16: where arithmetic decides, bf16 can gain {format_ratio(most)} here.",
        f"Widths of a linear layer at which it pays (at least {format_ratio(WORTH_IT)}):",
        _crossovers(result["widths"]),
        _best(result["trained"]),
    ]


def _crossovers(rows: list[dict]) -> str:
    """Per precision and number of rows, the widths at which it is faster."""
    parts = []
    for name in [name for name in PRECISIONS if name in rows[0]]:
        found = []
        for count in dict.fromkeys(row["rows"] for row in rows):
            pays = [str(row["width"]) for row in rows if row["rows"] == count and row[name] >= WORTH_IT]
            found.append(f"{count} {'row' if count == 1 else 'rows'}: {', '.join(pays) or 'nowhere'}")
        parts.append(f"  {name}: {'; '.join(found)}")
    return "\n".join(parts)


def _best(trained: list[dict]) -> str:
    plain = trained[0]
    parts = [
        f"{row['precision']} {format_ratio(row['speedup'])}, {100 * (row['quality'] - plain['quality']):+.1f} points, "
        f"{format_percent(row['weight bytes'] / plain['weight bytes'])} of the bytes"
        for row in trained[1:]
        if row["note"] is None
    ]
    return f"The trained model, against fp32: {'; '.join(parts)}."
