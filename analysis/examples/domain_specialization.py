"""OLMoE's figure of domain specialization: `python analysis/examples/domain_specialization.py demo.zarr -o fig.html`.

The share of each data set's tokens that choose each expert (Muennighoff et al. 2024, section 5). One panel per layer:
the first, the middle and the last captured layer. The line marks an even use of all experts.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `store` and `analysis`

import altair as alt

import store
from analysis import domain_specialization, expert_load


def main(path: str, output: str) -> None:
    """Draw the figure as one HTML file that works offline, and print its numbers."""
    rows = []
    for name in store.dataset_names(path):
        share = domain_specialization(expert_load(store.open_capture(path, name)))["any_choice"]
        even, layers = 100 * share.attrs["null"], share["layer"].values.tolist()
        for layer in dict.fromkeys([layers[0], layers[len(layers) // 2], layers[-1]]):
            percent = (100 * share.sel(layer=layer)).values.round(1).tolist()
            print(f"{name}, layer {layer}: {percent} % of the tokens; even share {even:.1f} %")
            about = {"data set": name, "layer": layer, "even": even}
            rows += [{**about, "expert": expert, "percent": value} for expert, value in enumerate(percent)]
    high = alt.Y("percent:Q", title="tokens that choose the expert, %")
    bars = alt.Chart().mark_bar().encode(x="expert:O", xOffset="data set:N", y=high, color="data set:N")
    line = alt.Chart().mark_rule(strokeDash=[4, 4]).encode(y="mean(even):Q")
    chart = alt.layer(bars, line, data=alt.InlineData(values=rows)).facet(row="layer:O")
    chart.save(output, format="html", inline=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="OLMoE's figure of domain specialization, for all data sets of a store."
    )
    parser.add_argument("store")
    parser.add_argument("-o", "--output", default="figure.html")
    options = parser.parse_args()
    main(options.store, options.output)
