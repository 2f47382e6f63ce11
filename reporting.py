"""How results leave a script: aligned tables, JSON, blocks of the README, plots.

A script makes rows (a list of dicts), prints them with `table` and keeps them with `write_json`; the README shows the
same rows through `markdown_table`, between markers that `update_readme` rewrites and `stale_blocks` checks. Files are
replaced whole, so an interrupted run never leaves half a result. matplotlib is imported where it is used.
"""

import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PALETTE = ("#2f6db3", "#d9722b", "#3f9a5b", "#8a5fb0", "#b8453f", "#6b7280")


def _with_unit(value: float, units: Sequence[str], base: int) -> str:
    """`value` to three significant digits in the unit that suits it; an int that needs no larger unit stays exact."""
    for unit in units:  # noqa: B007 (read behind the loop)
        rounded = float(f"{abs(value):.2e}")
        digits = 0 if isinstance(value, int) or rounded >= 100 else 1 if rounded >= 10 else 2
        number = f"{value:.{digits}f}"
        if abs(float(number)) < base:
            break
        value /= base
    return f"{number} {unit}".rstrip()


def format_seconds(seconds: float) -> str:
    """`0.00123` -> `1.23 ms`; from two minutes on, minutes."""
    if abs(seconds) >= 120:
        return f"{seconds / 60:.1f} min"
    return _with_unit(seconds * 1e9, ("ns", "µs", "ms", "s"), 1000)


def format_bytes(num_bytes: float) -> str:
    """`1536` -> `1.50 KiB`."""
    return _with_unit(num_bytes, ("B", "KiB", "MiB", "GiB", "TiB"), 1024)


def format_count(count: float, unit: str = "") -> str:
    """`1234` -> `1234`, `12345` -> `12.3 k`; with a unit `1.2e9`, `"FLOP/s"` -> `1.20 GFLOP/s`."""
    if not unit and abs(count) < 10_000 and float(count).is_integer():
        return str(int(count))
    return _with_unit(count, [prefix + unit for prefix in ("", "k", "M", "G", "T", "P")], 1000)


def format_percent(fraction: float) -> str:
    """`0.951` -> `95.1 %`."""
    return f"{100 * fraction:.1f} %"


def format_ratio(ratio: float) -> str:
    """`1.5` -> `1.50×`."""
    return _with_unit(float(ratio), ("",), 1000) + "×"


def format_value(value: object) -> str:
    """What a column does unless told otherwise: four significant digits for a float, yes or no for a bool."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Column:
    """One column of a table: the rows' key, the heading over it (the key itself if empty), how a value is written."""

    key: str
    heading: str = ""
    format: Callable[[Any], str] = format_value


def _cells(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column | str] | None) -> tuple[list, list[bool]]:
    """Text of the heading and of every row, and which columns hold numbers. None or an absent key is written `-`."""
    if not rows:
        raise ValueError("rows is empty: expected at least one row")
    columns = [Column(c) if isinstance(c, str) else c for c in columns or dict.fromkeys(k for row in rows for k in row)]
    lines = [[column.heading or column.key for column in columns]] + [[] for _ in rows]
    numeric = []
    for column in columns:
        if not any(column.key in row for row in rows):
            raise ValueError(f"no row has the column {column.key!r}: the rows have {sorted(set().union(*rows))}")
        values = [row.get(column.key) for row in rows]
        for line, value in zip(lines[1:], values, strict=True):
            line.append("-" if value is None else column.format(value))
        present = [value for value in values if value is not None]
        numeric.append(bool(present) and all(type(value) in (int, float) for value in present))
    return lines, numeric


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column | str] | None = None, title: str = "") -> str:
    """Rows as aligned plain text, numbers to the right; columns default to every key in order of appearance.

    A row may lack a value (out of memory: `-`, with the reason in another column). Raises ValueError for no rows, or
    for a column that no row has.
    """
    lines, numeric = _cells(rows, columns)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    text = [
        "  ".join(
            cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, numeric, strict=True)
        )
        for line in lines
    ]
    return "\n".join([title, ""] * bool(title) + [line.rstrip() for line in text])


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column | str] | None = None) -> str:
    """The same rows as a Markdown table. Raises as `table` does."""
    lines, numeric = _cells(rows, columns)
    lines = [[" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines]
    lines.insert(1, ["---:" if right else "---" for right in numeric])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_atomic(path: Path | str, content: bytes) -> Path:
    """Put `content` at `path` (folders are made) whole or not at all: written beside it first, then renamed over it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def write_json(path: Path | str, payload: object) -> Path:
    """Write indented JSON with sorted keys. Raises ValueError, naming the place, for what would not read back equal:
    NaN and infinities, keys that are not strings, objects (tuples are written as lists)."""
    _require_json(payload, "payload")
    text = json.dumps(payload, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return write_atomic(path, (text + "\n").encode())


def _require_json(value: object, where: str) -> None:
    if isinstance(value, dict):
        if not_text := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{where} has the keys {not_text}: JSON keys are strings")
        for key, item in value.items():
            _require_json(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _require_json(item, f"{where}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: JSON has no such number; use None for a value that is missing")
    elif not (value is None or isinstance(value, str | int | float)):
        raise ValueError(f"{where} is a {type(value).__name__}: expected dict, list, str, int, float, bool or None")


def read_json(path: Path | str) -> Any:
    """Raises FileNotFoundError for no file and ValueError, naming it, for one that is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:  # of the JSON or of its UTF-8
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from error


def replace_block(text: str, name: str, body: str) -> str:
    """`text` with `body` between `<!-- results:NAME -->` and `<!-- /results:NAME -->`, each on its own line.

    Raises ValueError unless each marker stands exactly once and in that order, or if `body` holds a marker itself.
    """
    start, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
    for marker in (start, end):
        if text.count(marker) != 1:
            raise ValueError(f"the marker {marker} stands {text.count(marker)} times: expected exactly once")
    if text.index(end) < text.index(start):
        raise ValueError(f"the marker {end} stands before {start}")
    if "<!-- results:" in body or "<!-- /results:" in body:
        raise ValueError(f"the body of block {name!r} holds a results marker, which would end the block early")
    before, after = text[: text.index(start)], text[text.index(end) + len(end) :]
    return "\n\n".join([before + start, body.strip("\n"), end + after])  # some renderers want the blank lines


def stale_blocks(readme_path: Path | str, blocks: Mapping[str, str]) -> list[str]:
    """Names of the blocks whose text in the file differs from `blocks`. Raises as `replace_block` does."""
    text = Path(readme_path).read_bytes().decode()
    return [name for name, body in blocks.items() if replace_block(text, name, body) != text]


def update_readme(readme_path: Path | str, blocks: Mapping[str, str]) -> list[str]:
    """Rewrite the blocks in the file, all or (on a ValueError) none; returns the names of those that changed."""
    stale = stale_blocks(readme_path, blocks)
    text = Path(readme_path).read_bytes().decode()
    for name in stale:
        text = replace_block(text, name, blocks[name])
    if stale:
        write_atomic(readme_path, text.encode())
    return stale


def new_figure(rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (6.4, 4.0), grid: bool = True):
    """A figure of `size` inches and its axes, an array [rows, columns], in the house style; `grid=False` for images.

    Built without pyplot and its global settings, so a notebook's own plots stay as they are.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_prop_cycle(color=PALETTE)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
        if grid:
            ax.set_axisbelow(True)
            ax.grid(color="#d0d4da", linewidth=0.6)
    return figure, axes


def save_figure(figure, path: Path | str) -> Path:
    """Write the figure as PNG with Agg, cropped to its content, atomically; then clear it to free its memory.

    Raises ValueError for a path that does not end in `.png`.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"path is {path}: expected a name that ends in .png")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", backend="agg", dpi=150, bbox_inches="tight", metadata={"Software": None})
    figure.clear()
    return write_atomic(path, buffer.getvalue())
