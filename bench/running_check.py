"""What holding gigatoken to the reference all through a run costs: the stage tokenize with and without it, in processes of their own.

    python bench/running_check.py SOURCE... --tokenizer NAME [--rounds 5] [--encoder gigatoken]

Prints the median processor seconds of each (whole process, start included), the median of the ratios of a round, in which both run
one after the other, and the share of its processor time that a checked process itself finds in the check: on a machine that others
use too the ratio varies by more than the check costs. The token sets go to a temporary directory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = """
import sys, json, time
from pathlib import Path
from pipeline.config.schema import build
from pipeline.config.tokenize_text import TokenizeConfig
from pipeline.run import Run
from pipeline.stages import tokenize_text
from pipeline.text.running_check import Drawn, RunningCheck
values, directory, checked = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "checked"
spent = []
def timed(function):
    def call(*given):
        started = time.process_time()
        result = function(*given)
        spent.append(time.process_time() - started)
        return result
    return call
if checked:
    RunningCheck.draw, RunningCheck.compare = timed(RunningCheck.draw), timed(RunningCheck.compare)
else:
    RunningCheck.draw = lambda *_: Drawn([], [])
tokenize_text.run(build(TokenizeConfig, values | {"output": str(directory / "tokens")}, "bench"), Run(directory / "run"))
print("share", sum(spent) / time.process_time())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--encoder", default="gigatoken")
    given = parser.parse_args()
    values = {"stage": "tokenize", "name": "bench", "sources": given.sources, "tokenizer": {"name": given.tokenizer}}
    values |= {"encoder": given.encoder, "processes": 1}
    seconds: dict[str, list[float]] = {"checked": [], "unchecked": []}
    shares = []
    for _ in range(given.rounds):
        for kind, taken in seconds.items():
            used, share = processor_seconds(values, kind)
            taken.append(used)
            shares += [share] if kind == "checked" else []
    ratios = [one / other for one, other in zip(seconds["checked"], seconds["unchecked"], strict=True)]
    result = {kind: statistics.median(taken) for kind, taken in seconds.items()}
    print(json.dumps({**result, "ratio": statistics.median(ratios), "ratios": ratios, "share": statistics.median(shares)}))


def processor_seconds(values: dict[str, object], kind: str) -> tuple[float, float]:
    """Of the whole process, start included, and the share of the check in it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-c", PROGRAM, json.dumps(values), directory, kind]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    share = float(done.stdout.rpartition("share")[2])
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, share


if __name__ == "__main__":
    main()
