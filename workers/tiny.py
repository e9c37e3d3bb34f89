"""The tiny Mixtral that comes with this package: `tiny-mixtral/`, whose README.md says what it is and is not."""

import re
from pathlib import Path

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def tiny_checkpoint() -> Path:
    """Folder of the tiny Mixtral, a checkpoint in the layout of the published one: 8 layers, 8 experts, 2 experts per
    token.

    Returns
    -------
    Path
        A folder of the installed package; do not write to it.
    """
    return Path(__file__).with_name("tiny-mixtral")


def model_path(model: str | Path) -> str | Path:
    """What a model's name stands for: "tiny" for the folder of the tiny Mixtral, a folder, or a hub id.

    Raises
    ------
    ValueError
        When it is none of them.
    """
    if str(model) == "tiny":
        return tiny_checkpoint()
    folder = Path(model).expanduser()
    if folder.exists():
        return folder
    if HUB_ID.fullmatch(str(model)) is None:
        raise ValueError(
            f'there is no model {str(model)!r}: it is neither a folder nor a hub id (organization/name). "tiny" is the'
            " small Mixtral of this package"
        )
    return model
