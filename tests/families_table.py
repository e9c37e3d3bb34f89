"""Writes the table of families in docs/models.md from the results of `make families`."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "tests" / "benchmarks" / "results" / "families-survey.json"
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: made by make families -->", "<!-- families: end -->"


def found() -> dict[str, Any]:
    """The outcome of each family in each precision."""
    result: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return result


def page() -> str:
    """The page as it should be, with the table between its markers."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{table(found())}\n{END}{rest.partition(END)[2]}"


def table(result: dict[str, Any]) -> str:
    """The outcome as a table for the docs."""
    lines = ["| model type | captured in | layers × experts, choices | otherwise |", "|---|---|---|---|"]
    for name, each in result["families"].items():
        captured = [precision for precision, one in each.items() if one["outcome"] == "captured"]
        facts = next((one for one in each.values() if one["outcome"] == "captured"), None)
        shape = f"{facts['layers']} × {facts['experts']}, {facts['k']}" if facts else ""
        others = {f"{one['outcome']}: {one['reason']}": precision for precision, one in each.items() if "reason" in one}
        told = "; ".join(reason if not captured else f"{precision} {reason}" for reason, precision in others.items())
        lines.append(f"| {name} | {', '.join(captured)} | {shape} | {told.replace('|', '/')} |")
    many = sum(any(one["outcome"] == "captured" for one in each.values()) for each in result["families"].values())
    head = f"transformers {result['versions']['transformers']}: {len(result['families'])} model types, {many} captured."
    return "\n".join([head, "", *lines])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
