"""Aligned columns of text, for the reports that commands print.

print(table([["config", "ratio"], ["full", "1.00x"]]))
"""

from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[str] | None], *, left: int = 1) -> str:
    """Return `rows`, the first of which is the heading, as text in columns that are two spaces apart.

    rows: rows with equal numbers of cells. A row that is None becomes an empty line.
    left: number of columns, from the first, that are aligned left; the other columns are aligned right.
    """
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*filter(None, lines), strict=True)]

    def line(row: Sequence[str] | None) -> str:
        cells = zip(row or (), widths, strict=False)
        aligned = (text.ljust(width) if at < left else text.rjust(width) for at, (text, width) in enumerate(cells))
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, lines))
