"""How Sphinx builds these pages: `make docs`. They are Markdown, so that a code host shows them too."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "Expert Atlas"
author = copyright = "Expert Atlas contributors"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"Expert Atlas {release}"
html_copy_source = False

# Links to headings, as a code host makes their addresses.
myst_heading_anchors = 4

# The Python API: each docstring gives the types of its parameters, so that signatures need none.
autodoc_typehints = "none"
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
# What stands between single backticks in a docstring is a link where it is a public name, and otherwise code.
default_role = "py:obj"
nitpick_ignore_regex = [("py:obj", ".*")]
