"""Settings of the documentation site.

The source folder is the repository itself, so that the pages are the Markdown files that a reader of the repository
sees, with the same links: ``sphinx-build -c docs . OUT``, or ``nox -s docs``.
"""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # `tasks` has the extensions

project = "trainable"
author = "The trainable developers"
release = version = installed_version("trainable-core")
language = "en"

root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "docs/**", "benchmarks/results/*.md"]
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}  # autosummary writes the first
exclude_patterns = ["**/__pycache__", "**/.ipynb_checkpoints", ".*", "docs/templates"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "tasks.site.contents",
    "tasks.site.docstrings",
    "tasks.site.mathml",
    "tasks.site.outputs",
]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_execution_in_temp = True  # notebooks write files
nb_merge_streams = True
nb_output_stderr = "remove"  # the logs of frameworks

templates_path = [str(ROOT / "docs/templates")]
autosummary_generate = True
autosummary_ignore_module_all = False  # a module's `__all__` is what it offers
autodoc_typehints = "none"  # numpydoc's sections say types, with shapes and units
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring = False
suppress_warnings = ["ref.python"]  # a bare name that several modules have is left without a link
add_module_names = False
default_role = "py:obj"  # a name in single backticks is a link where the reference has it

html_theme = "furo"
html_show_copyright = False  # the licence is in the repository
html_title = f"trainable {release}"
html_favicon = "images/favicon.svg"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"
