"""What `jobs/importance.py` reports: the effect of every expert, which ones matter, and what predicts the effects.

Promises: the table and the JSON output have the same rows. Does not know how effects are measured.
"""

from typing import TYPE_CHECKING, Any

from rich.console import Console

from jobs.console.tables import Bars, Column, Facts, count, number, print_line, print_table

if TYPE_CHECKING:
    import xarray as xr

TOP = 10  # experts to list (arbitrary)
CHANCE = 0.05  # effects with a smaller q are beyond chance
EXPERT = {
    "effect": "effect", "low": "effect_low", "high": "effect_high", "p": "p", "q": "q", "share": "share",
    "weight_share": "weight_share", "mean_saliency": "mean_saliency", "total_saliency": "total_saliency",
}  # fmt: skip
"""Keys of a row, and variables of `analysis.importance`."""
OF_EXPERTS = (
    count("layer", "layer"),
    count("expert", "expert"),
    number("effect", "effect", "+.4f"),
    number("from", "low", "+.4f", spare=2),
    number("to", "high", "+.4f", spare=2),
    number("q", "q", ".4f", spare=1),
    number("load", "share", ".4f", spare=3),
    number("weight", "weight_share", ".4f", spare=4),
    number("saliency", "mean_saliency", spare=5),
    Bars(part=lambda row: row["of_largest"]),
)
OF_LAYERS = (
    count("layer", "layer"),
    count("most important", "most"),
    number("effect", "most_effect", "+.4f"),
    count("least", "least"),
    number("effect", "least_effect", "+.4f"),
    count("beyond chance", "beyond_chance", spare=1),
)
OF_PREDICTORS = (
    Column(name="rank correlation with the loss", text=lambda row: row["predictor"].replace("_", " "), left=True),
    number("within layers", "within_layers", "+.3f"),
    number("from", "within_layers_low", "+.3f", spare=1),
    number("to", "within_layers_high", "+.3f", spare=1),
    number("over all", "over_all", "+.3f"),
    number("from", "over_all_low", "+.3f", spare=2),
    number("to", "over_all_high", "+.3f", spare=2),
)


def importance_told(found: "xr.Dataset") -> Facts:
    """The report of the results of `analysis.importances`."""
    names = found["data_set"].values.tolist()
    sets = {name: _of_data_set(found.sel(data_set=name)) for name in names}
    return {"data_sets": sets, "layers": found["layer"].values.tolist(), "level": found.attrs["level"]}


def _of_data_set(found: "xr.Dataset") -> Facts:
    lift = {"lift": "lift"} if "lift" in found else {}
    values = {key: found[name].transpose("layer", "expert").values for key, name in (EXPERT | lift).items()}
    experts = [
        {"layer": layer, "expert": expert, **{key: float(each[at, e]) for key, each in values.items()}}
        for at, layer in enumerate(found["layer"].values.tolist())
        for e, expert in enumerate(found["expert"].values.tolist())
    ]
    names = [str(name) for name in found if found[name].dims == ("predictor",)]
    correlations = [
        {"predictor": predictor, **{name: float(found[name].sel(predictor=predictor)) for name in names}}
        for predictor in found["predictor"].values.tolist()
    ]
    said: dict[str, Any] = {name: found[name].item() for name in ("n", "documents", "untested")}
    return {**said, "experts": experts, "correlations": correlations}


def print_importance(console: Console, told: Facts) -> None:
    """Print the most important experts, those of each layer, and what predicts effects."""
    for name, each in told["data_sets"].items():
        untested = f"; {each['untested']}" if each["untested"] else ""
        print_line(
            console,
            f"{name}: effect of masking an expert, in nats per predicted token, negative if the expert helps;"
            f" {each['n']:,} tokens of {each['documents']:,} documents; from and to: {told['level']:.0%}"
            f" interval{untested}",
            style="bold",
        )
        print_table(console, OF_EXPERTS, _largest(each["experts"]), note="a full bar means the largest loss")
        print_table(console, OF_LAYERS, _by_layer(each["experts"]))
        print_table(console, OF_PREDICTORS, each["correlations"])


def _largest(experts: list[Facts]) -> list[Facts]:
    """The experts whose removal costs predictions most."""
    found = sorted(experts, key=lambda row: row["effect"])[:TOP]
    largest = min(-1e-12, found[0]["effect"])
    return [{**row, "of_largest": max(0.0, row["effect"] / largest)} for row in found]


def _by_layer(experts: list[Facts]) -> list[Facts]:
    """For each layer the most and the least important expert, and how many effects are beyond chance."""
    rows: list[Facts] = []
    for layer in dict.fromkeys(row["layer"] for row in experts):
        own = [row for row in experts if row["layer"] == layer]
        most, least = min(own, key=lambda row: row["effect"]), max(own, key=lambda row: row["effect"])
        ends = {"most": most["expert"], "most_effect": most["effect"]}
        ends |= {"least": least["expert"], "least_effect": least["effect"]}
        rows.append({"layer": layer, **ends, "beyond_chance": sum(row["q"] < CHANCE for row in own)})
    return rows
