"""Tries to enter and to read a private cluster as another user, and from another address; `python tests/closed_doors.py` prints the table.

Run by root, the intruder is the user nobody, who knows all that the owner could have told him: the text of slurm.conf, the ports, the
paths. Otherwise he has the owner's uid, and neither the owner's key nor a way to its munge: the attempts to read are left out then.
"""

import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from slurm.cluster import layout, packages
from slurm.cluster.daemons import PrivateCluster

COMMANDS = {
    "squeue": ("squeue",),
    "sbatch": ("sbatch", "-o", "/dev/null", "--wrap", "true"),
    "scancel": ("scancel", "--signal=KILL", "{job}"),
    "scontrol": ("scontrol", "update", "nodename=n1", "state=down", "reason=intruder"),
    "srun": ("srun", "--immediate=3", "true"),
}
PATIENCE_S = 20.0


class Attempt(NamedTuple):
    """One attempt and what came of it."""

    what: str
    by: str
    succeeded: bool
    outcome: str


class Intruder(NamedTuple):
    """Who tries, from a directory of his own; `uid` None: the owner's own, without the owner's key."""

    uid: int | None
    name: str
    directory: Path

    @property
    def identity(self) -> dict[str, Any]:
        """How a process of his is started."""
        return {} if self.uid is None else {"user": self.uid, "group": self.uid, "extra_groups": []}

    def call(self, *command: str, configuration: Path) -> tuple[bool, str]:
        """Whether the command succeeded, and the last line that it printed."""
        variables = {"PATH": os.defpath + ":/usr/sbin", "SLURM_CONF": str(configuration), "HOME": str(self.directory)}
        try:
            done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=PATIENCE_S, cwd="/", **self.identity)
        except subprocess.TimeoutExpired:
            return False, f"no answer within {PATIENCE_S:g} s"
        said = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()
        return done.returncode == 0, re.sub(r"^[a-z]+: (error: )?", "", said[-1])


@contextmanager
def intruder() -> Iterator[Intruder]:
    """The user nobody where root tries, else this user without the owner's key."""
    uid, name = (pwd.getpwnam("nobody").pw_uid, "nobody") if os.getuid() == 0 else (None, "a process without the key")
    directory = Path(tempfile.mkdtemp(prefix="intruder-", dir="/tmp"))
    if uid is not None:
        os.chown(directory, uid, uid)
    try:
        yield Intruder(uid, name, directory)
    finally:
        shutil.rmtree(directory)


def attempts_to_enter(cluster: PrivateCluster, job: str) -> list[Attempt]:
    """Every command, under every configuration that an intruder could write, and the bare ports. `job` runs meanwhile."""
    with intruder() as who, _munged(who) as munge_socket, ThreadPoolExecutor(8) as pool:  # a refused command tries for some seconds
        pending = [
            (f"{name}, {means}", pool.submit(who.call, *(word.format(job=job) for word in command), configuration=configuration))
            for means, configuration in _configurations(cluster, who, munge_socket)
            for name, command in COMMANDS.items()
        ]
        found = [Attempt(what, who.name, *answer.result()) for what, answer in pending]
    return found + [_connection(address, name, port) for address in other_addresses() for name, port in ports(cluster).items()]


def attempts_to_read(cluster: PrivateCluster) -> list[Attempt]:
    """Every file of the cluster, by its full path, and munge's socket."""
    found = []
    with intruder() as who:
        paths = [cluster.directory, *sorted(path for path in cluster.directory.rglob("*") if not path.is_dir() and "dev" not in path.parts)]
        for path in paths:
            command = ("ls", "-A", str(path)) if path.is_dir() else ("head", "-c", "1", str(path))
            succeeded, outcome = who.call(*command, configuration=Path("/"))
            found.append(Attempt(f"read {path.relative_to(cluster.directory.parent)}", who.name, succeeded, outcome.rpartition(": ")[2]))
        command = ("munge", "-n", f"--socket={cluster.directory}/run/munge.sock")
        found.append(Attempt("ask the owner's munge for a credential", who.name, *who.call(*command, configuration=Path("/"))))
    return found


def _configurations(cluster: PrivateCluster, who: Intruder, munge_socket: Path) -> Iterator[tuple[str, Path]]:
    """What the intruder may set SLURM_CONF to: how he means to be let in, and the file."""
    text = cluster.configuration.read_text()
    if who.uid is not None:
        yield "with the owner's slurm.conf copied", _write(who.directory / "copied.conf", text)
    unproved = re.sub(r"=(auth|cred)/munge", r"=\1/none", re.sub(r"(?m)^AuthInfo=.*\n", "", text))
    yield "by his word alone (auth/none)", _write(who.directory / "none.conf", unproved)
    own = re.sub(r"(?m)^AuthInfo=socket=[^,]*", f"AuthInfo=socket={munge_socket}", text)
    yield "with a munge of his own", _write(who.directory / "munge.conf", own)


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o644)
    return path


@contextmanager
def _munged(who: Intruder) -> Iterator[Path]:
    """A munged of the intruder's own, with a key of his own."""
    d, key = who.directory, who.directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    if who.uid is not None:
        os.chown(key, who.uid, who.uid)
    files = [f"--{name}-file={d}/munge.{name}" for name in ("key", "pid", "seed", "log")]
    command = [packages.path("munged"), "--foreground", "--force", f"--socket={d}/munge.sock", *files]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **who.identity) as munged:
        try:
            while not (d / "munge.sock").exists():
                assert munged.poll() is None, "the intruder's munged did not start"
            yield d / "munge.sock"
        finally:
            munged.terminate()


def ports(cluster: PrivateCluster) -> dict[str, int]:
    """The ports that the cluster's daemons were given."""
    text = cluster.configuration.read_text()
    found = {"slurmctld": int(re.search(r"(?m)^SlurmctldPort=(\d+)", text)[1])}
    return found | {f"slurmd of {name}": int(port) for name, port in re.findall(r"(?m)^NodeName=(\S+) .* Port=(\d+)", text)}


def listening(pids: list[int]) -> list[str]:
    """`address:port` of every TCP socket on which one of the processes listens."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if match := re.match(r"socket:\[(\d+)\]", os.readlink(link)):
                inodes.add(match[1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                octets = bytes.fromhex(address)[::-1]
                found.append(f"{'.'.join(map(str, octets)) if table == 'tcp' else address}:{int(port, 16)}")
    return found


def other_addresses() -> list[str]:
    """This machine's addresses outside the loopback: what another machine would connect to."""
    words = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split()
    return [word for word in words if "." in word and not word.startswith("127.")]


def _connection(address: str, name: str, port: int) -> Attempt:
    with socket.socket() as probe:
        probe.settimeout(PATIENCE_S)
        error = probe.connect_ex((address, port))
    return Attempt(f"connect to {name}", f"from {address}", error == 0, os.strerror(error) if error else "connected")


def table(attempts: list[Attempt]) -> str:
    """The attempts as a table in Markdown."""
    rows = [f"| {a.what} | {a.by} | {'ENTERED' if a.succeeded else 'refused'}: {a.outcome} |" for a in attempts]
    return "\n".join(["| attempt | by | outcome |", "|---|---|---|", *rows])


def sleeping_job(cluster: PrivateCluster, wait: Callable[[Callable[[], bool], str], None]) -> str:
    """The id of a job that runs a step, for as long as the attempts may take."""
    out = cluster.directory / "job.out"
    job = cluster.command("sbatch", "--parsable", "-o", str(out), "--wrap", "srun sh -c 'echo secret; sleep 600'").strip()
    wait(lambda: out.exists() and "secret" in out.read_text(), "the job's step")
    return job


def main() -> None:
    """Starts a cluster, tries everything, prints the table."""
    from waiting import wait_until

    place = Path(tempfile.mkdtemp(prefix="private-slurm-", dir="/tmp"))
    place.chmod(0o755)  # what keeps others out is to be the cluster's own directory
    cluster = PrivateCluster(place / "cluster")
    try:
        cluster.start(layout.pretended())
        found = attempts_to_enter(cluster, sleeping_job(cluster, wait_until))
        print(table([*found, *(attempts_to_read(cluster) if os.getuid() == 0 else [])]))
    finally:
        cluster.remove()
        place.rmdir()


if __name__ == "__main__":
    main()
