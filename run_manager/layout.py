"""Text that fits a terminal: lines wrapped between words, aligned columns, and blocks where columns are too wide.

Nothing is ever cut. What is longer than the terminal is wide stays whole, on a line of its own.
"""

import shutil
import sys
from typing import TextIO

UNKNOWN_WIDTH = 80  # of a pipe
RIGHT_ALIGNED = {"#", "steps", "size", "of which optimizer"}


def width() -> int:
    """How many columns the output has."""
    return shutil.get_terminal_size((UNKNOWN_WIDTH, 24)).columns


def cells(text: str) -> int:
    """How many columns a text takes: a character may be two columns wide on a terminal, or none."""
    from rich.cells import cell_len

    return cell_len(text)


def filled(phrases: list[str], columns: int, indent: str = "") -> list[str]:
    """Phrases in a row, separated by commas, on as few lines as fit; only a phrase that alone is too long is broken."""
    lines: list[str] = []
    for phrase in [*(f"{phrase}," for phrase in phrases[:-1]), *phrases[-1:]]:
        if lines and cells(f"{lines[-1]} {phrase}") <= columns:
            lines[-1] += f" {phrase}"
        else:
            lines += wrapped(indent + phrase, columns, indent)
    return lines


def wrapped(line: str, columns: int, indent: str | None = None) -> list[str]:
    """A line broken between words if it is too long; what follows is indented as the line is, or by `indent`."""
    if cells(line) <= columns:
        return [line]
    text = line.lstrip(" ")
    lines, indent = [line[: len(line) - len(text)]], line[: len(line) - len(text)] if indent is None else indent
    for word in text.split(" "):
        joined = lines[-1] + (" " if lines[-1].strip() else "") + word
        if lines[-1].strip() and cells(joined) > columns:
            lines.append(indent + word)
        else:
            lines[-1] = joined
    return lines


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line, wrapped if it goes to a terminal."""
    stream = stream or sys.stdout
    print("\n".join(wrapped(line, width())) if stream.isatty() else line, file=stream, flush=True)


def aligned(heads: list[str], rows: list[list[str]]) -> list[list[str]]:
    """The same cells, each as wide as its column; heads first."""
    columns = []
    for head, *texts in zip(heads, *rows, strict=True):
        widest = max(map(cells, (head, *texts)))
        padding = [" " * (widest - cells(text)) for text in (head, *texts)]
        is_right = head.strip() in RIGHT_ALIGNED
        pairs = zip(padding, (head, *texts), strict=True) if is_right else zip((head, *texts), padding, strict=True)
        columns.append(["".join(pair) for pair in pairs])
    return [list(row) for row in zip(*columns, strict=True)]


def columns_or_blocks(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A small table, indented; where it is wider than the output, each row's first cell and below it the others."""
    table = ["  " + "  ".join(row).rstrip() for row in aligned(heads, rows)]
    if max(map(cells, table)) <= width():
        return table
    lines = []
    for first, *rest in rows:
        lines += wrapped(f"  {first}", width(), "    ")
        for head, text in zip(heads[1:], rest, strict=True):
            lines += wrapped(f"    {f'{head} {text}'.strip()}", width(), "      ") if text else []
    return lines
