"""Write docs/assets/comparison_short.md: some rows and columns of docs/comparison.md, for the README.

python docs/figures/comparison_short.py
"""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "comparison.md"
OUT = Path(__file__).parents[1] / "assets" / "comparison_short.md"
ROWS = (
    "blocks to take",
    "language models",
    "vision encoders",
    "videos",
    "what a token sees",
    "work of attention",
    "computed again for each token",
    "sharded training",
    "LoRA, quantised language model",
    "few-shot evaluation",
    "weights of the others",
    "weights of its own",
)
COLUMNS = ("here", "flamingo-pytorch", "OpenFlamingo", "IDEFICS", "Mllama", "torchtune")
Table = dict[str, dict[str, str]]


def read_tables(page: str) -> tuple[Table, dict[str, str]]:
    """Read the comparison, row by row and column by column, and by what each row of ours is shown."""
    compared: Table = {}
    shown: dict[str, str] = {}
    header: list[str] = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
        elif header == ["here", "shown by"] and cells[0] != "---":
            shown[cells[0]] = cells[1]
        elif cells[0] != "---":
            compared[cells[0]] = dict(zip(header[1:], cells[1:], strict=True))
    return compared, shown


def target_of(evidence: str) -> str:
    """Give the file, from the root of the repository, that is named first."""
    link = re.match(r"\[[^]]+\]\(([^)]+)\)|`([^`:]+)", evidence)
    if link is None:
        raise ValueError(f"a link or a path must stand first, got {evidence!r}")
    return f"docs/{link[1]}" if link[1] else link[2]


def table(page: str) -> str:
    """Take the rows and columns, with each cell of ours linked to what shows it."""
    compared, shown = read_tables(page)
    lines = [f"| | {' | '.join(('this library', *COLUMNS[1:]))} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in ROWS:
        cells = dict(compared[name], here=f"[{compared[name]['here']}]({target_of(shown[name])})")
        lines.append(f"| {name} | {' | '.join(cells[column] for column in COLUMNS)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    OUT.write_text(table(PAGE.read_text()))
