"""Which files of the checkout are the project's own: what a user puts beside them, as the guide says to, is not tested."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def files(*patterns: str) -> list[Path]:
    """The files that match `patterns` (as for `Path.glob`, from the project's root) and that git tracks, sorted.

    All that match, where git tracks none: the project was unpacked from an archive. A new file counts from `git add` on.
    """
    found = {path for pattern in patterns for path in ROOT.glob(pattern)}
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False).stdout
    tracked = {ROOT / name for name in listed.split("\0") if name}
    return sorted(found & tracked if tracked else found)
