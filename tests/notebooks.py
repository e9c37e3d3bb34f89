"""The example notebooks as run by a reader; `python tests/notebooks.py` runs them and keeps their outputs.

They are committed with their outputs, so that a code host shows them. Run it after changing a notebook or the outputs
of its cells.
"""

import ast
import shutil
import sys
import tempfile
import warnings
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import altair as alt
import nbformat
import pytest
from nbclient import NotebookClient
from patience import HUNG_S

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "analysis" / "examples"
SIZE = 500_000  # maximum bytes of a notebook with its outputs

NO_ONE = "http://127.0.0.1:9"


def executed(notebook: Any, root: Path) -> Path:
    """Run the cells two folders below the packages, as in their real place, without a network or other settings.

    Parameters
    ----------
    notebook
        Receives the outputs; errors of cells are raised.
    root
        An empty folder.

    Returns
    -------
    Path
        The folder in which it ran.
    """
    folder = root / "some" / "folder"
    folder.mkdir(parents=True)
    for package in ("store", "workers", "jobs", "analysis"):
        (root / package).symlink_to(ROOT / package)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "HF_HOME"):
            patch.setenv(name, str(root / name))
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "HF_ENDPOINT"):
            patch.setenv(name, NO_ONE)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        for name in ("PYTHONPATH", "JUPYTER_PATH"):
            patch.delenv(name, raising=False)
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=HUNG_S, resources=resources, record_timing=False).execute()
    return folder


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A notebook after its cells ran in this process."""

    shown: dict[tuple[str, str], str]
    """The outputs of each cell, by the cell's id and the MIME type."""
    names: dict[str, Any]
    """The variables."""
    said: str
    """Terminal output, including warnings."""


def run_here(notebook: Any, folder: Path) -> Ran:
    """Run the cells in this process, in a folder: a separate kernel would spend the time of the imports again."""
    names: dict[str, Any] = {"__name__": "notebook"}
    shown, before, said = {}, alt.renderers.active, StringIO()
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        stack.callback(alt.renderers.enable, before)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default")
        patch.setattr(warnings, "showwarning", lambda message, *about: print(message, file=said))
        stack.enter_context(redirect_stdout(said))
        stack.enter_context(redirect_stderr(said))
        for cell in notebook.cells:
            if cell.cell_type == "code":
                value = _value_of(cell.source, names)
                shown |= {(cell.id, kind): data for kind, data in _forms(value).items()}
    return Ran(shown=shown, names=names, said=said.getvalue())


def _forms(value: Any) -> dict[str, str]:
    """The output of a value, by MIME type; charts use the enabled renderer."""
    if hasattr(value, "_repr_mimebundle_"):
        bundle = value._repr_mimebundle_()
        return dict(bundle[0] if isinstance(bundle, tuple) else bundle)
    html = {"text/html": str(value._repr_html_())} if hasattr(value, "_repr_html_") else {}
    return {"text/plain": repr(value), **html}


def _value_of(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; returns the value of its last line if that is an expression."""
    *most, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        most, last = [*most, last], ast.Expr(ast.Constant(None))
    exec(compile(ast.Module(most, []), "cell", "exec"), names)
    return eval(compile(ast.fix_missing_locations(ast.Expression(last.value)), "cell", "eval"), names)


def without_places(notebook: Any, folder: Path) -> None:
    """Remove the names of this machine's folders from the outputs, and progress bars, which are useless afterwards."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if output.output_type == "stream":
                    output.text = output.text.replace(f"{folder}/", "")


def main() -> None:
    """Run each notebook and write it with its outputs."""
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        notebook, root = nbformat.read(path, as_version=4), Path(tempfile.mkdtemp())
        try:
            without_places(notebook, executed(notebook, root))
        finally:
            shutil.rmtree(root)
        written = nbformat.writes(notebook) + "\n"
        if str(root) in written or len(written) > SIZE:
            sys.exit(f"{path.name}: {len(written):,} bytes of at most {SIZE:,}, and it must not name {root}")
        path.write_text(written, encoding="utf-8")
        print(f"{path.name}: {len(written):,} bytes")


if __name__ == "__main__":
    main()
