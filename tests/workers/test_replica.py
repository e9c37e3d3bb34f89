"""What a worker proves before it computes anything: that it uses the driver's store and meets the capture's needs."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import Any

import pytest
from fake_model import FakeEngine, FakeRun, fake_capture, words

from store import CaptureGroup
from store.lease import lease
from workers.environment import environment
from workers.given import GivenRoutes
from workers.replica import Assignment, Misplaced, Replica

TEXTS = [words(40)]


class OtherEngine(FakeEngine):
    """Another model than the one in the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.description = {"model": "other", "layers_of_no_identity": 3}


def never() -> FakeEngine:
    raise AssertionError("a model was loaded before the store and the environment were looked at")


def captured(folder: Path) -> FakeRun:
    run = FakeRun(folder / "routes.zarr")
    assert fake_capture(run.store, TEXTS).complete
    return run


def refusal(assignment: Assignment) -> str:
    with pytest.raises(Misplaced) as refused:
        Replica().load(assignment)
    return str(refused.value)


def test_a_replica_that_sees_the_store_loads_and_names_its_environment(tmp_path: Path) -> None:
    run = captured(tmp_path)
    with lease(CaptureGroup(run.store, "fake")) as held:
        assert Replica().load(run.assignment({"fake": held.token})) == environment("cpu")


@pytest.mark.parametrize("store", ["elsewhere.zarr", "elsewhere/routes.zarr"])
def test_a_store_that_is_not_there_is_refused_naming_host_and_path(tmp_path: Path, store: str) -> None:
    assignment = replace(captured(tmp_path).assignment({"fake": "any"}), store=str(tmp_path / store), make_engine=never)
    refused = refusal(assignment)
    assert refused.startswith(f"{gethostname()} cannot see the store {tmp_path / store} that the driver writes")
    assert "it has no such capture" in refused
    assert "put the store where all nodes can read" in refused


def test_a_store_in_which_another_job_s_lease_lies_is_refused(tmp_path: Path) -> None:
    run = captured(tmp_path)
    with lease(CaptureGroup(run.store, "fake")):
        refused = refusal(replace(run.assignment({"fake": "the driver's"}), make_engine=never))
    assert f"{gethostname()} cannot see the store {run.store}" in refused
    assert "it holds the lease of another job" in refused


def test_a_store_that_cannot_be_read_is_refused_with_the_system_s_reason(tmp_path: Path) -> None:
    run = captured(tmp_path)
    record = Path(run.store) / "fake/token/lease.json"
    record.mkdir()
    refused = refusal(replace(run.assignment({"fake": "any"}), make_engine=never))
    assert refused.startswith(f"{gethostname()} cannot read the store {run.store}: ")
    assert "Is a directory" in refused


@pytest.mark.parametrize("package", ["torch", "transformers", "bitsandbytes", "device"])
def test_another_environment_is_refused_before_a_model_is_loaded_unless_it_is_accepted(
    tmp_path: Path, package: str
) -> None:
    run = captured(tmp_path)
    group = CaptureGroup(run.store, "fake")
    begun: dict[str, Any] = {**environment("cpu"), package: "1.0.other"}
    (Path(run.store) / "fake/expert/environment.json").write_text(json.dumps(begun))
    with lease(group) as held:
        assignment = run.assignment({"fake": held.token})
        refused = refusal(replace(assignment, make_engine=never))
        assert f"  {package}: the store has '1.0.other', this run has {environment('cpu')[package]!r}\n" in refused
        assert "--allow_mixed" in refused
        Replica().load(replace(assignment, allow_mixed=True))


def test_a_package_of_which_bytes_do_not_depend_may_differ(tmp_path: Path) -> None:
    run = captured(tmp_path)
    begun = {**environment("cpu"), "zarr": "1.0.other"}
    (Path(run.store) / "fake/expert/environment.json").write_text(json.dumps(begun))
    with lease(CaptureGroup(run.store, "fake")) as held:
        Replica().load(run.assignment({"fake": held.token}))


def test_another_model_is_refused_with_both_values(tmp_path: Path) -> None:
    run = captured(tmp_path)
    with lease(CaptureGroup(run.store, "fake")) as held:
        refused = refusal(replace(run.assignment({"fake": held.token}), make_engine=partial(OtherEngine)))
    assert refused.startswith(f"the model on {gethostname()} is not the captured one:")
    assert refused.splitlines()[1:] == ["  model: the store has 'fake', this run has 'other'"]


def test_routes_of_another_capture_at_the_same_path_are_refused_with_both_identities(tmp_path: Path) -> None:
    run, others = captured(tmp_path), GivenRoutes(str(tmp_path / "others.zarr"), "fake")
    assert fake_capture(others.path, TEXTS).complete
    metadata = Path(run.store) / "fake/zarr.json"
    kept = json.loads(metadata.read_text())

    def follows(identity: str) -> None:
        kept["attributes"]["identity"]["routes_from"] = identity
        metadata.write_text(json.dumps(kept))

    with lease(CaptureGroup(run.store, "fake")) as held:
        assignment = replace(run.assignment({"fake": held.token}), given=others)
        follows(others.identity)
        Replica().load(assignment)
        follows("a" * 64)
        refused = refusal(replace(assignment, make_engine=never))
        assert f"its identity is {others.identity}, but {'a' * 64} is needed: put the store of --routes_from" in refused
        gone = GivenRoutes(str(tmp_path / "gone.zarr"), "fake")
        refused = refusal(replace(assignment, given=gone, make_engine=never))
        assert refused.startswith(f"{gethostname()} cannot read {gone.path}/fake, which gives the choices (")
