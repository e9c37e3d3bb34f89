"""What `expert-atlas --version` prints: the version of this project, and the versions that a report of a fault needs.

Reads what is installed, and imports none of it.
"""

import platform
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
PACKAGES = ("torch", "transformers", "bitsandbytes", "ray", "zarr", "xarray")


def versions() -> str:
    """Two lines: this project, then Python and the packages that decide how it behaves."""
    packages = (f"{name} {_installed(name) or 'not installed'}" for name in PACKAGES)
    return f"expert-atlas {own_version()}\n{', '.join([f'Python {platform.python_version()}', *packages])}"


def own_version() -> str:
    """The installed version; where nothing is installed, as in a clone, that of pyproject.toml."""
    return _installed("expert-atlas") or str(tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["version"])


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
