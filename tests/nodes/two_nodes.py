"""Two machines inside this one: namespaces for network, processes, mounts and host name, a cable, and an sshd in each.

Nothing outside of them changes, and nothing is left of them when the process that made them ends, however it ends: the
namespaces have no names, so they go with their last process, and the kernel kills those when their maker dies.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.ranks import ROOT

HOSTS = ("node1", "node2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "eth0"  # the same name on both, so that one GLOO_SOCKET_IFNAME does for all nodes
SSH_SILENCE = 6  # seconds after which ssh gives up a connection that has gone silent: an interval of 2, three times

_PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "sshd", "ssh", "ssh-keygen", "pdsh")
_NAMESPACES = ("--net", "--pid", "--mount", "--uts")
_SBIN = "/usr/sbin:/sbin"
# A home directory's own settings of ssh come before those in /etc; sshd wants an empty directory in /run.
_BOOT = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh" /etc/ssh
mount -t tmpfs tmpfs /run
mkdir /run/sshd
home=$(getent passwd root | cut -d: -f6)
[ ! -d "$home/.ssh" ] || mount -t tmpfs tmpfs "$home/.ssh"
ip link set lo up
exec sleep infinity
"""
_SSH = f"""Host *
  IdentityFile /etc/ssh/id
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ServerAliveInterval {SSH_SILENCE // 3}
  ServerAliveCountMax 3
"""
_SSHD = """HostKey /etc/ssh/id
AuthorizedKeysFile /etc/ssh/id.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
"""


def why_not() -> str | None:
    """Return why two nodes cannot be made here, or None."""
    path = f"{os.environ['PATH']}:{_SBIN}"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"two nodes need {', '.join(missing)}: install iproute2, openssh-server and pdsh"
    if os.geteuid():
        return "two nodes need root, who may make namespaces"
    probe = ["unshare", *_NAMESPACES, "--fork", "ip", "link", "add", "left", "type", "veth", "peer", "name", "right"]
    made = subprocess.run(probe, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    return f"namespaces joined by a cable cannot be made here: {made.stderr.strip()}" if made.returncode else None


class Node:
    """One of the machines; its first process keeps the namespaces."""

    def __init__(self, number: int, directory: Path) -> None:
        self.name, self.address = HOSTS[number], ADDRESSES[number]
        command = [
            *("setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES, "--fork", "--mount-proc", "--kill-child"),
            *("sh", "-c", _BOOT, "boot", self.name, str(directory)),
        ]
        self._log = (directory / f"{self.name}.log").open("wb")
        self._outer = subprocess.Popen(
            command, env=_environment(), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        self.pid = self._first_process()

    def _first_process(self) -> int:
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        for _ in _patience(30):
            found = children.read_text().split()
            if found and Path(f"/proc/{found[0]}/cmdline").read_bytes().startswith(b"sleep\0"):
                return int(found[0])
            assert self._outer.poll() is None, f"{self.name} did not start: {Path(self._log.name).read_text()}"
        raise AssertionError(f"{self.name} did not start")

    def command(self, words: Sequence[str]) -> list[str]:
        """Return the command that runs `words` on this node, in the top directory of the project."""
        enter = ["nsenter", "--target", str(self.pid), *_NAMESPACES, "sh", "-c", 'cd "$0" && exec "$@"']
        return [*enter, str(ROOT), *words]  # entering leaves the directory of the caller

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(words), env=_environment(), capture_output=True, text=True)

    def start_sshd(self) -> None:
        sshd = shutil.which("sshd", path=_environment()["PATH"])  # it starts itself again, and wants a full path
        done = self.run(str(sshd), "-o", f"ListenAddress={self.address}", "-E", f"{self._log.name}")
        assert done.returncode == 0, done.stderr

    def plug(self, *, connected: bool) -> None:
        """Plug the cable in, or pull it out."""
        assert self.run("ip", "link", "set", CABLE, "up" if connected else "down").returncode == 0

    def running(self, words: str) -> int:
        """Return how many processes of this node have `words` in their command line."""
        mine, count = os.readlink(f"/proc/{self.pid}/ns/pid"), 0
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may end while it is looked at
                if os.readlink(process / "ns/pid") == mine:
                    count += words.encode() in (process / "cmdline").read_bytes().replace(b"\0", b" ")
        return count

    def remove(self) -> None:
        self._outer.kill()  # with it goes the first process, and with that all others
        self._outer.wait()
        self._log.close()


def _environment() -> dict[str, str]:
    return os.environ | {"PATH": f"{os.environ['PATH']}:{_SBIN}"}


def _patience(seconds: float) -> Iterator[None]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(0.05)


def _write_etc(directory: Path, alias: str) -> None:
    names = f"127.0.0.1 localhost\n{ADDRESSES[0]} {HOSTS[0]} {alias}\n{ADDRESSES[1]} {HOSTS[1]}\n"
    (directory / "hosts").write_text(names)
    (directory / "ssh").mkdir()
    (directory / "ssh" / "ssh_config").write_text(_SSH)
    (directory / "ssh" / "sshd_config").write_text(_SSHD)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / "ssh" / "id")], check=True)


@contextlib.contextmanager
def two_nodes(directory: Path, alias: str) -> Iterator[tuple[Node, Node]]:
    """Make two nodes that reach each other by cable and ssh, with their settings in an empty directory.

    `alias` is one more name of the first one.
    """
    _write_etc(directory, alias)
    with contextlib.ExitStack() as stack:
        first, second = nodes = [Node(number, directory) for number in range(2)]
        for node in nodes:
            stack.callback(node.remove)
        cable = ["ip", "link", "add", CABLE, "netns", str(first.pid), "type", "veth"]
        subprocess.run([*cable, "peer", "name", CABLE, "netns", str(second.pid)], env=_environment(), check=True)
        for node in nodes:
            assert node.run("ip", "addr", "add", f"{node.address}/24", "dev", CABLE).returncode == 0
            node.plug(connected=True)
            node.start_sshd()
        for node in nodes:
            answers = (first.run("ssh", node.name, "hostname").stdout.strip() for _ in _patience(20))
            assert node.name in answers, f"{first.name} does not reach {node.name} by ssh"
        yield first, second
