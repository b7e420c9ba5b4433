"""The documentation site: every page and every public name is listed, and what is generated is what is committed."""

import ast
import json
import re
from pathlib import Path

import pytest

from tasks import picture
from tasks.site.contents import PARENTS, links, sections, site_map
from tasks.site.outputs import llms
from trainable_core.registry.methods import built_in_methods

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LISTED = [entry.file for entries in site_map().values() for entry in entries]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def pages(folder: Path) -> set[str]:
    """Return the pages of a folder, without what Sphinx generates and without the pages below others."""
    found = [path for path in folder.rglob("*") if path.suffix in {".md", ".rst", ".ipynb"}]
    names = {path.relative_to(ROOT).as_posix() for path in found if not {"generated", "templates"} & set(path.parts)}
    below = tuple(f"{parent}/" for parent in PARENTS.values())
    return {name for name in names if not name.startswith(below) or name.removesuffix(".md") in PARENTS}


def test_the_list_of_pages_has_each_page_once():
    assert sorted(LISTED) == sorted({*pages(DOCS), "README.md", "CONTRIBUTING.md"} - {"docs/README.md"})


@pytest.mark.parametrize(("page", "folder"), PARENTS.items())
def test_a_page_that_lists_a_folder_has_all_of_it(page, folder):
    text = (ROOT / f"{page}.md").read_text(encoding="utf-8")
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob("*.md")} - {f"{page}.md"}
    assert here
    assert here <= set(links(text, page))


def test_an_entry_is_the_first_link_of_its_item():
    text = "# T\n[no](no.md)\n\n## One\n\n- [A](a.md): first,\n  with [more](b.md).\n- no\n\n## Two\n\n- [B](../b.md)\n"
    found = sections(text)
    assert {name: [entry.page for entry in entries] for name, entries in found.items()} == {
        "One": ["docs/a"],
        "Two": ["b"],
    }
    assert found["One"][0].description == "first, with more."


def test_every_listed_page_is_explained_to_programs():
    lines = [line for line in llms("_sources").splitlines() if line.startswith("- ")]
    assert len(lines) == len(LISTED)
    assert all(re.fullmatch(r"- \[[^]]+\]\(_sources/\S+\.txt\): .+\.", line) for line in lines)


@pytest.mark.parametrize("package", ["core", "keras", "torch"])
def test_the_reference_lists_every_public_name(package):
    source = (ROOT / f"packages/trainable-{package}/src/trainable_{package}/__init__.py").read_text(encoding="utf-8")
    names = next(
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    page = (DOCS / f"reference/{package}.rst").read_text(encoding="utf-8")
    listed = re.findall(rf"^   trainable_{package}\.(\w+)$", page, re.MULTILINE)
    assert [name for name in names if listed.count(name) != 1] == []


@pytest.mark.parametrize("method", sorted(built_in_methods()))
def test_the_page_of_equations_has_each_method(method):
    page = (DOCS / "reference/equations.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {method}$", page, re.MULTILINE)


def test_the_picture_is_what_its_script_draws():
    assert picture.PATH.read_text(encoding="utf-8") == picture.picture(picture.WEIGHTS, picture.GRID)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(notebook):
    """The site runs it and shows what it prints, so an output in the file would be an old one."""
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None] == []


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["keras", "torch"]
