"""The tables of memory in docs/distributed.md are those that the formulas give."""

import runpy

from conftest import ROOT


def test_the_tables_are_what_the_script_writes():
    script = runpy.run_path(str(ROOT / "docs" / "memory_table.py"))
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    found = script["MARK"].search(page)
    assert found, "the marks of the tables are gone"
    assert found[0] == f"{found[1]}{script['section']()}\n{found[2]}", "run python docs/memory_table.py"
