"""How many jobs of mine the accounting lets be queued at once (MaxSubmitJobs and its kin), and Slurm's words when that is reached."""

import os
import pwd
import re
from collections.abc import Mapping
from typing import NamedTuple

from pipeline.config.errors import UserError
from slurm.client import slurm_commands, slurm_queries, slurm_values

TIMEOUT_S = 10.0
"""A database that is slow must not hold up a submission for a number in a sentence."""

ASSOCIATION_FIELDS = ("Account", "User", "Partition", "MaxSubmitJobs", "GrpSubmitJobs", "DefaultQOS")
QOS_FIELDS = ("Name", "MaxSubmitJobsPerUser", "MaxSubmitJobsPerAccount", "GrpSubmitJobs")


class SubmitLimit(NamedTuple):
    """At most `num_jobs` jobs, waiting and running, tasks of arrays each by itself, of `whose`."""

    num_jobs: int
    kind: str
    """Assoc or QOS, as Slurm's words for a limit that is reached begin."""
    whose: str

    @property
    def in_words(self) -> str:
        return f"{self.whose} is {self.num_jobs}"


def word_of_refusal(said: str) -> str | None:
    """Slurm's word for the limit in what sbatch said when it refused a job; None if it was not for such a limit."""
    found = re.search(r"\b(?:Assoc|QOS)\w*Submit\w*Limit\b", said)
    return found[0] if found else None


def why(word: str, limits: list[SubmitLimit]) -> str:
    """The limit that Slurm's `word` means, in words and with its number where that is known."""
    fitting = [limit for limit in limits if word.startswith(limit.kind)]
    return min(fitting).in_words if fitting else f"a submit limit of your account or qos is reached ({word})"


def of_me(account: str | None = None, qos: str | None = None) -> list[SubmitLimit]:
    """The limits that hold for jobs of mine under `account` and `qos`, or the defaults; none where they aren't enforced or known."""
    try:
        settings = slurm_queries.configuration()
        if not slurm_queries.has_accounting(settings) or "limits" not in settings.get("AccountingStorageEnforce", ""):
            return []
        return _of(pwd.getpwuid(os.getuid()).pw_name, settings.get("ClusterName", ""), account, qos)
    except (UserError, KeyError):
        return []


def _of(user: str, cluster: str, account: str | None, qos: str | None) -> list[SubmitLimit]:
    if account is None:
        users = _table("user", ("User", "DefaultAccount"), user)
        account = next((row["DefaultAccount"] for row in users), "")
    where = [f"cluster={cluster}", f"account={account}"]
    associations = [row for row in _table("assoc", ASSOCIATION_FIELDS, *where) if row["User"] in ("", user) and not row["Partition"]]
    own = next((row for row in associations if row["User"]), None)
    qos = qos or (own["DefaultQOS"] if own else "") or "normal"
    found = []
    for row in associations:
        found += _limit(row["MaxSubmitJobs"], "Assoc", "your submit limit") if row["User"] else []
        found += _limit(
            row["GrpSubmitJobs"], "Assoc", "your group submit limit" if row["User"] else f"the submit limit of account {account}"
        )
    for row in _table("qos", QOS_FIELDS, qos):
        found += _limit(row["MaxSubmitJobsPerUser"], "QOS", f"your submit limit in qos {qos}")
        found += _limit(row["MaxSubmitJobsPerAccount"], "QOS", f"your account's submit limit in qos {qos}")
        found += _limit(row["GrpSubmitJobs"], "QOS", f"the submit limit of qos {qos}")
    return found


def _limit(value: str, kind: str, whose: str) -> list[SubmitLimit]:
    count = slurm_values.number(value)
    return [] if count is None else [SubmitLimit(count, kind, whose)]


def _table(of: str, fields: tuple[str, ...], *where: str) -> list[Mapping[str, str]]:
    text = slurm_commands.run("sacctmgr", "-n", "-P", "show", of, *where, f"format={','.join(fields)}", timeout_s=TIMEOUT_S)
    return [dict(zip(fields, line.split("|"), strict=True)) for line in text.splitlines() if line.count("|") == len(fields) - 1]
