"""Reads what each feature did between the snapshots of a training run (the format is in `pipeline.crosscoder.history`).

Shapes: F features, L layers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import records
from pipeline.config.errors import UserError
from slurm.record.run_reference import find

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHARD_FORMAT = "snapshot-features/1"
HOW_TO_KEEP = "train with checkpoints.history.kind=log_spaced, or every_tokens with checkpoints.history.tokens=N"


class Snapshot(NamedTuple):
    """Of one snapshot: its record, and what the features did in the window of training steps since the one before."""

    step: int
    tokens: int
    window_tokens: int
    """Training tokens of the window; all counts are of these."""
    facts: records.Record
    """What else the record says: `norm_ratio_by_layer`, `measured_on` and the like."""
    firings_F: "NDArray[Any]"
    activation_sum_F: "NDArray[Any]"
    tokens_since_fired_F: "NDArray[Any]"
    decoder_norms_FL: "NDArray[Any]"


def find_history(reference: str, runs: Path) -> tuple[str, list[Snapshot]]:
    """The name of a run of `train` (or of a task of a sweep over it) and its snapshots so far, oldest first.

    Raises `UserError` for a run of another stage, one that keeps no snapshots and one that has none yet.
    """
    run, task = find(reference, runs)
    named = run.reference if task is None else f"{run.reference}/tasks/{task}"
    directory = run.task_directory(task or 0) if task is not None or run.num_tasks == 1 else run.path
    if run.stage not in ("train", "sweep"):
        raise UserError(f"{named} is a run of {run.stage}; evolution shows runs of train: name one, or a task of a sweep over it")
    if run.stage == "sweep" and task is None:
        raise UserError(f"{named} is a sweep; evolution shows one of its tasks: name {named}/tasks/0 or another")
    paths = sorted(path.parent for path in (directory / "history").glob(f"[0-9]*/{records.MANIFEST}"))
    if not paths:
        kept = (run if task is None else run.record_of_task(task)).config_values().get("checkpoints", {}).get("history", {}).get("kind")
        if kept in (None, "none"):
            raise UserError(f"{named} keeps no snapshots; {HOW_TO_KEEP}")
        raise UserError(f"{named} has no snapshot yet; `crosscoder jobs` shows how it goes")
    return named, [read(path) for path in paths]


def read(path: Path) -> Snapshot:
    """The snapshot in the directory `path`, its record and sizes checked; `UserError` names what is wrong."""
    import safetensors.numpy  # here: with numpy it takes a tenth of a second, which other commands do without

    facts = records.read_shard(path, "features", SHARD_FORMAT)
    try:
        tensors = safetensors.numpy.load_file(path / "features.safetensors")
    except safetensors.SafetensorError as error:
        raise UserError(f"{path / 'features.safetensors'} can't be read: the file is damaged ({error})") from None
    names = ("firings", "activation_sum", "tokens_since_fired", "decoder_norms")
    return Snapshot(facts["step"], facts["tokens"], facts["window_tokens"], facts, *(tensors[name] for name in names))


def check_features(wanted: Sequence[int], snapshots: Sequence[Snapshot]) -> None:
    """Raises `UserError` for a feature that there is not."""
    num_features = len(snapshots[-1].firings_F)
    for feature in wanted:
        if not 0 <= feature < num_features:
            raise UserError(f"feature {feature}: this crosscoder has features 0 to {num_features - 1:,}")
