"""What the bytes that a worker writes depend on besides the identity: package versions and the device."""

import sys
from importlib.metadata import version

PACKAGES = ("torch", "transformers", "bitsandbytes", "tokenizers", "zarr", "numcodecs", "xarray", "numpy")
SAME_BYTES_NEEDS = ("torch", "transformers", "bitsandbytes", "device")  # unless --allow_mixed is given


def environment(device: str) -> dict[str, str]:
    """Versions of the packages and of Python, and the device's name ("cpu", or the GPU's).

    Parameters
    ----------
    device
        "cuda" or "cpu".
    """
    name = device
    if device == "cuda":
        import torch  # takes seconds, and a worker without a GPU may not need it

        name = torch.cuda.get_device_name()
    return {**{package: version(package) for package in PACKAGES}, "python": sys.version.split()[0], "device": name}
