"""Starting and stopping a private cluster in a directory of its own.

    .cluster/
      slurm.conf  gres.conf  cgroup.conf  slurmdbd.conf
                                               written at each start; `export SLURM_CONF=.../slurm.conf` reaches the cluster
      run/pids.json                            the daemons: name to pid
      state/                                   the queue: it outlives a stop, or a reboot, unless the next start is fresh
      log/  spool/  dev/  sql/                 daemons' logs, job scripts, device links, the accounting database

Who can connect to munge's socket, or read its key, is let in, and slurmd runs every job as its own user: so the directory is
closed to all but its owner (0700), and the key is a new one at each start.

Order matters. The controller comes before the nodes: a slurmd that finds none backs off for a second. It also goes before
them, and the jobs' processes are ended one by one: they outlive their slurmd.
"""

import os
import random
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from pipeline.config.errors import UserError
from slurm.client import processes, slurm_commands
from slurm.cluster import accounting, configuration, hardware, packages
from slurm.cluster.configuration import Place
from slurm.cluster.layout import Layout

MAX_DIRECTORY_LENGTH = 85
"""A unix socket's path ends at 107 bytes, `run/munge.sock` and its lock file included."""

# Below the kernel's ephemeral range (from 32768), where any outgoing connection may hold a port.
PORTS = range(10_000, 32_000)
PORT_TAKEN = "Address already in use"
"""How a daemon's log says that."""
READY_STATES = {"idle", "mixed", "allocated", "completing", "planned"}


class PrivateCluster:
    """The cluster in `directory`, running or not; its state is on disk, so any process may start, ask and stop it."""

    def __init__(self, directory: Path) -> None:
        # Without `..`, which would count towards the length of socket paths; a link at the end stays, since its owner is looked at.
        self.directory = directory.parent.resolve() / directory.name
        self.configuration = self.directory / "slurm.conf"
        self.variables = {**slurm_commands.environment(), "SLURM_CONF": str(self.configuration)}

    # -- asking ---------------------------------------------------------------------------------------------------

    def pids(self) -> dict[str, int]:
        """Name to pid of the daemons that live now; what a reboot or a crash left in the record is not among them."""
        recorded = processes.read_pids(self.directory)
        return {name: pid for name, pid in recorded.items() if processes.belongs_to(pid, self.configuration)}

    def is_running(self) -> bool:
        return "slurmctld" in self.pids()

    def command(self, *command: str, timeout_s: float = slurm_commands.TIMEOUT_S) -> str:
        """What a command of Slurm, or any other, prints in this cluster's environment."""
        return slurm_commands.run(*command, variables=self.variables, timeout_s=timeout_s)

    # -- starting -------------------------------------------------------------------------------------------------

    def start(self, layout: Layout, *, fresh: bool = False) -> float:
        """Brings the cluster from nothing to nodes that take jobs, and gives the seconds it took.

        A queue that an earlier cluster in this directory left goes on, unless `fresh`. Raises `UserError` when packages are
        missing, when the cluster is up already, and, with the ends of the daemons' logs, when it does not come up.
        """
        began = time.monotonic()
        packages.require(accounting=layout.accounting)
        self._check_startable()
        processes.signal_all(processes.of_jobs(self.configuration))  # a controller that died left its jobs behind
        if fresh:
            shutil.rmtree(self.directory / "state", ignore_errors=True)
        for is_last in (False, False, True):
            try:
                self._write_files(layout)
                self._start_daemons(layout)
                break
            except BaseException as error:
                self.stop()
                # Between the choice of a port and its daemon's start another process may take it: then with other ports.
                if is_last or not (isinstance(error, UserError) and PORT_TAKEN in str(error)):
                    raise
        return time.monotonic() - began

    def _check_startable(self) -> None:
        if alive := self.pids():
            raise UserError(f"{self.directory} is already up ({', '.join(alive)}); `crosscoder cluster stop` ends it")
        if len(str(self.directory)) > MAX_DIRECTORY_LENGTH:
            raise UserError(
                f"{self.directory} is {len(str(self.directory))} characters long, but unix sockets in it allow {MAX_DIRECTORY_LENGTH}; "
                "choose another directory, for example with --directory ~/cluster"
            )
        for path in (self.directory, self.directory.resolve()):
            if os.path.lexists(path) and (owner := path.lstat().st_uid) != os.getuid():
                raise UserError(f"{path} is of another user (uid {owner}), who could put a configuration there; choose another")

    def _write_files(self, layout: Layout) -> None:
        d = self.directory
        d.mkdir(parents=True, exist_ok=True)
        d.chmod(0o700)
        for name in ("state", "log", "run", "dev", *(f"spool/{node.name}" for node in layout.nodes)):
            (d / name).mkdir(parents=True, exist_ok=True)
        place = Place(
            d,
            hardware.host_name(),
            hardware.user_name(),
            tuple(free_ports(2 + len(layout.nodes))),
            hardware.address_of_name() == configuration.ADDRESS,
        )
        # In tenths of a second, so that clusters started one after another don't share ids.
        first_job_id = 1000 + int(time.time() * 10) % 60_000_000
        self.configuration.write_text(configuration.slurm_conf(layout, place, first_job_id), encoding="utf-8")
        if layout.accounting:  # the database gives the cluster its number; a state that was without one has made up another
            (d / "state" / "clustername").unlink(missing_ok=True)
        (d / "cgroup.conf").write_text(configuration.cgroup_conf(packages.version()))
        (d / "gres.conf").write_text(configuration.gres_conf(layout, self._devices(layout)), encoding="utf-8")
        self.place = place

    def _devices(self, layout: Layout) -> dict[str, tuple[str, ...]]:
        devices = {}
        for node in layout.nodes:
            paths = []
            for index, gpu in enumerate(node.gpus):
                link = self.directory / "dev" / f"gpu{index}"
                if gpu.device is None and not link.is_symlink():
                    link.symlink_to("/dev/null")
                paths.append(gpu.device or str(link))
            devices[node.name] = tuple(paths)
        return devices

    def _start_daemons(self, layout: Layout) -> None:
        processes.pids_file(self.directory).unlink(missing_ok=True)
        self._start_munge()
        if layout.accounting:
            accounting.start(self, layout)
        self.spawn("slurmctld", packages.path("slurmctld"), "-D")
        self.wait_until("the controller", lambda: "is UP" in self._ask("scontrol", "ping"))
        cut_off = self._ask("squeue", "-h", "-t", "running,completing,suspended,stopped", "-o", "%A").split()
        for node in layout.nodes:
            self.start_node(node.name)
        self.wait_until("nodes that take jobs", self._nodes_are_ready)
        self._requeue(cut_off)

    def start_node(self, node: str) -> None:
        self.spawn(f"slurmd-{node}", packages.path("slurmd"), "-D", "-N", node)

    def _nodes_are_ready(self) -> bool:
        states = self._ask("sinfo", "-h", "-N", "-o", "%T").split()
        return bool(states) and set(states) <= READY_STATES

    def _requeue(self, cut_off: list[str]) -> None:
        """Requeues the jobs that the last stop, or a reboot, cut off; Slurm misses only those that had run for 20 s."""
        for job in cut_off:
            try:
                self.command("scontrol", "requeue", job)
            except slurm_commands.CommandFailed:  # one that forbids it (--no-requeue)
                self._ask("scancel", job)

    def _start_munge(self) -> None:
        d, socket_path = self.directory, self.place.munge_socket
        key = d / "run" / "munge.key"
        key.unlink(missing_ok=True)
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        socket_path.unlink(missing_ok=True)  # of before a crash: its file alone would be taken for a munged that answers
        files = [f"--{name}-file={d}/run/munge.{name}" for name in ("key", "pid", "seed")]
        options = [f"--socket={socket_path}", *files, f"--log-file={d}/log/munged.log", "--num-threads=4"]
        # Forced: it would refuse a socket that not everybody can reach, and this one is for one user alone.
        self.spawn("munged", packages.path("munged"), "--foreground", "--force", *options)
        self.wait_until("munge's socket", socket_path.exists)

    # -- daemons, for the parts of this package -------------------------------------------------------------------

    def spawn(self, name: str, *command: str, variables: Mapping[str, str] = MappingProxyType({})) -> None:
        """Starts a daemon, with `variables` besides, and records its pid."""
        pid = processes.start(list(command), log=self.directory / "log" / f"{name}.out", variables={**self.variables, **variables})
        processes.write_pids(self.directory, {**processes.read_pids(self.directory), name: pid})

    def wait_until(self, what: str, holds: Callable[[], bool], patience_s: float = 30.0) -> None:
        """Waits until `holds()`. Raises `UserError` with the ends of the daemons' logs past `patience_s`, or when one has died."""
        deadline = time.monotonic() + patience_s
        while not holds():
            dead = set(processes.read_pids(self.directory)) - set(self.pids())
            if dead or time.monotonic() > deadline:
                cause = f"{', '.join(sorted(dead))} died" if dead else f"waited {patience_s:g} s for {what}"
                raise UserError(f"the private cluster did not come up ({cause}); the ends of its logs:\n{self._log_ends()}")
            time.sleep(processes.POLL_SECONDS)

    def _ask(self, *command: str) -> str:
        """As `command`, but an error is the answer "" : the daemons are still coming up."""
        try:
            return self.command(*command)
        except slurm_commands.CommandFailed:
            return ""

    def _log_ends(self) -> str:
        logs = sorted(path for path in (self.directory / "log").iterdir() if path.stat().st_size)
        return "\n".join(f"{path.name}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-6:]) for path in logs)

    # -- stopping -------------------------------------------------------------------------------------------------

    def stop(self) -> float:
        """Ends every process of the cluster, jobs first, and gives the seconds it took. Does nothing where none runs.

        The queue stays on disk: waiting jobs wait on, running ones are requeued at the next start.
        """
        began = time.monotonic()
        pids = self.pids()
        nodes = [pid for name, pid in pids.items() if name.startswith("slurmd-")]
        # The controller first: it would hear of jobs that fail as they are killed, and fail them.
        self._end(pids, "slurmctld")
        processes.signal_all(processes.of_jobs(self.configuration))
        processes.end(nodes, self.configuration, patience_s=5)
        processes.signal_all(processes.of_jobs(self.configuration))  # what a slurmd was just launching
        for name in ("slurmdbd", "mariadbd", "munged"):
            self._end(pids, name)
        processes.pids_file(self.directory).unlink(missing_ok=True)
        return time.monotonic() - began

    def _end(self, pids: dict[str, int], name: str) -> None:
        processes.end([pids[name]] if name in pids else [], self.configuration, patience_s=20)

    def remove(self) -> None:
        """Stops the cluster and deletes its directory: deleted while up, its daemons would run on without anyone knowing."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Different TCP ports of 127.0.0.1 that nobody holds now; drawn at random, so that two starters rarely meet."""
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, 100 + count):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                continue
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise UserError(f"fewer than {count} of a hundred TCP ports from {PORTS.start} to {PORTS.stop} are free on this machine")
