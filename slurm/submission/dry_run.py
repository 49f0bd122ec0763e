"""What would be queued, looked at before it is: a summary of each run, what differs from the last one of its name, its sbatch script.

And what would be queued again of a run that is resumed: which tasks, with which resources, by which script.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slurm.client import submit_limits
from slurm.client.slurm_values import ranges
from slurm.execution import slurm_job
from slurm.record.comparison import compare_runs, phrases
from slurm.record.run_directory import RunDirectory, list_runs
from slurm.record.run_reference import Named
from slurm.record.text_table import number_of
from slurm.submission.freezing import Planned, outputs_of
from slurm.submission.mixing_memory import mixing_memory

Row = dict[str, Any]


def describe(planned: Sequence[Planned], runs: Path, *, against: Named | None = None) -> list[Row]:
    """A row for each frozen or skipped configuration, as JSON values.

    against : compare with this run instead of the last one of the same name.
    """
    own = [item.run for item in planned if item.run is not None]
    return [_describe(item, own, runs, against) for item in planned]


def _describe(item: Planned, own: Sequence[RunDirectory], runs: Path, against: Named | None) -> Row:
    if item.run is None:
        return {"stage": item.config.stage, "name": item.config.name, "skipped": item.skipped}
    job, is_slurm = item.run.job(), item.run.job()["executor"] == "slurm"
    earlier = [run for run in list_runs(runs, job["stage"], job["name"]) if run not in own]
    before = against or (Named(earlier[-1]) if earlier else None)
    differences = compare_runs(before, Named(item.run)) | {"results": [], "speed": []} if before is not None else {}  # it has none yet
    return {
        "stage": job["stage"],
        "name": job["name"],
        "executor": job["executor"],
        "tasks": job["num_tasks"],
        "resources": job["resources"],
        "submit_limit": _limit(job) if is_slurm else None,
        "memory": mixing_memory(item.config),
        "waits_for": [_short(RunDirectory(Path(path)), own) for path in job["after"]],
        "outputs": [str(path) for path in outputs_of(item.run)] or [str(item.run.path.parent)],
        "compared_with": before.reference if before is not None else None,
        "differences": {place: rows for place, rows in differences.items() if rows},
        "sbatch": slurm_job.submission_text(item.run) if is_slurm else None,
    }


def describe_again(run: RunDirectory, tasks: Sequence[int], behind: Sequence[RunDirectory]) -> Row:
    """The row of a run of which `tasks` would be queued again, as JSON values; `behind` needs it and is to be resumed after it."""
    job, is_slurm = run.job(), run.job()["executor"] == "slurm"
    return {
        "stage": job["stage"],
        "name": job["name"],
        "run": str(run.path),
        "executor": job["executor"],
        "tasks": list(tasks),
        "num_tasks": job["num_tasks"],
        "ended": _endings(run, tasks),
        "resources": job["resources"],
        "waits_for": [parent.reference for parent in map(RunDirectory, map(Path, job["after"])) if parent.state() != "finished"],
        "sbatch": slurm_job.submission_text(run) if is_slurm else None,
        "resume_next": [other.reference for other in behind],
    }


def again_as_lines(row: Row) -> list[str]:
    """The same for a terminal."""
    reference, tasks = RunDirectory(Path(row["run"])).reference, row["tasks"]
    which = f"task{'s' if len(tasks) > 1 else ''} {ranges(tasks)} of {row['num_tasks']}" if row["num_tasks"] > 1 else "it"
    waits = f"; waits for {', '.join(row['waits_for'])}" if row["waits_for"] else ""
    lines = [f"{reference}: {which} would go on: {_asked(row | {'tasks': len(tasks)})}{waits}"]
    for ending in row["ended"]:
        of = f"task{'s' if len(ending['tasks']) > 1 else ''} {ranges(ending['tasks'])} " if row["num_tasks"] > 1 else "it "
        lines.append(f"  {of}{ending['status']} before" + (f": {ending['error']}" if ending["error"] else ""))
    lines += resume_next(row)
    return lines + (["", f"the sbatch script of {_name(row)}:", row["sbatch"].rstrip()] if row["sbatch"] is not None else [])


def _endings(run: RunDirectory, tasks: Sequence[int]) -> list[Row]:
    """How `tasks` ended the last time, those that ended alike in one row: status, the error's first line, tasks."""
    alike: dict[tuple[str, str], list[int]] = {}
    for task in tasks:
        if (result := run.result(task)) is not None:
            first = (str(result.get("error") or "").splitlines() or [""])[0]
            alike.setdefault((result["status"], first), []).append(task)
    return [{"status": status, "error": error, "tasks": ended} for (status, error), ended in alike.items()]


def resume_next(row: Row) -> list[str]:
    """What to resume after the run of the row, in that order; nothing where nothing waits for it."""
    commands = [f"  crosscoder submit --resume {reference}" for reference in row["resume_next"]]
    return ["what needs it did not run; resume that too, in this order:", *commands] if commands else []


def _limit(job: Row) -> str | None:
    limits = submit_limits.of_me(job["resources"]["account"], job["resources"]["qos"])
    return min(limits).in_words if limits and min(limits).num_jobs < job["num_tasks"] else None


def _short(run: RunDirectory, own: Sequence[RunDirectory]) -> str:
    """A run of the same chain has no id that anybody will meet again: stage/name says it."""
    return run.reference.rpartition("/")[0] if run in own else run.reference


def as_lines(rows: Sequence[Row]) -> list[str]:
    """All summaries first, then what differs, then the scripts."""
    queued = [row for row in rows if "skipped" not in row]
    scripts = [row for row in queued if row["sbatch"] is not None]
    lines = [line for row in rows for line in _summary(row)]
    lines += [line for row in queued for line in ["", *_differences(row)]]
    return lines + [line for row in scripts for line in ["", f"the sbatch script of {_name(row)}:", row["sbatch"].rstrip()]]


def _name(row: Row) -> str:
    return f"{row['stage']}/{row['name']}"


def _summary(row: Row) -> list[str]:
    if "skipped" in row:
        return [f"{_name(row)}: would be skipped; {row['skipped']}"]
    waits = f"; waits for {', '.join(row['waits_for'])}" if row["waits_for"] else ""
    line = f"{_name(row)}: {_asked(row)}{waits}; writes {', '.join(row['outputs'])}"
    limit = f"{row['submit_limit']}: what doesn't fit is queued as earlier jobs end" if row["submit_limit"] is not None else None
    return [line, *(f"  {also}" for also in (limit, row["memory"]) if also is not None)]


def _asked(row: Row) -> str:
    """`8 tasks, 4 at once, in Slurm (partition gpu), 30 minutes, 2 cores, 4 GB, 1 h200 GPU each`."""
    asked, tasks = row["resources"], row["tasks"]
    at_once = f", {asked['max_parallel']} at once" if asked["max_parallel"] and tasks > 1 else ""
    where = f"in Slurm ({_partition(asked)})" if row["executor"] == "slurm" else f"executor {row['executor']}"
    parts = [f"{number_of(tasks, 'task')}{at_once}, {where}", number_of(asked["timeout_min"], "minute")]
    parts += [number_of(asked["nodes"], "node")] if asked["nodes"] > 1 else []
    parts += [number_of(asked["tasks_per_node"], "process", "processes")] if asked["tasks_per_node"] > 1 else []
    parts.append(number_of(asked["cpus"], "core"))
    parts += [f"{asked['mem_gb']:g} GB"] if asked["mem_gb"] else []
    parts.append(number_of(asked["gpus"], f"{asked['gpu_type']} GPU" if asked["gpu_type"] else "GPU") if asked["gpus"] else "no GPU")
    return ", ".join(parts) + (" each" if tasks > 1 else "")


def _partition(asked: Row) -> str:
    chosen = [f"{key} {asked[key]}" for key in ("partition", "node", "account", "qos", "constraint") if asked[key]]
    return ", ".join(chosen if asked["partition"] else ["the default partition", *chosen])


def _differences(row: Row) -> list[str]:
    if row["compared_with"] is None:
        return [f"{_name(row)} is the first run of this name"]
    places = {place: [] for place in ("config", "code", "environment", "inputs", "results", "speed")} | row["differences"]
    return [f"{_name(row)} differs from {row['compared_with']} in:", *(f"  {line}" for line in phrases(places) or ["nothing"])]
