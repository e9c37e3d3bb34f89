"""Replay compared with the capture's own arrays, row by row, and files read back like slime reads SGLang's answers."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import make_capture

from analysis.exports.replay import document_replay, read_replay, row_replay, write_replay

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FORMS = {"vllm": ("uint8", 1), "sglang": ("int32", 1), "slime": ("int32", 1), "verl": ("int16", 0)}
"""Type for up to 256 experts, and how many of the last tokens have no routes."""


@st.composite
def captures(draw: st.DrawFn) -> xr.Dataset:
    num_experts = draw(st.integers(2, 64))
    capture = make_capture(
        seed=draw(st.integers(0, 2**31)),
        documents=draw(st.integers(1, 7)),
        layers=draw(st.sampled_from([(0,), (0, 1, 2), (1, 4)])),
        num_experts=num_experts,
        experts_per_token=draw(st.integers(1, min(8, num_experts))),
        sequence_length=8,
        rows_per_shard=draw(st.integers(1, 4)),
        vocabulary=12,
        special_token_ids=draw(st.sampled_from([(), (1,), (0, 2)])),
        chunked=False,
    )
    chunk = draw(st.none() | st.integers(1, 9))
    return capture if chunk is None else capture.chunk({"doc": chunk, "position": 3, "layer": 1})


def sequence(capture: xr.Dataset, rows: list[int]) -> tuple[list[int], list[list[list[int]]]]:
    """Token ids and experts (layer, k) of all filled positions of these rows."""
    data = capture.compute()
    where = [(row, position) for row in rows for position in range(int(data["length"][row]))]
    tokens = [int(data["token"].values[at]) for at in where]
    return tokens, [data["expert"].values[at].tolist() for at in where]


def documents(capture: xr.Dataset) -> dict[int, list[int]]:
    """The rows of each document that has any."""
    ids = capture["document_id"].values.tolist()
    return {document: [row for row, of in enumerate(ids) if of == document] for document in sorted(set(ids))}


def slots(experts: list[list[list[int]]], layers: list[int], num_hidden_layers: int, k: int) -> list[list[list[int]]]:
    """With zeros for the layers between."""
    return [
        [token[layers.index(layer)] if layer in layers else [0] * k for layer in range(num_hidden_layers)]
        for token in experts
    ]


@few
@given(captures(), st.sampled_from(sorted(FORMS)), st.none() | st.booleans(), st.integers(0, 2))
def test_a_document_is_put_together_again_in_the_shape_and_type_of_each_framework(
    capture: xr.Dataset, framework: str, all_positions: bool | None, more: int
) -> None:
    layers, k = capture["layer"].values.tolist(), capture.sizes["k"]
    num_hidden_layers = layers[-1] + 1 + more
    options = {"all_positions": all_positions, "num_hidden_layers": num_hidden_layers}
    dtype, left_out = FORMS[framework]
    if all_positions is not None:
        left_out = int(not all_positions)
    whole = [(document_replay(capture, d, framework, **options), rows) for d, rows in documents(capture).items()]
    single = [(row_replay(capture, row, framework, **options), [row]) for row in range(capture.sizes["doc"])]
    for replay, rows in whole + single:
        tokens, experts = sequence(capture, rows)
        expected = slots(experts[: len(tokens) - left_out], layers, num_hidden_layers, k)
        assert replay.token.tolist() == tokens
        assert replay.routed_experts.shape == (len(tokens) - left_out, num_hidden_layers, k)
        assert (replay.token.dtype, replay.routed_experts.dtype) == (np.int32, np.dtype(dtype))
        assert replay.routed_experts.tolist() == expected


@few
@given(capture=captures(), framework=st.sampled_from(sorted(FORMS)), by=st.sampled_from(["document", "row"]))
def test_what_was_written_reads_back_as_it_was_and_as_slime_reads_it(
    tmp_path_factory: pytest.TempPathFactory, capture: xr.Dataset, framework: str, by: str
) -> None:
    path = tmp_path_factory.mktemp("replay") / "routes.jsonl"
    num_hidden_layers = int(capture["layer"][-1]) + 1
    written = write_replay(path, capture, framework, by=by, num_hidden_layers=num_hidden_layers)
    one = document_replay if by == "document" else row_replay
    keys = list(documents(capture)) if by == "document" else list(range(capture.sizes["doc"]))
    expected = [one(capture, key, framework, num_hidden_layers=num_hidden_layers) for key in keys]
    assert written == len(expected)
    for got, replay in zip(read_replay(path), expected, strict=True):
        for array, other in zip(got, replay, strict=True):
            assert (array.dtype, array.flags.writeable) == (other.dtype, True)
            np.testing.assert_array_equal(array, other)
    for line, replay, key in zip(path.read_text().splitlines(), expected, keys, strict=True):
        output = json.loads(line)
        assert output[by] == key
        if framework not in ("sglang", "slime"):
            continue
        # slime/rollout/sglang_rollout.py, with args.num_layers and args.moe_router_topk
        routed = np.frombuffer(
            base64.b64decode(output["meta_info"]["routed_experts"].encode("ascii")), dtype=np.int32
        ).reshape(len(output["tokens"]) - 1, num_hidden_layers, capture.sizes["k"])
        np.testing.assert_array_equal(routed, replay.routed_experts)


def test_routes_are_replayed_in_any_order_of_the_rows() -> None:
    capture = make_capture(seed=3)
    document = next(document for document, rows in documents(capture).items() if len(rows) > 2)
    turned = capture.isel(doc=slice(None, None, -1))
    for one, other in zip(document_replay(turned, document), document_replay(capture, document), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_bos_before_each_row_stays_only_before_the_first() -> None:
    capture = make_capture(seed=3, special_token_ids=(1,), chunked=False).copy(deep=True)
    capture["token"][:, 0] = 1
    document, rows = next(item for item in documents(capture).items() if len(item[1]) == 3)
    everything, experts = sequence(capture, rows)
    assert document_replay(capture, document).token.tolist() == everything
    kept = [index for index in range(len(everything)) if index not in (16, 32)]
    replay = document_replay(capture.assign_attrs(bos="row"), document, all_positions=True)
    assert replay.token.tolist() == [everything[index] for index in kept]
    assert replay.routed_experts.tolist() == [experts[index] for index in kept]


@pytest.mark.parametrize(("experts", "dtype"), [(255, "uint8"), (256, "uint8"), (257, "uint16")])
def test_vllms_type_is_the_smallest_that_holds_all_expert_ids(experts: int, dtype: str) -> None:
    capture = make_capture(documents=3, num_experts=experts)
    replay = row_replay(capture, 0, "vllm", all_positions=True)
    assert replay.routed_experts.dtype == dtype
    np.testing.assert_array_equal(replay.routed_experts, sequence(capture, [0])[1])


def test_only_the_rows_asked_for_are_decoded_and_a_file_takes_one_shard_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = make_capture(documents=30, rows_per_shard=4)
    loaded: list[int] = []
    load = xr.Dataset.load

    def counting(self: xr.Dataset, **options: object) -> xr.Dataset:
        loaded.append(self.sizes["doc"])
        return load(self, **options)

    monkeypatch.setattr(xr.Dataset, "load", counting)
    document, rows = next(item for item in documents(capture).items() if len(item[1]) == 2)
    document_replay(capture, document)
    assert loaded == [len(rows)]
    loaded.clear()
    write_replay(tmp_path / "routes.jsonl", capture)
    assert max(loaded) == 4
    assert sum(loaded) == capture.sizes["doc"] > 12
    assert capture.chunks, "the caller's dataset stays lazy"


def test_what_is_not_captured_or_not_there_is_refused_by_name(tmp_path: Path) -> None:
    capture = make_capture(seed=3, missing=[1], rows_per_shard=4)
    row = 4
    document = int(capture["document_id"][row])
    length = int(capture["length"][row])
    message = f"row 4, document {document}: {length} of {length} tokens are not captured"
    for dataset in (capture, make_capture(seed=3).assign(captured=("doc", np.arange(capture.sizes["doc"]) // 4 != 1))):
        with pytest.raises(ValueError, match=message):
            row_replay(dataset, row)
        with pytest.raises(ValueError, match="are not captured; finish the capture"):
            write_replay(tmp_path / "routes.jsonl", dataset)
        assert list(tmp_path.iterdir()) == []
    capture = make_capture(seed=3, special_token_ids=())
    document, rows = next(item for item in documents(capture).items() if len(item[1]) == 3)
    with pytest.raises(ValueError, match=f"document {document} starts at token 16: earlier rows are missing"):
        document_replay(capture.drop_isel(doc=rows[0]), document)
    with pytest.raises(ValueError, match=f"document {document}: rows are missing before row {rows[1]}"):
        document_replay(capture.drop_isel(doc=rows[1]), document)
    empty = next(document for document in range(99) if document not in documents(capture))
    with pytest.raises(ValueError, match=f"document {empty} has no row"):
        document_replay(capture, empty)


def test_a_form_that_is_not_known_is_refused() -> None:
    capture = make_capture(layers=(1, 4))
    with pytest.raises(ValueError, match="framework 'trl': choose from vllm, sglang, slime, verl"):
        row_replay(capture, 0, "trl")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="by='shard': must be 'document' or 'row'"):
        write_replay("never", capture, by="shard")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layers \[1, 4\] were captured: pass num_hidden_layers"):
        row_replay(capture, 0)
    with pytest.raises(ValueError, match="num_hidden_layers=4, but layer 4 was captured"):
        row_replay(capture, 0, num_hidden_layers=4)
