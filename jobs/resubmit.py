"""Submit a capture to a Ray cluster until nothing is missing.

usage: python jobs/resubmit.py [options] -- COMMAND

Examples:
  python jobs/resubmit.py -- python jobs/capture.py --dataset wikitext-103
  python jobs/resubmit.py --attempts 20 -- python jobs/capture.py --dataset wikitext-103
  python jobs/resubmit.py --address http://head:8265 -- python jobs/capture.py --dataset demo:code

Options:
  --address URL             the head's dashboard (http://127.0.0.1:8265)
  --attempts N              most submissions (5)
  --pause SECONDS           pause before the second attempt; doubles after each attempt (60)

If the head does not answer, the script waits for it. docs/options.md explains every option.
Exit status: 0 complete, 1 something is still missing, 2 an error or no head answered, 3 only
quarantined shards are missing, 143 the job was stopped, 130 or 143 interrupted.
"""

import os
import shlex
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import start

start(__name__, __doc__)


from jobs.console.arguments import parse
from jobs.console.terminal import log, run_job

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

POLL_S = 5.0  # arbitrary: the delay of the log shown here
MAX_PAUSE_S = 600.0  # arbitrary
FUTILE = (2, 3, 126, 127)
"""Statuses after which a retry is useless: the command is wrong, only quarantined shards are missing, or the shell
cannot run it."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ResubmitConfig:
    """Submit the command after -- to a Ray cluster, follow it, and resubmit it while something is missing.

    If the head does not answer, the script waits for it. Exit status: 0 complete, 1 something is still missing after
    the last attempt, 2 the command is wrong or no head answered, 3 only quarantined shards are missing, 143 the job was
    stopped, 130 or 143 interrupted.
    """

    address: str = "http://127.0.0.1:8265"
    """The head's dashboard. $RAY_API_SERVER_ADDRESS and $RAY_ADDRESS take precedence, as for `ray job submit`."""
    attempts: int = 5
    """The most submissions; also the most consecutive requests to a head that does not answer."""
    pause: float = 60.0
    """Seconds before the second attempt; the pause doubles after each attempt, up to ten minutes."""

    def __post_init__(self) -> None:
        if not self.address.startswith(("http://", "https://")):
            raise ValueError(f"--address is {self.address!r}, but must begin with http:// or https://")
        for name in ("attempts", "pause"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must be more than 0")


def main(arguments: list[str]) -> int:
    """Submit the command until it is complete; returns its status."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    config = parse(ResubmitConfig, "resubmit", arguments[:end])
    command = shlex.join(arguments[end + 1 :])
    if not command:
        raise ValueError("give the command after --, such as -- python jobs/capture.py --dataset wikitext-103")
    client = patiently(config, lambda: connect(config.address))
    for attempt in range(1, config.attempts + 1):
        if attempt > 1:
            wait(config, attempt - 1)
        job = f"attempt-{attempt}-{uuid.uuid4().hex[:8]}"
        details = run(config, client, job, command)
        status = None if details is None else details.driver_exit_code
        if status in (0, *FUTILE):
            return status if status in (0, 3) else 2
        log(f"attempt {attempt} of {config.attempts}: {became_of(job, details)}")
        if details is not None and details.status == "STOPPED":
            return 143
    return 1


def connect(address: str) -> "JobSubmissionClient":
    """A client of the head at an address."""
    from ray.exceptions import AuthenticationError, RayError  # Ray takes a second: --help must not wait for it
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ValueError(
            f"{address} rejects this machine's token ({str(error).splitlines()[0]}): set RAY_AUTH_MODE=token, and put"
            " the cluster's token into ~/.ray/auth_token"
        ) from error
    except RayError as error:  # raised for an address without http://, such as that of $RAY_ADDRESS
        raise ConnectionError(f"no head at {os.environ.get('RAY_ADDRESS') or address}: {error}") from error


def run(config: ResubmitConfig, client: "JobSubmissionClient", job: str, command: str) -> "JobDetails | None":
    """Run the command as a job and print its log until it ends; None if it was lost with its head."""
    try:
        patiently(config, lambda: submit(client, job, command))
        log(f"job {job} is on {client.get_address()}")
        return follow(config, client, job)
    except KeyboardInterrupt:
        log(f"job {job} continues to run; to stop it: ray job stop --address {client.get_address()} {job}")
        raise


def submit(client: "JobSubmissionClient", job: str, command: str) -> None:
    """Submit a job unless it already exists: the answer to an earlier request may have been lost."""
    try:
        client.submit_job(entrypoint=command, submission_id=job)
    except RuntimeError as error:
        if "already exists" not in str(error):
            raise


def follow(config: ResubmitConfig, client: "JobSubmissionClient", job: str) -> "JobDetails | None":
    """Print a job's log until it ends.

    Polls, because a streamed log hangs forever if the head disappears.
    """
    printed = 0
    while True:
        try:
            details, text = patiently(config, lambda: (client.get_job_info(job), client.get_job_logs(job)))
        except RuntimeError as error:
            if "status code 404" in str(error):
                return None
            raise
        print(text[printed:], end="", flush=True)
        printed = len(text)
        if details.status.is_terminal():
            return details
        time.sleep(POLL_S)


def became_of(job: str, details: "JobDetails | None") -> str:
    """The outcome of a job that is not complete, in one line."""
    if details is None:
        return f"the head was restarted and does not know job {job}"
    if details.driver_exit_code == 1:
        return f"job {job} reports that something is missing"
    reason = details.message or f"exit status {details.driver_exit_code}"
    return f"job {job} is {details.status}: {reason.splitlines()[0]}"


def patiently(config: ResubmitConfig, request: Callable[[], T]) -> T:
    """The answer to a request, which is retried while the head cannot be reached or is not ready.

    Raises
    ------
    OSError, RuntimeError
        The error of the last of `attempts` consecutive requests.
    """
    for attempt in range(1, config.attempts):
        try:
            return request()
        except (OSError, RuntimeError) as error:
            if isinstance(error, ValueError) or (isinstance(error, RuntimeError) and "status code 5" not in str(error)):
                raise  # a malformed address or answer, or a request that the head rejects
            log(f"the head does not answer: {str(error).splitlines()[0]}")
        wait(config, attempt)
    return request()


def wait(config: ResubmitConfig, attempt: int) -> None:
    """Pause after an attempt; the pause grows with the number of attempts."""
    pause = min(config.pause * 2 ** (attempt - 1), MAX_PAUSE_S)
    log(f"retrying in {pause:,.0f} s")
    time.sleep(pause)


if __name__ == "__main__":
    run_job(main)
