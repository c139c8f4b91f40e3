"""Tables as text: Markdown, LaTeX (booktabs) and CSV from headings and cells, and files that appear whole.

The programs that make tables (collect.py, compare.py, report.py) share this module; it runs nothing of its own.
"""

import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

MARKDOWN_ESCAPES = str.maketrans({c: "\\" + c for c in "\\|*_`<"})
LATEX_ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "$": r"\$",
        "&": r"\&",
        "#": r"\#",
        "%": r"\%",
        "_": r"\_",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "−": "$-$",
        "–": "--",
        "≤": r"$\leq$",
        "≥": r"$\geq$",
        "×": r"$\times$",
    }
)
# Two-sided 95 % points of Student's t for 1 to 30 degrees of freedom.
T_95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
LEAST_FOR_INTERVAL = 3


class Table(NamedTuple):
    """A table for people: what it is called and says, its columns and its cells."""

    title: str
    headings: list[str]
    align: str  # a letter a column, l or r
    cells: list[list[str]]
    bold: frozenset[tuple[int, int]] = frozenset()  # (row, column)
    notes: tuple[str, ...] = ()


def make_table(
    title: str,
    columns: dict[str, tuple[str, Callable[[Any], str]]],
    rows: Sequence[Any],
    bold: Callable[[int, str], bool] = lambda row, heading: False,
    notes: tuple[str, ...] = (),
) -> Table:
    """columns: heading -> (alignment, text of a row); bold: whether the cell (row, heading) stands out."""
    headings = list(columns)
    marked = {
        (i, j) for i in range(len(rows)) for j, heading in enumerate(headings) if bold(i, heading)
    }
    cells = [[text(row) for _, text in columns.values()] for row in rows]
    align = "".join(letter for letter, _ in columns.values())
    return Table(title, headings, align, cells, frozenset(marked), notes)


def number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def t_95(degrees: int) -> float:
    """Two-sided 95 % point of Student's t; beyond the list, Fisher's expansion about the normal point.

    M. Abramowitz and I. Stegun, Handbook of Mathematical Functions, 26.7.5 (two terms: right to 4 digits there).
    """
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


def interval_95(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t; None for fewer than three values."""
    if len(values) < LEAST_FOR_INTERVAL:
        return None
    mean = statistics.fmean(values)
    half = t_95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def to_markdown(table: Table) -> str:
    """A table that reads well as it is and when rendered, and its notes."""
    lines = [[cell.translate(MARKDOWN_ESCAPES) for cell in line] for line in table.cells]
    for i, j in table.bold:
        lines[i][j] = f"**{lines[i][j]}**"
    lines.insert(0, table.headings)
    # Three at least: a delimiter is a hyphen or more and, to the right, a colon.
    widths = [max(3, *(len(line[j]) for line in lines)) for j in range(len(table.headings))]
    right = [letter == "r" for letter in table.align]
    lines.insert(
        1, ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
    )
    body = "\n".join(
        "| "
        + " | ".join(
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)
        )
        + " |"
        for line in lines
    )
    head = table.title.translate(MARKDOWN_ESCAPES)
    notes = "".join(f"\n- {note}" for note in table.notes)
    return f"{head}\n\n{body}\n{notes}{chr(10) if notes else ''}"


def to_latex(table: Table, *, scaled: bool = True) -> str:
    """A table environment with a booktabs tabular, caption and notes; scaled: to the width of the text."""
    body = [[cell.translate(LATEX_ESCAPES) for cell in line] for line in table.cells]
    for i, j in table.bold:
        body[i][j] = rf"\textbf{{{body[i][j]}}}"
    frame = pd.DataFrame(body, columns=[name.translate(LATEX_ESCAPES) for name in table.headings])
    tabular = frame.to_latex(index=False, escape=False, column_format=table.align).rstrip()
    head = table.title.translate(LATEX_ESCAPES)
    notes = " ".join(table.notes).translate(LATEX_ESCAPES)
    return (
        "\\begin{table}[htbp]\n"
        "\\centering\n"
        f"\\caption{{{head}}}\n"
        + (
            f"\\resizebox{{\\textwidth}}{{!}}{{%\n{tabular}%\n}}\n\n"
            if scaled
            else f"{tabular}\n\n"
        )
        + (f"\\smallskip\n{{\\footnotesize {notes}}}\n" if notes else "")
        + "\\end{table}\n"
    )


LATEX_PACKAGES = "% needs \\usepackage{booktabs} and \\usepackage{graphicx}\n"


def to_csv(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Numbers in the formats of `columns` (column -> format), so that equal results are equal bytes."""
    cells = [
        {c: "" if row[c] is None else format(row[c], spec) for c, spec in columns.items()}
        for row in rows
    ]
    return pd.DataFrame(cells, columns=list(columns)).to_csv(index=False, lineterminator="\n")


def write_all(contents: dict[Path, str | bytes]) -> None:
    """Write every file under a temporary name, then rename them: all or nothing half-written."""
    parts = {path: path.with_name(path.name + ".part") for path in contents}
    try:
        for path, content in contents.items():
            data = content.encode("utf-8") if isinstance(content, str) else content
            parts[path].write_bytes(data)
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
