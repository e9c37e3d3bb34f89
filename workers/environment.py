"""What a worker's bytes depend on besides the identity: package versions, and the device."""

import sys
from importlib.metadata import version

PACKAGES = ("torch", "transformers", "bitsandbytes", "tokenizers", "zarr", "numcodecs", "xarray", "numpy")
SAME_BYTES_NEEDS = ("torch", "transformers", "bitsandbytes", "device")  # differ: refused without --allow_mixed


def environment(device: str) -> dict[str, str]:
    """Versions of the packages and of Python, and the device's name ("cpu", or the GPU's).

    Parameters
    ----------
    device
        "cuda" or "cpu".
    """
    name = device
    if device == "cuda":
        import torch  # takes seconds; a worker without a GPU may do without it

        name = torch.cuda.get_device_name()
    return {**{package: version(package) for package in PACKAGES}, "python": sys.version.split()[0], "device": name}
