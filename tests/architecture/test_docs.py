"""Every code block of the documents runs, or says in a comment before it why not."""

import ast
import importlib.util
import json
import linecache
import re
import sys
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    path
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "packages").glob("*/README.md")),
    ]
    if path.exists()
]
LANGUAGES = {"bash", "console", "json", "mermaid", "python", "text", "toml", "yaml"}
TEST_COMMAND = "pip install nox && nox"


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, the line it starts at, and why it is not run, if so."""

    language: str
    text: str
    line: int
    not_run: str | None


def blocks(document: str) -> list[Block]:
    lines = document.splitlines()
    found, fence, start, before = [], "", 0, ""
    for number, line in enumerate(lines):
        opening = re.match(r"\s*(`{3,})(\S*)", line)
        if not fence and opening:
            fence, language, start = opening[1], opening[2], number + 1
            reason = re.fullmatch(r"<!--\s*not run:(.*)-->", before)
            not_run = reason[1].strip() if reason else None
        elif fence and line.strip() == fence:
            found.append(Block(language, textwrap.dedent("\n".join(lines[start:number])) + "\n", start, not_run))
            fence = ""
        if line.strip():
            before = line.strip()
    assert not fence, f"the block opened at line {start} is never closed"
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


BLOCKS = {name(path): blocks(path.read_text(encoding="utf-8")) for path in DOCUMENTS}
WITH_PYTHON = [name for name, found in BLOCKS.items() if any(block.language == "python" for block in found)]


def missing_imports(code: list[str]) -> set[str]:
    """Return the modules that the code imports and that are not installed."""
    wanted = set()
    for tree in map(ast.parse, code):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                wanted |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                wanted.add(node.module.partition(".")[0])
    return {module for module in wanted if importlib.util.find_spec(module) is None}


def run(document: str, found: list[Block], module: types.ModuleType) -> None:
    """Run the blocks in order in one namespace, as a reader would; a traceback shows the document's own lines."""
    for block in found:
        source = "\n" * block.line + block.text
        linecache.cache[document] = (len(source), None, source.splitlines(keepends=True), document)
        exec(compile(source, document, "exec"), vars(module))  # noqa: S102 - running the documents is this test's purpose


# TensorFlow 2.21's tensors have an __array__ without the argument that NumPy 2 asks for; Keras calls it.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
# Lightning asks PyTorch's trees in a way that PyTorch deprecates, and remarks on workers and logging intervals.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize("document", WITH_PYTHON)
def test_python_blocks_run(document, tmp_path, monkeypatch):
    found = [block for block in BLOCKS[document] if block.language == "python" and block.not_run is None]
    missing = missing_imports([block.text for block in found])
    if missing:
        pytest.skip(f"{document} needs {', '.join(sorted(missing))}")
    module = types.ModuleType(re.sub(r"\W", "_", document))
    monkeypatch.setitem(sys.modules, module.__name__, module)  # pickle and dataclasses look their module up
    monkeypatch.chdir(tmp_path)
    run(document, found, module)


@pytest.mark.parametrize("document", BLOCKS)
def test_a_block_names_its_language(document):
    assert [block.line for block in BLOCKS[document] if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("document", BLOCKS)
def test_a_block_that_is_not_run_gives_a_reason(document):
    assert [block.line for block in BLOCKS[document] if block.not_run == ""] == []


@pytest.mark.parametrize("document", BLOCKS)
def test_data_blocks_parse(document):
    yaml = pytest.importorskip("yaml")
    for block in BLOCKS[document]:
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.language == "toml" and sys.version_info >= (3, 11):
            import tomllib

            tomllib.loads(block.text)


def anchors(path: Path) -> set[str]:
    """Return what a link may name after ``#``: the headings of a document, as GitHub writes them."""
    text = re.sub(r"^(`{3,}).*?^\1", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    """Return the relative links of a document that lead to no file, or to no heading of it."""
    links = re.findall(r"\]\((?!https?:)([^)\s]*)\)", path.read_text(encoding="utf-8"))
    broken = []
    for link in links:
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", BLOCKS)
def test_links_lead_to_a_file_and_a_heading(document):
    assert broken_links(ROOT / document) == []


def test_pages_that_the_code_mentions_exist():
    named = set()
    for path in (
        path for folder in ("benchmarks", "packages", "tasks", "tests") for path in (ROOT / folder).rglob("*.py")
    ):
        named |= set(re.findall(r"docs/[\w/-]+\.md", path.read_text(encoding="utf-8")))
    assert "docs/design/0009-public-names-load-when-used.md" in named
    assert {page for page in named if not (ROOT / page).exists()} == set()


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n[here](#page) [there](#nowhere) [gone](gone.md) [web](https://example.org)\n")
    assert broken_links(page) == ["#nowhere", "gone.md"]


@pytest.mark.parametrize("note", sorted(path.name for path in (ROOT / "docs/design").glob("[0-9]*.md")))
def test_a_design_note_states_its_status_as_the_index_does(note):
    heading, status = (ROOT / "docs/design" / note).read_text(encoding="utf-8").splitlines()[0:3:2]
    assert status.startswith("Status: ")
    index = (ROOT / "docs/design/README.md").read_text(encoding="utf-8")
    row = f"| [{heading.removeprefix('# ')}]({note}) | {status.removeprefix('Status: ').split(' (')[0]} |"
    assert row in index.splitlines()


def test_the_page_on_errors_lists_every_error_with_its_builtin():
    source = ROOT / "packages/trainable-core/src/trainable_core/errors.py"
    classes = [node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    bases = {node.name: [ast.unparse(base) for base in node.bases] for node in classes}
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page, re.MULTILINE))
    del bases["TrainableError"], bases["TrainableWarning"]
    assert set(bases) <= set(listed)
    for name, (base, *builtin) in bases.items():
        assert listed[name] == (builtin[0] if builtin else listed[base])


def test_a_failing_block_fails_with_its_line(tmp_path):
    document = "text\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as failure:
        run("planted.md", blocks(document), types.ModuleType("planted"))
    assert failure.traceback[-1].lineno + 1 == 8  # pytest counts lines from 0


def test_a_reason_is_read():
    found = blocks("<!-- not run: needs a GPU -->\n```python\nx\n```\n```python\ny\n```\n")
    assert [block.not_run for block in found] == ["needs a GPU", None]


def test_the_readme_names_the_command_that_ci_runs():
    last = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[-1]
    assert last == TEST_COMMAND
    assert any(TEST_COMMAND in block.text.splitlines() for block in BLOCKS["README.md"] if block.language == "bash")
