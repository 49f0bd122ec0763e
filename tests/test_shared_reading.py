"""Trainings that share a node share the kernel's page cache: the disk gives them an activation set once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench" / "shared_reading.py"


def test_the_disk_is_read_once_for_all_trainings_of_a_node(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "--directory", str(tmp_path), "--megabytes", "60", "--readers", "1", "3", "--json"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    alone, together = (json.loads(line) for line in lines)
    if alone["bytes_from_disk"] < alone["set_bytes"]:
        pytest.skip(f"the file system of {tmp_path} doesn't tell what it reads, or could not be dropped from memory")
    assert together["readers"] == 3
    assert together["bytes_from_disk"] < 1.2 * together["set_bytes"]
