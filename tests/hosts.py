"""Several hosts on this machine, each with its own address, name and processes, all on one switch.

A host is a set of Linux namespaces (network, processes, name, mounts) around a first process that ends when its input
does. So a host and everything that runs in it end with the tests, however these end. The switch is a bridge in its own
namespace: nothing outside is changed, and concurrent tests may use the same addresses.

The simulation drops packets: silently, for one pair of hosts, in one direction or both, or because a cable is pulled.
There is no real network hardware, no delay and no loss of single packets. Hosts share the machine's files, as through a
shared folder, and its clock.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from patience import HUNG_S

NEW = ["unshare", "--net", "--pid", "--uts", "--mount", "--fork", "--mount-proc", "--kill-child"]
SOON = "{ echo 1000 >/proc/sys/net/ipv4/tcp_rto_max_ms; } 2>/dev/null || true"
"""Lost packets are sent again every second, if the kernel supports it: Linux doubles the pause each time."""
FIRST = f'hostname "$0" && ip link set dev lo up && {SOON} && echo made && exec cat'
NOBODY = "02:00:00:00:00:01"  # a hardware address that no host has
CLONE_NEWNET = 0x40000000


class NoHosts(OSError):
    """Hosts cannot be created here; the message says why."""


class Host:
    """A host that is not connected yet.

    Parameters
    ----------
    name
        Its own name.
    address
        Its address for other hosts.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._maker = subprocess.Popen([*NEW, "sh", "-c", FIRST, name], text=True, **pipes)
        assert self._maker.stdout is not None
        if self._maker.stdout.readline() != "made\n":
            raise NoHosts(self._maker.communicate()[1].strip())
        [first] = psutil.Process(self._maker.pid).children()
        self._first = first.pid

    def end(self) -> None:
        """End it and everything that runs in it."""
        self._maker.communicate(timeout=HUNG_S)

    @property
    def first(self) -> int:
        """Process id of its first process, as seen by this process; or of another process, if the first one had
        ended."""
        assert self._maker.poll() is None, f"the host {self.name} has ended"
        return self._first

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to everything that runs in it except its first process, as when it is shut down or switched
        off."""
        own, here = os.readlink("/proc/self/ns/pid"), os.readlink(f"/proc/{self.first}/ns/pid")
        assert own != here, f"{self.name} is no host"
        for process in psutil.pids():
            with contextlib.suppress(OSError):  # it has ended
                if process != self.first and os.readlink(f"/proc/{process}/ns/pid") == here:
                    os.kill(process, number)

    def popen(self, command: Sequence[str | Path], *, cwd: Path | str = "/", **options: Any) -> "subprocess.Popen[Any]":
        """Start a command in it. `signal_to` ends the command; `kill` ends only the process that started it."""
        enter = ["nsenter", "--target", str(self.first), "--all", "env", "--chdir", str(cwd)]
        return subprocess.Popen([*enter, *map(str, command)], **options)

    def run(self, command: Sequence[str | Path], **options: Any) -> str:
        """Run a command in it and return its output.

        Raises
        ------
        AssertionError
            When its exit status is not 0.
        """
        process = self.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        out, err = process.communicate(timeout=HUNG_S)
        assert process.returncode == 0, f"{command} in {self.name} ended with status {process.returncode}: {err}{out}"
        return str(out)

    def ip(self, *words: str) -> None:
        """Configure its network.

        Raises
        ------
        NoHosts
            When the kernel lacks the needed features.
        """
        command = ["nsenter", "--target", str(self.first), "--net", "ip", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG_S, check=False)
        if done.returncode:
            raise NoHosts(f"{' '.join(command)}: {done.stderr.strip()}")

    @contextmanager
    def network(self) -> Iterator[None]:
        """Everything that this thread opens or starts while the block runs is in the host's network."""
        with open("/proc/thread-self/ns/net") as own, open(f"/proc/{self.first}/ns/net") as other:
            _enter(other.fileno())
            try:
                yield
            finally:
                _enter(own.fileno())


class Network:
    """Hosts on a switch, with the addresses 10.0.0.1, 10.0.0.2 and so on.

    Parameters
    ----------
    names
        Of the hosts.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.hosts: dict[str, Host] = {}
        self._cut: set[tuple[str, str]] = set()
        with contextlib.ExitStack() as stack:
            self._switch = stack.enter_context(_ended(Host("switch", "")))
            self._switch.ip("link", "add", "bridge", "up", "type", "bridge")
            for number, name in enumerate(names, 1):
                host = self.hosts[name] = stack.enter_context(_ended(Host(name, f"10.0.0.{number}")))
                peer = ["peer", "name", "eth0", "netns", str(host.first)]
                self._switch.ip("link", "add", "name", name, "master", "bridge", "up", "type", "veth", *peer)
                host.ip("address", "add", f"{host.address}/24", "dev", "eth0")
                host.ip("link", "set", "dev", "eth0", "up")
            self._stack = stack.pop_all()

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def unplug(self, name: str) -> None:
        """Pull a host's cable: nothing arrives there, and nothing arrives from there."""
        self._switch.ip("link", "set", "dev", name, "down")

    def plug(self, name: str) -> None:
        """Put it back."""
        self._switch.ip("link", "set", "dev", name, "up")

    def cut(self, sender: str, receiver: str, *, both: bool = True) -> None:
        """Drop everything that one host sends to the other, and with `both` also the opposite direction."""
        for one, other in [(sender, receiver), (receiver, sender)][: 1 + both]:
            self._cut.add((one, other))
            self[one].ip("neigh", "replace", self[other].address, "lladdr", NOBODY, "nud", "permanent", "dev", "eth0")

    def mend(self) -> None:
        """Deliver everything again."""
        while self._cut:
            one, other = self._cut.pop()
            self[one].ip("neigh", "del", self[other].address, "dev", "eth0")


def signal_to(process: "subprocess.Popen[Any]", number: signal.Signals) -> None:
    """Send a signal to a process that `Host.popen` started."""
    [command] = psutil.Process(process.pid).children()
    command.send_signal(number)


@contextmanager
def network_or_skip(*names: str) -> Iterator[Network]:
    """A network of hosts with these names. If it cannot be created, the tests are skipped with the reason."""
    try:
        network = Network(names)
    except OSError as error:  # also if the programs are missing
        reason = f"no hosts can be made here: {error}"
        assert os.environ.get("REQUIRE_HOSTS") != "1", f"REQUIRE_HOSTS=1, and {reason}"
        pytest.skip(reason)
    with network:
        yield network


@contextmanager
def _ended(host: Host) -> Iterator[Host]:
    try:
        yield host
    finally:
        host.end()


def _enter(namespace: int) -> None:
    """Move this thread into a network; `os.setns` is new in Python 3.12."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
