"""The columns of the answers of `jobs/query.py`, by kind of answer. Does not load the code that computes answers."""

from collections.abc import Sequence

from jobs.console.tables import Bars, Column, Facts, count, number

COUNT = Column(name="count", text=lambda row: f"{row['count']:,}")
SHARE = (
    Column(name="share", text=lambda row: f"{row['share']:.4f}"),
    Bars(part=lambda row: row["share"]),
    Column(name="lift", text=lambda row: f"{row['lift']:.2f}", spare=2),
)
EXPERTS = (
    Column(name="layer", text=lambda row: f"{row['layer']}"),
    Column(name="expert", text=lambda row: f"{row['expert']}"),
    COUNT,
    *SHARE,
)
TOKENS = (
    Column(name="rank", text=lambda row: f"{row['rank']}"),
    Column(name="token", text=lambda row: row["piece"], left=True, elastic=True),
    Column(name="id", text=lambda row: f"{row['token_id']}", spare=3),
    COUNT,
    Column(name="of", text=lambda row: f"{row['tokens']:,}", spare=4),
    *SHARE,
)
CLASSES = (
    count("layer", "layer"),
    count("expert", "expert"),
    COUNT,
    *SHARE,
    number("from", "lift_low", ".2f", spare=3),
    number("to", "lift_high", ".2f", spare=3),
)
PLACE = (count("layer", "layer"), count("expert", "expert"))
SALIENCY = (
    *PLACE,
    count("tokens", "tokens"),
    number("saliency", "mean_saliency"),
    number("from", "mean_saliency_low", spare=2),
    number("to", "mean_saliency_high", spare=2),
    number("largest", "largest_saliency", spare=3),
    number("share", "share", ".4f"),
    Bars(part=lambda row: row["share"]),
)
LOGPROB = (
    *PLACE,
    count("tokens", "tokens", spare=4),
    number("logprob", "mean_logprob"),
    number("difference", "difference", spare=3),
    number("within", "within"),
    number("from", "within_low", spare=2),
    number("to", "within_high", spare=2),
    number("p", "within_p"),
    count("compared", "compared", spare=5),
)
KINDS: dict[str, Sequence[Column | Bars]] = {
    "experts": EXPERTS,
    "tokens": TOKENS,
    "classes": CLASSES,
    "saliency": SALIENCY,
    "logprob": LOGPROB,
}


def columns_of(kind: str, facts: Facts) -> Sequence[Column | Bars]:
    """The columns of a kind of answer; for router entropy, those of the available measures."""
    if kind != "entropy":
        return KINDS[kind]
    columns = [count("layer", "layer")]
    for key in facts["null_by_key"]:
        columns += [number(key, key), number("from", f"{key}_low", spare=2), number("to", f"{key}_high", spare=2)]
    return columns
