"""The tiny Mixtral that comes with this package: `tiny-mixtral/`, whose README.md says what it is and is not."""

from pathlib import Path


def tiny_checkpoint() -> Path:
    """Folder of the tiny Mixtral, a checkpoint in the layout of the published one: 8 layers, 8 experts, 2 a token.

    Returns
    -------
    Path
        Within the installed package; read it only.
    """
    return Path(__file__).with_name("tiny-mixtral")


def model_path(model: str | Path) -> str | Path:
    """The folder of the tiny Mixtral for the name "tiny", anything else as it is."""
    return tiny_checkpoint() if str(model) == "tiny" else model
