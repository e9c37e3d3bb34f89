"""A real Ray head for a test: started with token authentication on free loopback ports, and ended by its process.

Other Ray clusters on the machine are not affected: its files, its address and its token are in its own folder, and only
the processes that it started are stopped.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from patience import HUNG_S, wait_until

ROOT = Path(__file__).resolve().parents[1]
NODE = "127.0.0.2"  # also loopback; Ray replaces 127.0.0.1 with the external address
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
PATIENT = {  # Ray allows half a minute or a minute for a start, which is not enough on a busy machine
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(HUNG_S),
    "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": str(HUNG_S),
    "RAY_raylet_start_wait_time_s": str(HUNG_S),
    "RAY_worker_register_timeout_seconds": str(HUNG_S),
    "RAY_agent_register_timeout_ms": str(1000 * HUNG_S),
    "RAY_health_check_timeout_ms": str(1000 * HUNG_S),
}


@dataclass(frozen=True, kw_only=True)
class Head:
    """A running head."""

    folder: Path
    address: str
    """Where drivers connect."""
    dashboard: str
    """Where jobs are submitted."""
    metrics: str
    """The address for Prometheus."""
    environment: dict[str, str]
    """The environment of a process that may use it; RAY_ADDRESS is not set."""

    def run(self, command: Sequence[str | Path], cwd: Path, **also: str) -> subprocess.CompletedProcess[str]:
        """Run a command that may use the head."""
        environment = {**self.environment, **also}
        return subprocess.run(
            list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=HUNG_S
        )

    def submit(self, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        """`ray job submit`."""
        return self.run([*RAY, "job", "submit", *arguments], cwd, RAY_ADDRESS=self.dashboard)


@contextmanager
def ray_head(cwd: Path, **also: str) -> Iterator[Head]:
    """Start a head in a folder, and end it with everything that it started.

    Parameters
    ----------
    cwd
        The folder in which `ray start` runs.
    also
        Further environment variables of the head, and so of the jobs and workers.
    """
    folder = Path(tempfile.mkdtemp(prefix="ea", dir="/tmp"))  # short: a socket's path has 107 characters
    port, dashboard, agent, client, metrics = free_ports(5)
    scripts = Path(sys.executable).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {
        "PATH": f"{scripts}{os.pathsep}{environment['PATH']}",
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        **PATIENT,
        **also,
    }
    (folder / "token").write_text(os.urandom(32).hex())
    (folder / "token").chmod(0o600)
    options = {
        "node-ip-address": NODE,
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
        "metrics-export-port": metrics,
        "num-cpus": 2,
        "object-store-memory": 100_000_000,
    }
    command = [*RAY, "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(dashboard, head, folder / "head.log")
        yield Head(
            folder=folder,
            address=f"{NODE}:{port}",
            dashboard=f"http://127.0.0.1:{dashboard}",
            metrics=f"http://127.0.0.1:{metrics}/metrics",
            environment=environment,
        )
    finally:
        end_tree(head)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Free loopback ports outside the ranges used by outgoing connections and by Ray."""
    ports: list[int] = []
    for port in random.sample(range(20_000, 32_000), 1000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
        if len(ports) == count:
            return ports
    raise AssertionError("no port is free")


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything that it started, with SIGTERM for the first five seconds."""
    family = [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=5)
    for one in alive:
        one.kill()
    process.kill()
    process.wait(HUNG_S)


def _wait_for(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    def listens() -> bool:
        assert head.poll() is None, f"no head came up:\n{log.read_text()}"
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=HUNG_S).close()
            return True
        return False

    wait_until(listens, "the head's dashboard listens")
