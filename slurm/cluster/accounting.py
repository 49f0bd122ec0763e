"""The accounting database of a private cluster: a MariaDB of its own, without a port, and a slurmdbd, both unprivileged."""

import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from slurm.client import slurm_commands
from slurm.cluster import configuration, hardware, packages
from slurm.cluster.configuration import CLUSTER_NAME, Place
from slurm.cluster.layout import Layout

PATIENCE_S = 60.0


class Daemons(Protocol):
    """What of a private cluster its database needs; see `slurm.cluster.daemons.PrivateCluster`."""

    directory: Path
    place: Place

    def command(self, *command: str, timeout_s: float = ...) -> str: ...

    def spawn(self, name: str, *command: str, variables: Mapping[str, str] = ...) -> None: ...

    def wait_until(self, what: str, holds: Callable[[], bool], patience_s: float = ...) -> None: ...


def start(cluster: Daemons, layout: Layout) -> None:
    """Starts both and makes the cluster known to them. The database stays between starts."""
    directory, port = cluster.directory, cluster.place.slurmdbd_port
    _start_database(cluster)
    path = directory / "slurmdbd.conf"
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)  # slurmdbd refuses a file that others may read
    path.write_text(configuration.slurmdbd_conf(layout, cluster.place), encoding="utf-8")
    cluster.spawn("slurmdbd", packages.path("slurmdbd"), "-D", variables={"MYSQL_UNIX_PORT": str(cluster.place.database_socket)})
    cluster.wait_until("slurmdbd", lambda: _answers(port), PATIENCE_S)
    known = cluster.command("sacctmgr", "-n", "-P", "list", "cluster", "format=cluster").split()
    if CLUSTER_NAME not in known:
        cluster.command("sacctmgr", "-i", "add", "cluster", CLUSTER_NAME)


def _start_database(cluster: Daemons) -> None:
    directory, user = cluster.directory, hardware.user_name()
    data, socket_path = directory / "sql", cluster.place.database_socket
    if not data.exists():
        _install_database(cluster, data, user)
    options = [
        f"--user={user}",
        f"--datadir={data}",
        f"--socket={socket_path}",
        f"--pid-file={directory}/run/sql.pid",
        "--skip-networking",
        "--innodb-buffer-pool-size=64M",
        "--innodb-lock-wait-timeout=900",  # slurmdbd's own advice
        "--skip-log-bin",
    ]
    cluster.spawn("mariadbd", packages.path("mariadbd"), "--no-defaults", *options)

    def query(text: str) -> str:
        return cluster.command("mariadb", "--no-defaults", "-u", "root", f"--socket={socket_path}", "-e", text)

    def answers() -> bool:
        try:
            query("select 1")
        except slurm_commands.CommandFailed:
            return False
        return True

    cluster.wait_until("MariaDB", answers, PATIENCE_S)
    name, database = configuration.DATABASE_USER, configuration.DATABASE
    query(f"create database if not exists {database}")
    # No password: the socket lies in a directory that only the owner can enter.
    query(f"create or replace user '{name}'@'localhost'; grant all on {database}.* to '{name}'@'localhost'")


def _install_database(cluster: Daemons, data: Path, user: str) -> None:
    options = [f"--user={user}", f"--datadir={data}", "--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
    try:
        cluster.command("mariadb-install-db", "--no-defaults", *options, timeout_s=120)
    except BaseException:
        shutil.rmtree(data, ignore_errors=True)  # half a database would be taken for a whole one next time
        raise


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((configuration.ADDRESS, port)) == 0
