"""Aligned columns of text, for the reports that commands print.

print(table([["config", "ratio"], ["full", "1.00x"]]))
"""

from collections.abc import Iterable, Sequence


def table(rows: Iterable[Sequence[str] | None], *, left: int = 1) -> str:
    """Lay out `rows` of equal length, including the heading row, in columns two spaces apart.

    left: number of first columns that are aligned left; the other columns are aligned right. A row of None becomes an
        empty line.
    """
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*filter(None, lines), strict=True)]

    def line(row: Sequence[str] | None) -> str:
        cells = zip(row or (), widths, strict=False)
        aligned = (text.ljust(width) if at < left else text.rjust(width) for at, (text, width) in enumerate(cells))
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, lines))
