"""The notebook's two dictionaries: `python analysis/examples/two_dictionaries.py demo.zarr/demo-prose --layer 3`.

Expert -> its tokens, and token -> its experts, at one layer, with counts. A token belongs to an expert if the expert is
any of its choices. Pass `by="lift", min_count=20` to `expert_tokens` for the tokens that are typical of an expert.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `store` and `analysis`

import store
from analysis import expert_tokens, token_experts


def main(path: str, dataset: str, layer: int, top: int) -> None:
    """Print the most frequent entries of both."""
    routes = store.open_capture(path, dataset)
    ranked = expert_tokens(routes, layer, top=top)
    print(f"expert -> tokens, at layer {layer} of {dataset}")
    for expert in ranked["expert"].values.tolist():
        here = ranked.sel(expert=expert)
        found = zip(here["piece"].values.tolist(), here["counts"].values.tolist(), strict=True)
        print(f"  {expert}: {{{', '.join(f'{piece!r}: {count}' for piece, count in found if count)}}}")

    table = token_experts(routes, layer)
    print(f"token -> experts, the {top} most frequent of {table.sizes['token_id']:,} tokens")
    for token in table["token_id"].values[(-table["tokens"].values).argsort(kind="stable")[:top]]:
        row = table.sel(token_id=token)
        counts = {expert: count for expert, count in enumerate(row["counts"].values.tolist()) if count}
        print(f"  {row['piece'].item()!r}: {dict(sorted(counts.items(), key=lambda item: -item[1]))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Expert -> tokens and token -> experts, at one layer.")
    parser.add_argument("place", metavar="STORE/DATASET")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--top", type=int, default=10, help="entries to print (default 10)")
    options = parser.parse_args()
    path, _, dataset = options.place.rpartition("/")
    main(path, dataset, options.layer, options.top)
