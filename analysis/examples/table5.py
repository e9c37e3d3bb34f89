"""Mixtral's table 5 for your own capture: `python analysis/examples/table5.py demo.zarr/demo-prose`.

How often does the next token go to the same expert? After Mixtral of Experts (Jiang et al. 2024), whose table has three
layers, 0, 15 and 31: "first choice", and "first or second choice", which is any expert in common.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `store` and `analysis`

import store
from analysis import repetition


def main(place: str) -> None:
    """Print the table."""
    path, _, dataset = place.rpartition("/")
    found = repetition(store.open_capture(path, dataset)).sel(lag=1)
    print(f"{dataset}: {found.attrs['n']:,} pairs of neighbouring tokens; % that repeat\n")
    print(f"{'layer':>9}  {'first choice':>14}  {'first or second':>16}")
    for layer in found["layer"].values.tolist():
        cell = found.sel(layer=layer)
        print(f"{layer:>9}  {100 * float(cell['first_repeated']):>14.1f}  {100 * float(cell['any_shared']):>16.1f}")
    first, either = (100 * found[name].attrs["null"] for name in ("first_repeated", "any_shared"))
    print(f"{'by chance':>9}  {first:>14.1f}  {either:>16.1f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python analysis/examples/table5.py STORE/DATASET")
    main(sys.argv[1])
