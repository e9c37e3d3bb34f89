"""What the pages say is what the result files hold."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
CARD = (ROOT / "workers" / "tiny-mixtral" / "README.md").read_text()
FOUR_BITS = (ROOT / "docs" / "design" / "0005-four-bits.md").read_text()
FP8 = (ROOT / "docs" / "design" / "0011-fp8.md").read_text()


def result(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def rows(page: str, columns: int) -> list[list[str]]:
    """Cells of all tables with so many columns, without their heads."""
    found = [
        [cell.strip(" *`") for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"
    ]
    return [row for row in found if len(row) == columns and re.match(r"[<\d]|two|one", row[-1])]


def test_the_card_s_losses_are_those_of_the_result_and_well_under_the_n_grams() -> None:
    measured = result("tiny.json")["nats_per_token"]
    told = [row for row in rows(CARD, 5) if row[1][:1].isdigit()]
    assert [row[0] for row in told] == list(measured)
    for name, *values in told:
        wanted = [measured[name][model] for model in list(measured[name])[:4]]
        assert values == [f"{value:.2f}" for value in wanted]
        assert wanted[3] < min(wanted[:3]) - 0.15
        assert wanted[3] < wanted[1] - 0.35  # of all texts, as the model


def test_the_card_tells_what_was_trained_on_as_the_script_recorded_it() -> None:
    record = json.loads((ROOT / "workers" / "tiny-mixtral" / "training.json").read_text())
    told = [row for row in rows(CARD, 5) if "," in row[3]]
    assert {
        name: (int(trained.replace(",", "")), int(held.replace(",", ""))) for name, _, _, trained, held in told
    } == {name: (text["train_tokens"], text["held_out_tokens"]) for name, text in record["texts"].items()}
    for text in record["texts"].values():
        assert text["licence"] in CARD
    for said in ("seed 87", "2,000 batches", f"{record['seconds']} seconds on one H100"):
        assert said in " ".join(CARD.split())
    assert record["steps"] == 2000


def test_experts_tell_of_texts_and_tokens_beyond_chance_and_share_the_load() -> None:
    found = result("tiny.json")
    assert max(found["expert_and_data_set"]["p"]) <= 0.01
    assert all(bits > 5 * null for bits, null in zip(*list(found["expert_and_data_set"].values())[1:3], strict=True))
    texts = {name: told for name, told in found["expert_and_token"].items() if name != "what"}
    assert len(texts) == 4
    for told in texts.values():
        assert all(bits > 10 * null for bits, null in zip(told["bits"], told["by_chance"], strict=True))
    assert max(found["max_vio"]) < 0.5


def test_the_card_s_table_by_layer_is_the_result_s() -> None:
    found = result("tiny.json")
    texts = [told["bits"] for name, told in found["expert_and_token"].items() if name != "what"]
    means = [sum(bits) / len(texts) for bits in zip(*texts, strict=True)]
    wanted = [found["expert_and_data_set"]["bits"], means, found["max_vio"]]
    assert [row[1:] for row in rows(CARD, 9)[1:]] == [[f"{value:.2f}" for value in values] for values in wanted]


def percent(share: float) -> str:
    """As the page rounds: two significant digits below ten."""
    value = 100 * share
    return "0" if value == 0 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 1 else f"{value:.1f}"


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ("float16", "float32 → float16"),
        ("bfloat16", "float32 → bfloat16"),
        ("int8, bfloat16", "float32 → int8"),
        ("NF4, routers as they are, bfloat16** (the default)", "float32 → nf4"),
        ("the same, computed in float32", "float32 → nf4, float32"),
        ("NF4, routers too, bfloat16", "float32 → nf4, gates too"),
        ("FP4, routers as they are, bfloat16", "float32 → fp4"),
        ("FP4, routers too, float16 (the notebook's)", "float32 → fp4, gates too, float16"),
    ],
)
def test_each_row_of_the_weights_table_is_the_result_s(row: str, pair: str) -> None:
    found = result("precision.json")["pairs"][pair]
    [told] = [values for name, *values in rows(FOUR_BITS, 7) if name == row]
    differ = [1 - same for same in found["same_set"]]
    first = 1 - sum(found["same_first"]) / 8
    wanted = [differ[0], differ[3], differ[7], sum(differ) / 8, first, found["differ_somewhere"]]
    assert told == [percent(round(value, 7)) for value in wanted]


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ("float32: batches of 64 rows → rows alone", "float32: 64 rows → rows alone"),
        ("NF4, bfloat16: the same", "nf4: 64 rows → rows alone"),
        ("float32: GPU → CPU", "float32: GPU → CPU"),
        ("NF4, float32: GPU → CPU", "nf4, float32: GPU → CPU"),
        ("bfloat16: GPU → CPU", "bfloat16: GPU → CPU"),
        ("NF4, bfloat16: GPU → CPU", "nf4: GPU → CPU"),
        ("bfloat16: grouped_mm → batched_mm", "bfloat16: grouped_mm → batched_mm"),
        ("bfloat16: grouped_mm → eager", "bfloat16: grouped_mm → eager"),
        ("NF4, bfloat16: sorted (ours) → unfused", "nf4: sorted → unfused"),
    ],
)
def test_each_row_of_the_second_table_is_the_result_s(row: str, pair: str) -> None:
    found = result("precision.json")["pairs"][pair]
    [told] = [values for name, *values in rows(FOUR_BITS, 5) if name == row]
    differ = [1 - same for same in found["same_set"]]
    tokens = round(found["differ_somewhere"] * found["tokens"])
    wanted = [percent(round(value, 7)) for value in (differ[0], differ[7], sum(differ) / 8, found["differ_somewhere"])]
    assert told == (wanted if tokens != 2 else ["0", "0", "0", "two tokens"])
    assert f"{found['tokens']:,} tokens" in FOUR_BITS


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ("bf16 products → fp8 products, the same NF4 weights", "bf16 products → fp8 products"),
        ("the same, added up in float32", "bf16 products → fp8 products, added up in float32"),
        ("NF4 weights in float32 → bf16 products", "dequantized, float32 → bf16 products"),
        ("NF4 weights in float32 → fp8 products", "dequantized, float32 → fp8 products"),
        ("unquantized in float32 → NF4 weights in float32", "unquantized, float32 → dequantized, float32"),
        ("unquantized in float32 → NF4, bf16 products", "unquantized, float32 → bf16 products"),
        ("unquantized in float32 → NF4, fp8 products", "unquantized, float32 → fp8 products"),
    ],
)
def test_what_fp8_changes_at_full_width_is_the_result_s(row: str, pair: str) -> None:
    found = result("gpu-fp8-fidelity.json")["full_width"]
    [told] = [values for name, *values in rows(FP8, 6) if name == row]
    assert told == [percent(router[pair]["differ"]) for router in found]
    assert {router["tokens"] for router in found} == {32_768}
    assert all(router["two_runs_equal"] for router in found)


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ("bfloat16", "float32 → bfloat16"),
        ("fp8, bf16", "float32 → fp8"),
        ("fp8, fp8", "float32 → fp8, fp8 products"),
        ("NF4, bf16", "float32 → nf4"),
        ("NF4, fp8", "float32 → nf4, fp8 products"),
    ],
)
def test_what_fp8_changes_in_the_tiny_model_is_the_result_s(row: str, pair: str) -> None:
    found = result("fp8-tiny.json")["tiny"][pair]
    [told] = [values for name, *values in rows(FP8, 6) if name == row]
    differ = [1 - same for same in found["same_set"]]
    wanted = [differ[0], differ[3], differ[7], sum(differ) / 8, found["differ_somewhere"]]
    assert told == [percent(round(value, 7)) for value in wanted]
    assert f"({found['tokens']:,} tokens)" in FP8


def test_the_speeds_in_fp8_are_the_result_s() -> None:
    measured = result("gpu-fp8.json")["rows"]
    for what, tokens, rate, ratio, memory in rows(FP8, 5):
        weights, matmul = (name.lower() for name in what.split(", ")[:2])
        system = "fp8 captured" + ", added up in float32" * ("added" in what) if matmul == "fp8" else "captured"
        wanted = {"system": system, "weights": weights, "matmul": matmul, "tokens": int(tokens.replace(",", ""))}
        [row] = [row for row in measured if wanted.items() <= row.items()]
        assert rate == f"{row['tokens_per_s']:,}"
        assert ratio in ("", f"{row.get('ratio_to_fp8 gemms', 0):.3f}")
        if matmul == "fp8":  # of the other the file has a note
            assert memory == f"{row['peak_gib']:.1f} GiB"


def test_the_proof_s_counts_in_fp8_are_the_result_s() -> None:
    found = result("gpu-fp8-fidelity.json")["proof"]
    assert {"tiny, fp8", "full width, fp8", "tiny, bf16", "full width, bf16"} == found.keys()
    for one in found.values():
        assert (one["false_alarms"], one["missed"]) == (0, {"batch": 0, "layer": 0})
        assert one["least_share_of_a_sample_with_the_same_set"] == 1
    planted = sum(sum(found[f"{model}, fp8"]["planted"].values()) for model in ("tiny", "full width"))
    assert f"{planted:,} planted faults" in " ".join(FP8.split())
    largest = [
        max(found[f"{model}, {way}"]["largest_relative_difference_of_a_weight"] for model in ("tiny", "full width"))
        for way in ("bf16", "fp8")
    ]
    assert f"{largest[0]:.1%} with bf16 and {largest[1]:.1%} with fp8".replace("%", " %") in " ".join(FP8.split())


def test_the_page_of_inference_tells_the_rejections_of_the_result() -> None:
    page, found = (ROOT / "docs" / "design" / "0010-inference.md").read_text(), result("inference.json")
    told = [row for row in rows(page, 13) if "/" in row[2]]
    heads = [
        (5, 5),
        (5, 50),
        (8, 8),
        (8, 400),
        (12, 12),
        (12, 100),
        (20, 20),
        (20, 100),
        (50, 50),
        (50, 400),
        (100, 100),
    ]
    assert len(told) == 12
    for length, spread, *cells in told:
        of = {
            tuple(row["documents"]): f"{100 * row['rejected']:.1f} / {100 * row['rejected_by_shuffling']:.1f}"
            for row in found["rejections"]
            if (row["lengths"], row["spread"]) == (length, spread)
        }
        assert cells == [of[head] for head in heads]
    for row in found["rejections"]:  # two simulation errors, of those that were tested, beside 3 to 7 %
        tested = row["simulations"] * (1 - row["untested"])
        assert (
            0.03 - 2 * (0.03 * 0.97 / tested) ** 0.5 <= row["rejected"] <= 0.07 + 2 * (0.07 * 0.93 / tested) ** 0.5
        ), row


def test_the_page_of_inference_tells_how_often_equal_means_are_told_apart() -> None:
    page, found = (ROOT / "docs" / "design" / "0010-inference.md").read_text(), result("means.json")["means"]
    told = {tuple(row[:3]): row[3:] for row in rows(page, 5) if row[1] in ("equal", "unequal")}
    for row in found:
        head = ", ".join(map(str, row["documents"])), row["lengths"], ", ".join(map(str, row["spreads"]))
        cell = f"{100 * row['rejected']:.1f} / {100 * row['student']:.1f}"
        assert told[head][(8, 256).index(row["cells"])] == cell
        tested = row["simulations"] * (1 - row["untested"])
        assert row["rejected"] <= 0.05 + 3 * (0.05 * 0.95 / tested) ** 0.5, row
    assert len(told) == len(found) / 2
