"""The four forms of the command on a real head with token authentication, and their messages.

The head is started in one copy of the repository, and three of the forms in another one, which shows from where the
workers import: in both copies a commit record names the file and the process that made it.
"""

import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_model import store_files
from faulty_model import TOKENS_A_SHARD, Script
from patience import HUNG_S, wait_until
from ray_head import ROOT, Head, free_ports, ray_head

from jobs import capture
from store import CaptureGroup, coverage

HERE = Path(__file__).parents[1]
OPTIONS = ["--model", "tiny", "--dataset", "demo:prose", "--limit_documents", "2", "--quantization", "none"]
OPTIONS += ["--sequence_length", "128", "--rows_per_shard", "16"]
CAPTURE = ["python", "jobs/capture.py", *OPTIONS]
SECRET = "s3cr3t-Xq7ZpQ0vT1"
MADE_BY = 'f"{socket.gethostname()}:{os.getpid()}"'
COMPLETE = "demo-prose: complete, 5 shards, 10,164 tokens"

pytestmark = pytest.mark.slow

Ran = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two copies of the repository: one for the head, one for the user's commands."""
    folder = tmp_path_factory.mktemp("copies")
    for name in ("head", "mine"):
        for package in ("store", "workers", "jobs", "analysis"):
            shutil.copytree(ROOT / package, folder / name / package, ignore=shutil.ignore_patterns("__pycache__"))
        replica = folder / name / "workers" / "replica.py"
        code = replica.read_text(encoding="utf-8")
        assert code.count(MADE_BY) == 1
        replica.write_text(code.replace(MADE_BY, "f\"{__file__} in {__import__('sys').argv[0]}\""), encoding="utf-8")
    return folder / "head", folder / "mine"


@pytest.fixture(scope="module")
def head(copies: tuple[Path, Path]) -> Iterator[Head]:
    """A head, started in its copy of the repository."""
    with ray_head(copies[0], OMP_NUM_THREADS="1", RAY_metrics_report_interval_ms="500") as head:
        yield head


@pytest.fixture(scope="module")
def forms(head: Head, copies: tuple[Path, Path]) -> dict[str, tuple[Path, Ran]]:
    """The store and the messages for each form of the command, and for `--local` in this process.

    The user has a token of the hub.
    """
    mine = copies[1]
    stores = mine.parent / "stores"

    def plain(*command: str | Path) -> Ran:
        return head.run(command, mine, RAY_ADDRESS=head.address, HF_TOKEN=SECRET)

    commands: dict[str, Callable[[list[str]], Ran]] = {
        "submit": lambda store: head.submit("--submission-id", "plainly", "--", *CAPTURE, *store, cwd=mine.parent),
        "working dir": lambda store: head.submit("--working-dir", ".", "--", *CAPTURE, *store, cwd=mine),
        "script": lambda store: plain(*CAPTURE, *store),
        "module": lambda store: plain("python", "-m", "jobs.capture", *OPTIONS, *store),
    }
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("GIT_DIR", "/nonexistent")  # the copies are in no repository
        ran = {form: pool.submit(run, ["--store", str(stores / form)]) for form, run in commands.items()}
        status = capture.main([*OPTIONS, "--local", "--store", str(stores / "local")])
        local = Ran([], status, "", "")
        return {form: (stores / form, one.result()) for form, one in ran.items()} | {"local": (stores / "local", local)}


def comparable(store: Path) -> dict[str, Any]:
    """Every file of a store; without the writer and speed of commits, and without the provenance of the group."""
    files: dict[str, Any] = dict(store_files(store))
    for key in [key for key in files if "/commits/" in key]:
        files[key] = {
            name: value for name, value in json.loads(files[key]).items() if name not in ("seconds", "worker")
        }
    group = json.loads(files["demo-prose/zarr.json"])
    del group["attributes"]["configuration"]  # names the store, and --local
    return {**files, "demo-prose/zarr.json": group}


def ended(head: Head, job: str) -> dict[str, Any]:
    """What the head knows about a job."""
    token = (head.folder / "token").read_text()
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/{job}", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=HUNG_S) as answer:
        return dict(json.load(answer))


def said(ran: Ran) -> str:
    """What a command or a job has printed."""
    return ran.stdout + ran.stderr


# --- The forms of the command -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["submit", "working dir", "script", "module"])
def test_each_form_completes_with_workers_that_import_what_the_form_means(
    forms: dict[str, tuple[Path, Ran]], head: Head, copies: tuple[Path, Path], form: str
) -> None:
    store, ran = forms[form]
    assert ran.returncode == 0, said(ran)
    assert coverage(store, "demo-prose").complete
    records, wrong = CaptureGroup(store, "demo-prose").commits()
    assert (len(records), wrong) == (5, {})
    (made_by,) = {record["worker"] for record in records.values()}
    file, process = made_by.split(" in ")
    assert Path(process).name == "default_worker.py", "a process of Ray's, and not the driver"
    folder = {"submit": copies[0], "working dir": head.folder}.get(form, copies[1])
    assert Path(file).is_relative_to(folder)
    assert ("working_dir_files" in file) == (form == "working dir")


@pytest.mark.parametrize("form", ["submit", "working dir", "script", "module"])
def test_each_form_leaves_the_bytes_of_local(forms: dict[str, tuple[Path, Ran]], form: str) -> None:
    local, ran = forms["local"]
    assert ran.returncode == 0, said(ran)
    truth = comparable(local)
    assert len([key for key in truth if "/commits/" in key]) == 5
    assert comparable(forms[form][0]) == truth


@pytest.mark.parametrize("form", ["submit", "working dir", "script", "module"])
def test_each_form_logs_plain_lines_and_a_summary(forms: dict[str, tuple[Path, Ran]], form: str) -> None:
    store, ran = forms[form]
    assert "demo-prose: 2 documents, 80 rows, 10,164 tokens\n" in said(ran), said(ran)
    assert re.search(r"^captured 10,164 tokens in [^,]+, [\d,]+ tokens/s$", said(ran), re.MULTILINE)
    assert re.search(rf"^{COMPLETE}, [\d,]+ bytes \(5 shards done\) in {store}$", said(ran), re.MULTILINE)
    lines = [line for line in said(ran).splitlines() if "demo-prose" in line or "captured" in line]
    assert not [line for line in lines if "\x1b" in line]


@pytest.mark.parametrize("form", ["script", "module"])
def test_a_job_leaves_no_secret_in_ray_s_logs(forms: dict[str, tuple[Path, Ran]], head: Head, form: str) -> None:
    store, ran = forms[form]
    logs = {path: path.read_bytes() for path in head.folder.rglob("*") if path.is_file() and "logs" in path.parts}
    assert len(logs) > 5
    assert not [path for path, data in logs.items() if SECRET.encode() in data]
    assert not [name for name, data in store_files(store).items() if SECRET.encode() in data]
    assert SECRET not in said(ran)


def test_the_dashboard_answers_nobody_without_the_cluster_s_token(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{head.dashboard}/api/jobs/", timeout=HUNG_S)
    refused.value.close()
    assert refused.value.code in (401, 403)


def test_the_driver_s_status_is_that_of_the_capture(
    forms: dict[str, tuple[Path, Ran]], head: Head, copies: tuple[Path, Path]
) -> None:
    assert ended(head, "plainly")["driver_exit_code"] == 0
    store, _ = forms["script"]
    group = CaptureGroup(store, "demo-prose")
    group.discard(3)
    group.quarantine(3, {"errors": ["RoutingError: layer 7"], "documents": ["one"]})
    ran = head.submit("--submission-id", "missing", "--", *CAPTURE, "--store", store, cwd=copies[1])
    assert ran.returncode == 1
    assert ended(head, "missing")["driver_exit_code"] == 3, "only what is in quarantine is missing"
    assert "missing shards: 3; in quarantine: 3 (RoutingError: layer 7)" in said(ran)


def test_resubmit_brings_a_capture_through_a_real_head(
    forms: dict[str, tuple[Path, Ran]], head: Head, copies: tuple[Path, Path]
) -> None:
    command = ["python", "jobs/resubmit.py", "--address", head.dashboard, "--", *CAPTURE]
    ran = head.run([*command, "--store", forms["submit"][0]], copies[1])
    assert ran.returncode == 0, said(ran)
    assert f"{COMPLETE}; nothing to do\n" in ran.stdout
    assert "error" not in said(ran)


# --- Errors -------------------------------------------------------------------------------------------------------


def refused(head: Head, store: Path, cwd: Path, *, tries: int = 0, **environment: str) -> list[str]:
    """Lines of a command that ends with status 2 after a number of Ray's tries, without those of Ray's libraries."""
    ran = head.run([*CAPTURE, "--store", store], cwd, **environment)
    assert ran.returncode == 2, said(ran)
    assert said(ran).count("Failed to get cluster ID") == tries
    assert not store.exists()
    return [line for line in said(ran).splitlines() if not re.match(r"\[.*\] rpc_client|\[.*\] gcs_client", line)]


def test_a_client_without_the_cluster_s_token_is_refused_with_one_line(
    head: Head, copies: tuple[Path, Path], tmp_path: Path
) -> None:
    environment = {"RAY_ADDRESS": head.address, "RAY_AUTH_MODE": "disabled"}
    (line,) = refused(head, tmp_path / "routes.zarr", copies[1], tries=5, **environment)  # Ray itself tries 20 times
    assert line.startswith("error: no Ray cluster: Failed to connect to Ray cluster at ")
    assert "it rejects this process's token: set RAY_AUTH_MODE=token" in line


def test_the_address_of_a_dashboard_is_told_from_that_of_a_head(
    head: Head, copies: tuple[Path, Path], tmp_path: Path
) -> None:
    (line,) = refused(head, tmp_path / "routes.zarr", copies[1], RAY_ADDRESS=head.dashboard)
    assert line.startswith(f"error: RAY_ADDRESS={head.dashboard} is a dashboard, which accepts jobs (ray job submit)")


def test_an_address_where_nobody_listens_is_refused_with_one_line(
    head: Head, copies: tuple[Path, Path], tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    (line,) = refused(head, tmp_path / "routes.zarr", copies[1], RAY_ADDRESS=address)
    assert line.startswith(f"error: no Ray cluster: nothing listens at RAY_ADDRESS={address} (")


def test_a_store_in_the_copy_that_ray_makes_for_a_job_is_refused(head: Head, copies: tuple[Path, Path]) -> None:
    ran = head.submit("--working-dir", ".", "--", *CAPTURE, "--store", "routes.zarr", cwd=copies[1])
    assert ran.returncode == 1
    assert "error: --store routes.zarr would be in " in said(ran)
    assert (
        "a copy that is removed after the job: use an absolute path on a file system that all nodes can access"
        in said(ran)
    )
    assert "Traceback" not in said(ran)


# --- Metrics ------------------------------------------------------------------------------------------------------


def test_prometheus_finds_the_tokens_and_shards_of_a_job(head: Head, tmp_path: Path) -> None:
    shards, store = 6, tmp_path / "routes.zarr"
    Script(tmp_path / "script")
    given = {"store": str(store), "script": str(tmp_path / "script"), "shards": shards, "seconds": 0.0}
    command = [sys.executable, HERE / "cluster_driver.py", json.dumps({**given, "device": "cpu", "stay": True})]
    environment = {**head.environment, "RAY_ADDRESS": head.address, "PYTHONPATH": str(HERE)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as driver:
        wanted = {
            'ray_expert_atlas_tokens_total{dataset="fake"}': TOKENS_A_SHARD * shards - 12,
            'ray_expert_atlas_shards_total{dataset="fake"}': shards,
            "ray_expert_atlas_shard_seconds_count{}": shards,
            "ray_expert_atlas_shards_outstanding{}": 0,
            "ray_expert_atlas_quarantined{}": 0,
        }
        wait_until(lambda: wanted.items() <= ours(head).items() or driver.poll() is not None, "all metrics are there")
        found = ours(head)
        _, errors = driver.communicate()
        assert wanted.items() <= found.items(), f"{found}\n{errors.decode()}"
        assert driver.returncode == 0


def ours(head: Head) -> dict[str, float]:
    """This project's metrics on the head's page, without Ray's own labels."""
    with urllib.request.urlopen(head.metrics, timeout=HUNG_S) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith("ray_expert_atlas")]
    found = {}
    for line in lines:
        name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()  # type: ignore[union-attr]
        kept = [label for label in labels.split(",") if label.startswith(("dataset=", "stage="))]
        found[f"{name}{{{','.join(kept)}}}"] = float(value)
    return found
