"""The benchmarks' pages of results: each script has one, and writing a table changes nothing else on its page."""

import ast
import importlib.util
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGES = sorted((BENCHMARKS / "results").glob("*.md"))


def measuring():
    """Return the scripts' shared module, which is in no package."""
    spec = importlib.util.spec_from_file_location("measuring", BENCHMARKS / "measuring.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reported() -> set[str]:
    """Return the pages that the scripts write, read from their calls of `report`."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in BENCHMARKS.glob("*.py")]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {ast.literal_eval(call.args[0]) for call in calls if getattr(call.func, "id", "") == "report"}


def test_every_page_is_written_by_a_script():
    assert reported() == {path.stem for path in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_writing_a_table_again_leaves_the_page_as_it_is(page):
    text = page.read_text(encoding="utf-8")
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert headings
    for heading in headings:
        body = text.partition(f"\n## {heading}\n\n")[2].partition("\n\n## ")[0].rstrip("\n")
        assert measuring().with_section(text, heading, body) == text


def test_a_table_replaces_the_one_under_its_heading():
    page = "# Page\n\nWhat it is.\n\n## one\n\nold\n\n## two\n\nkept\n"
    expected = "# Page\n\nWhat it is.\n\n## one\n\nnew\n\n## two\n\nkept\n"
    assert measuring().with_section(page, "one", "new") == expected


def test_a_table_of_a_new_version_is_added_at_the_end():
    page = "# Page\n\n## one\n\nold\n"
    assert measuring().with_section(page, "two", "new") == f"{page}\n## two\n\nnew\n"
