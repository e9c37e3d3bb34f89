"""How Sphinx builds these pages: `make docs`. They are Markdown, so that a code host shows them too."""

import os
import sys
import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import download_reference, pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

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

# The Python API, from docstrings in numpydoc.
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
# What stands between single backticks in a docstring is a link where it is a public name, and otherwise code.
default_role = "py:obj"
# Types of other packages, and ours that have no page, are not links.
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    ("py:class", r"(?!store|analysis|workers).*"),
    ("py:class", r"analysis\.attributes\.Result|analysis\.report\.page\.Report|store\.layout\.ArraySpec"),
]

# Files of the repository that are pages here.
PAGES = {name: name.removesuffix(".md").lower() for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
PAGES["README.md"] = "index"


class RepositoryLinks(SphinxTransform):
    """Links to files of the repository: to their page, or to a copy of the file. Links to folders become plain text."""

    default_priority = 500

    def apply(self, **_: Any) -> None:
        for link in list(self.document.findall(lambda node: isinstance(node, pending_xref | download_reference))):
            if link.get("reftype") == "myst":
                self._resolve(link)

    def _resolve(self, link: nodes.Element) -> None:
        folder = Path(self.env.doc2path(self.env.docname)).parent
        suffix = ".md" if link.get("refdomain") == "doc" else ""  # MyST leaves it out
        path = Path(os.path.normpath(folder / f"{link['reftarget']}{suffix}"))
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
        if name in PAGES:
            link["reftarget"] = PAGES[name]
        elif path.is_dir():
            link.replace_self(link.children)
        elif suffix and path.is_file() and not path.is_relative_to(ROOT / "docs"):
            copy = os.path.relpath(path, folder)
            link.replace_self(download_reference("", "", *link.children, refdoc=self.env.docname, reftarget=copy))


def setup(app: Sphinx) -> None:
    """Sphinx calls it."""
    app.add_transform(RepositoryLinks)
