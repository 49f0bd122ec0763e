"""A small checkout of the project with one more stage, `toy`, that counts to a number: for tests of submission.

The stage is torch-free, so a job of it takes as long as Python's start. It writes a data set if `output` is given, reads
one if `data` is, hashes a model's files if `language_model` is, and resumes from `state.json`. After its second step it stays as long
as the file `hold` exists: a test that does something to a run at work need not be quicker than it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

CONFIG = '''
"""Configuration of the toy stage."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.schema import OPERATIONAL, Count, DataPath
from pipeline.config.stage import StageConfig


class ToyConfig(StageConfig):
    MOST_GPUS: ClassVar[int] = 8
    IS_DISTRIBUTED: ClassVar[bool] = True
    IS_DIVISIBLE: ClassVar[bool] = True
    stage: Literal["toy"] = "toy"
    steps: Count = 3
    step_seconds: float = 0.0
    fail_at: Count | None = None
    crash_at: Count | None = None
    data: DataPath | None = None
    source: DataPath | None = None
    hold: Annotated[DataPath | None, Field(json_schema_extra=OPERATIONAL)] = None
    language_model: LanguageModelConfig | None = None
    output: Annotated[DataPath | None, Field(json_schema_extra=OPERATIONAL)] = None

    def inputs(self) -> dict[str, Path]:
        return {key: path for key, path in (("data", self.data), ("source", self.source)) if path is not None}

    def outputs(self) -> dict[str, Path]:
        return {} if self.output is None else {"output": self.output}
'''

PROGRAM = '''
"""Counts to `steps`."""

import os
import time

from pipeline import model_files, records
from pipeline.config.errors import UserError

GREETING = "hello"


def run(config, run):
    state = run.directory / "state.json"
    first = records.read_json(state)["step"] if state.exists() else 0
    run.say(f"{GREETING} from {__file__} at step {first}")
    if config.data is not None:
        run.bind_input("data", records.read_manifest(config.data)["data_id"])
    if config.language_model is not None:
        place = model_files.find(config.language_model.model, config.language_model.revision)
        found = model_files.language_model_record(place.path)
        run.bind_input("language_model", found["data_id"], found["files"])
        run.say(f"the model lies in {place.path}; started in {os.getcwd()}")
    for step in range(first, config.steps):
        run.check_stop()
        if config.fail_at == step:
            raise UserError(f"the toy fails at step {step}, as it was told")
        if config.crash_at == step:
            raise RuntimeError("the toy crashes")
        until = time.monotonic() + config.step_seconds
        while time.monotonic() < until:
            run.check_stop()
            time.sleep(0.02)
        records.write_json(state, {"step": step + 1})
        run.report("count", step + 1, config.steps, unit="steps", done=True)
        while step >= 1 and config.hold is not None and config.hold.exists():
            run.check_stop()
            time.sleep(0.02)
    if config.output is not None:
        recipe_inputs = {"data": records.read_manifest(config.data)["data_id"]} if config.data else {}
        records.claim(config.output, {"stage": "toy", "settings": config.identity(), "inputs": recipe_inputs})
        (config.output / "numbers.bin").write_bytes(bytes(range(config.steps)))
        shard = records.commit_shard(config.output, "numbers", "toy/1", ["numbers.bin"], {"steps": config.steps}, {})
        records.write_manifest(config.output, "toy-set/1", {"numbers": shard}, {})
    return {"steps": config.steps, "score": 10.0 * config.steps, "task": run.task, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
'''


class ToyProject:
    """A checkout in `root`, with git, and the means to run its command line."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs = root / "runs"
        for package in ("pipeline", "slurm"):
            shutil.copytree(
                ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__", "demo", "crosscoder", "activations")
            )
        (root / "pipeline/config/toy.py").write_text(CONFIG)
        (root / "pipeline/stages/toy.py").write_text(PROGRAM)
        stages = root / "pipeline/config/load.py"
        entry = 'STAGES = {\n    "toy": Stage("pipeline.config.toy:ToyConfig", "pipeline.stages.toy"),'
        stages.write_text(stages.read_text().replace("STAGES = {", entry))
        (root / ".gitignore").write_text("runs/\ndata/\n__pycache__/\n*.egg-info/\n")
        self.git("init", "-q", "-b", "main")
        self.commit()

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=toy", "-c", "user.email=toy@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(self.root), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def commit(self) -> None:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "state")

    def config(self, name: str = "toy", **values: object) -> str:
        path = self.root / f"{name}.yaml"
        lines = {"stage": "toy", "name": name, **values}
        path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
        return path.name

    def hold(self) -> Path:
        """A file for a configuration's `hold`: its runs stay at work until it is deleted."""
        file = self.root / "hold"
        file.touch()
        return file

    def environment(self, **more: str) -> dict[str, str]:
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN", "SUBMITIT", "CROSSCODER"))}
        return plain | {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | more

    def crosscoder(self, *arguments: str, cwd: Path | None = None, **variables: str) -> "subprocess.CompletedProcess[str]":
        """The command line, in the clone or in another directory, `cwd`."""
        command = [sys.executable, "-P", "-m", "slurm", *arguments]
        return subprocess.run(
            command, cwd=cwd or self.root, env=self.environment(**variables), capture_output=True, text=True, timeout=120, check=False
        )

    def only_run(self, name: str = "toy", stage: str = "toy") -> Path:
        (path,) = (self.runs / stage / name).iterdir()
        return path
