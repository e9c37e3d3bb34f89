"""`jobs/resubmit.py` with a loopback server that answers like Ray's head; Ray's own client is in between."""

import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from jobs import resubmit
from jobs.console.terminal import Terminated, run_job

COMMAND = ["python", "jobs/capture.py", "--dataset", "my texts/"]
LOG = ["planned\n", "shard 0\nshard 1\n", "done\n"]
"""A job's output at the first, second and third request; the job ends with the third."""
HANG_UP = 0


@dataclass
class Head:
    """A head whose jobs end as specified: with an exit status, or with None like Ray's `STOPPED` or `FAILED`."""

    endings: list[tuple[str, int | None]]
    submitted: list[dict[str, Any]] = field(default_factory=list)
    asked: dict[str, int] = field(default_factory=dict)
    """How often each job was requested; a restarted head forgets everything."""
    refusals: dict[str, list[int]] = field(default_factory=dict)
    """By method, the HTTP statuses of the next requests; HANG_UP executes a request and does not answer."""
    requests: list[str] = field(default_factory=list)
    server: ThreadingHTTPServer | None = None
    port: int = 0

    def start(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler(self))
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        match path.strip("/").split("/")[1:], method:
            case ["version"], "GET":
                return 200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}
            case ["jobs"], "POST":
                if body["submission_id"] in self.asked:
                    return 400, f"ValueError: Job with submission_id {body['submission_id']} already exists."
                self.submitted.append(body)
                self.asked[body["submission_id"]] = 0
                return 200, {"submission_id": body["submission_id"], "job_id": body["submission_id"]}
            case ["jobs", job], "GET" if job in self.asked:
                self.asked[job] += 1
                return 200, self.details(job)
            case ["jobs", job, "logs"], "GET" if job in self.asked:
                return 200, {"logs": "".join(LOG[: self.asked[job]])}
        return 404, f"Job {path} does not exist"

    def details(self, job: str) -> dict[str, Any]:
        status, code = self.endings[[given["submission_id"] for given in self.submitted].index(job)]
        if self.asked[job] < len(LOG):
            status, code = "RUNNING", None
        details = {"type": "SUBMISSION", "submission_id": job, "status": status, "entrypoint": ""}
        return {**details, "driver_exit_code": code, "message": "Job supervisor actor died\nand more"}


def handler(head: Head) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
            head.requests.append(f"{self.command} {self.path}")
            refusals = head.refusals.get(self.command)
            refusal = refusals.pop(0) if refusals else None
            code, answer = (refusal, "refused") if refusal else head.answer(self.command, self.path, body)
            if refusal == HANG_UP:
                self.close_connection = True
                return
            self.send_response(code)
            self.end_headers()
            self.wfile.write((answer if isinstance(answer, str) else json.dumps(answer)).encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@dataclass
class Clock:
    """Replaces `time.sleep`: records each pause, takes no time, and lets something happen in a pause."""

    pauses: list[float] = field(default_factory=list)
    events: dict[int, Callable[[], None]] = field(default_factory=dict)
    """What happens in the n-th pause, counted from 1."""

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.events.get(len(self.pauses), lambda: None)()

    @property
    def between(self) -> list[float]:
        """All pauses except those between two requests for a job."""
        return [pause for pause in self.pauses if pause != resubmit.POLL_S]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(resubmit.time, "sleep", clock.sleep)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return clock


@pytest.fixture
def heads(clock: Clock) -> Iterator[Callable[..., Head]]:
    """Makes heads that run, and stops them."""
    made = []

    def make(*endings: int | str | None) -> Head:
        names = {0: "SUCCEEDED", "STOPPED": "STOPPED"}
        made.append(Head([(names.get(end, "FAILED"), end if isinstance(end, int) else None) for end in endings]))
        made[-1].start()
        return made[-1]

    yield make
    for head in made:
        head.stop()


def run(head: Head, *options: object, command: list[str] = COMMAND) -> int:
    """The status of the script."""
    arguments = ["resubmit", "--address", head.address, *map(str, options), "--", *command]
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", arguments)
            with pytest.raises(SystemExit) as ended:
                run_job(resubmit.main)
    finally:
        signal.signal(signal.SIGTERM, before)
    return int(ended.value.code or 0)


# --- Effects of the job's status ----------------------------------------------------------------------------------


def test_a_capture_is_submitted_until_nothing_is_missing(
    heads: Callable[..., Head], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    head = heads(1, 1, 0)
    assert run(head) == 0
    assert [shlex.split(job["entrypoint"]) for job in head.submitted] == [COMMAND] * 3
    assert len(head.asked) == 3, "each attempt is a job of its own"
    assert clock.between == [60, 120]
    shown = capsys.readouterr()
    assert shown.out == "".join(LOG) * 3, "each log once, from beginning to end"
    assert "attempt 2 of 5: job attempt-2-" in shown.err
    assert "reports that something is missing" in shown.err


@pytest.mark.parametrize(("code", "status"), [(2, 2), (126, 2), (127, 2), (3, 3)])
def test_what_another_attempt_would_not_change_is_not_tried_again(
    heads: Callable[..., Head], code: int, status: int
) -> None:
    head = heads(code, 0)
    assert run(head) == status
    assert len(head.submitted) == 1


@pytest.mark.parametrize("ending", [-9, 137, 143, 130, None])
def test_a_driver_that_was_killed_or_lost_is_submitted_again(heads: Callable[..., Head], ending: int | None) -> None:
    head = heads(ending, 0)
    assert run(head) == 0
    assert len(head.submitted) == 2


def test_the_attempts_are_bounded(heads: Callable[..., Head], clock: Clock) -> None:
    head = heads(*[1] * 9)
    assert run(head, "--attempts", 3, "--pause", 400) == 1
    assert len(head.submitted) == 3
    assert clock.between == [400, 600], "pauses grow up to ten minutes; none after the last attempt"


def test_a_job_that_someone_stopped_stays_stopped(
    heads: Callable[..., Head], capsys: pytest.CaptureFixture[str]
) -> None:
    head = heads("STOPPED", 0)
    assert run(head) == 143
    assert len(head.submitted) == 1
    assert "is STOPPED" in capsys.readouterr().err


# --- Heads that do not answer -------------------------------------------------------------------------------------


def test_a_head_that_is_not_up_yet_is_waited_for_with_growing_pauses(heads: Callable[..., Head], clock: Clock) -> None:
    head = heads(0)
    head.stop()
    clock.events[3] = head.start
    assert run(head, "--pause", 1) == 0
    assert clock.between == [1, 2, 4]


def test_a_head_that_never_comes_is_given_up(
    heads: Callable[..., Head], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    head = heads(0)
    head.stop()
    assert run(head, "--attempts", 4, "--pause", 1) == 2
    assert clock.between == [1, 2, 4]
    assert f"error: Failed to connect to Ray at address: {head.address}" in capsys.readouterr().err


def test_a_broken_connection_neither_submits_again_nor_shows_the_log_twice(
    heads: Callable[..., Head], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    head = heads(0)
    clock.events = {1: head.stop, 3: head.start}  # in the first pause between two requests
    assert run(head, "--pause", 1) == 0
    assert len(head.submitted) == 1
    assert clock.between == [1, 2]
    assert capsys.readouterr().out == "".join(LOG)


def test_a_job_that_was_lost_with_its_head_is_submitted_again(
    heads: Callable[..., Head], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    head = heads(0, 0)
    clock.events[1] = head.asked.clear
    assert run(head) == 0
    assert len(head.submitted) == 2
    assert "the head was restarted and does not know job attempt-1-" in capsys.readouterr().err


def test_a_submission_whose_answer_was_lost_is_not_made_twice(heads: Callable[..., Head], clock: Clock) -> None:
    head = heads(0, 0)
    head.refusals["POST"] = [HANG_UP]
    assert run(head, "--pause", 1) == 0
    assert len(head.submitted) == 1
    assert head.requests.count("POST /api/jobs/") == 2
    assert clock.between == [1]


@pytest.mark.parametrize(("refusal", "status", "requests"), [(500, 0, 2), (503, 0, 2), (400, 1, 1), (413, 1, 1)])
def test_a_head_that_is_not_ready_is_asked_again_and_one_that_refuses_is_not(
    heads: Callable[..., Head], capsys: pytest.CaptureFixture[str], refusal: int, status: int, requests: int
) -> None:
    head = heads(0)
    head.refusals["POST"] = [refusal]
    assert run(head) == status
    assert head.requests.count("POST /api/jobs/") == requests
    assert f"Request failed with status code {refusal}: refused" in capsys.readouterr().err


def test_a_wrong_token_is_named_at_once(
    heads: Callable[..., Head], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    head = heads(0)
    head.refusals["GET"] = [401]
    assert run(head) == 2
    assert clock.pauses == []
    shown = capsys.readouterr().err
    assert f"error: {head.address} rejects this machine's token" in shown
    assert "set RAY_AUTH_MODE=token" in shown


# --- The person at the terminal -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("interruption", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_interruption_leaves_the_job_and_says_how_to_stop_it(
    heads: Callable[..., Head],
    clock: Clock,
    capsys: pytest.CaptureFixture[str],
    interruption: type[BaseException],
    status: int,
) -> None:
    def interrupt() -> None:
        raise interruption

    head = heads(0)
    clock.events[2] = interrupt
    assert run(head) == status
    (job,) = head.asked
    assert f"job {job} continues to run; to stop it: ray job stop --address {head.address} {job}" in (
        capsys.readouterr().err
    )
    assert not [request for request in head.requests if "stop" in request]


@pytest.mark.parametrize(
    ("options", "command", "message"),
    [
        ((), [], "give the command after --"),
        (("--address", "localhost:8265"), COMMAND, "'localhost:8265', but must begin with http:// or https://"),
        (("--attempts", 0), COMMAND, "--attempts is 0, but must be more than 0"),
        (("--pause", -1), COMMAND, "--pause is -1.0, but must be more than 0"),
    ],
)
def test_faults_of_the_caller_are_named_before_anything_is_submitted(
    heads: Callable[..., Head],
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
    command: list[str],
    message: str,
) -> None:
    head = heads(0)
    assert run(head, *options, command=command) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert head.requests == []
