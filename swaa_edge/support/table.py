"""Aligned columns of text, for the reports that commands print.

print(table([["config", "ratio"], ["full", "1.00x"]]))
"""

from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[str] | None], *, left: int = 1) -> str:
    """Return `rows` as text in columns, two spaces apart.

    rows: rows with equal numbers of cells. The first row is the heading. None becomes an empty line.
    left: number of columns to align left. The other columns are aligned right.
    """
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*filter(None, lines), strict=True)]

    def line(row: Sequence[str] | None) -> str:
        cells = zip(row or (), widths, strict=False)
        aligned = (text.ljust(width) if at < left else text.rjust(width) for at, (text, width) in enumerate(cells))
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, lines))
