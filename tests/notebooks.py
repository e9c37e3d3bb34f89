"""The example notebooks as a reader runs them; `python tests/notebooks.py` runs them and keeps what they show.

They are committed with their outputs, so that a code host shows them. Run it after a change to a notebook or
to what its cells show.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from patience import HUNG_S

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "analysis" / "examples"
SIZE = 500_000  # bytes of a notebook with its outputs, at most

NO_ONE = "http://127.0.0.1:9"


def executed(notebook: Any, root: Path) -> Path:
    """Run the cells two folders below the packages, as where they lie, with no way to a network or to other settings.

    Parameters
    ----------
    notebook
        Gets the outputs; what a cell raises is raised.
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


def without_places(notebook: Any, folder: Path) -> None:
    """Take the names of this machine's folders out of what cells show, and progress, which is none afterwards."""
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
