"""docs/architecture.md is checked like code: what it names exists, and it names every switch of the reference."""

import ast
import dataclasses
import re
from pathlib import Path

from puna.testing.reference import Switches

ROOT = Path(__file__).parents[2]


def rows():
    """[fact, source, file:symbol, test, switches] of every table row."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")]
    return [row for row in cells if row[0] != "Fact"]


def top_level_names(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return found


def test_every_row_names_what_exists():
    table = rows()
    assert len(table) > 50
    for row in table:
        assert len(row) == 5, row
        fact, _, place, test, _ = row
        file, symbol = place.strip("`").split(":")
        assert symbol in top_level_names(ROOT / "src" / "puna" / file), (fact, place)
        test_file, name = test.strip("`").split("::")
        files = [ROOT / "tests" / layer / test_file for layer in ("parity", "unit", "dist")]
        assert any(name in top_level_names(file) for file in files if file.is_file()), (fact, test)


def test_every_switch_has_its_row():
    named = {name for row in rows() for name in re.findall(r"`(\w+)`", row[4])}
    assert {f.name for f in dataclasses.fields(Switches)} <= named
