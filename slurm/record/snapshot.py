"""Freezes the code that a run executes, and checks later that it is still the same.

`code/` in the run directory holds the tree that `pipeline` was imported from: in a git checkout every tracked file as it
is now, uncommitted edits included, and every untracked file that git does not ignore, up to `LARGE_BYTES`; without git
the two packages. `code.json` says what that is:

    {"hash": "5b1e...", "root": "/home/ana/crosscoder", "commit": "0463cc3...", "branch": "main", "edited": true,
     "files": {"pipeline/run.py": "77d0...", ...}, "left_out": {"notes/big.bin": 73400320}}

and `code.diff` what differs from the commit. Files are hard links into `<runs>/.code/`, where each content is kept once,
so a run costs no disk for code that another one froze.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pipeline
from pipeline import records
from pipeline.config.errors import UserError

LARGE_BYTES = 16 * 1024 * 1024
PACKAGES = ("pipeline", "slurm")
GIT_TIMEOUT_SECONDS = 60


def source_root() -> Path:
    """The tree that the running `pipeline` was imported from."""
    return Path(pipeline.__file__).resolve().parents[1]


class Tree(NamedTuple):
    """The files to freeze, by path relative to `root`, and what git knows of them (None outside git)."""

    root: Path
    files: list[str]
    commit: str | None
    branch: str | None
    diff: bytes


def read_tree(root: Path) -> Tree:
    """The tree at `root` as it is now."""
    if not _is_checkout(root):
        found = (path for package in PACKAGES for path in (root / package).rglob("*"))
        files = [str(path.relative_to(root)) for path in found if path.is_file() and "__pycache__" not in path.parts]
        return Tree(root, sorted(files), None, None, b"")
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split(b"\0")
    files = sorted({os.fsdecode(name) for name in listed if name and (root / os.fsdecode(name)).is_file()})
    verify = ["git", "-C", str(root), "rev-parse", "-q", "--verify", "HEAD"]
    if subprocess.run(verify, capture_output=True, check=False, timeout=GIT_TIMEOUT_SECONDS).returncode:
        return Tree(root, files, None, None, b"")
    commit = _git(root, "rev-parse", "HEAD").decode().strip()
    branch = _git(root, "rev-parse", "--abbrev-ref", "HEAD").decode().strip()
    return Tree(root, files, commit, branch, _git(root, "diff", "HEAD", "--binary"))


def _is_checkout(root: Path) -> bool:
    if shutil.which("git") is None:
        return False
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=GIT_TIMEOUT_SECONDS)
    return done.returncode == 0 and Path(os.fsdecode(done.stdout.rstrip(b"\n"))).resolve() == root


def _git(root: Path, *arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False, timeout=GIT_TIMEOUT_SECONDS)
    if done.returncode:
        raise UserError(f"git {' '.join(arguments)} in {root} exited {done.returncode}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def freeze(root: Path, directory: Path, store: Path) -> dict[str, Any]:
    """Copies the tree at `root` into `directory/code`, writes code.json and code.diff beside it and gives code.json."""
    tree = read_tree(root)
    sizes = {name: (root / name).stat().st_size for name in tree.files}
    left_out = {name: size for name, size in sizes.items() if size > LARGE_BYTES}
    files = {name: _keep(root / name, directory / "code" / name, store) for name in tree.files if name not in left_out}
    record = {
        "hash": tree_hash(files),
        "root": str(root),
        "commit": tree.commit,
        "branch": tree.branch,
        "edited": bool(tree.diff) or _has_untracked(tree),
        "files": files,
        "left_out": left_out,
    }
    with records.atomic_file(directory / "code.diff") as file:
        file.write(tree.diff)
    records.write_json(directory / "code.json", record)
    return record


def freeze_again(origin: Path, directory: Path, store: Path) -> dict[str, Any]:
    """Gives `directory` the code that the run directory `origin` froze. Raises `UserError` if that was changed since."""
    check(origin)
    record = dict(records.read_json(origin / "code.json"))
    for name in record["files"]:
        _keep(origin / "code" / name, directory / "code" / name, store)
    shutil.copyfile(origin / "code.diff", directory / "code.diff")
    records.write_json(directory / "code.json", record)
    return record


def _has_untracked(tree: Tree) -> bool:
    return tree.commit is not None and bool(_git(tree.root, "ls-files", "--others", "--exclude-standard"))


def _keep(source: Path, target: Path, store: Path) -> str:
    """Puts the content of `source` at `target`, through the store; gives its hash."""
    target.parent.mkdir(parents=True, exist_ok=True)
    content = source.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    executable = bool(source.stat().st_mode & 0o100)
    kept = store / digest[:2] / (digest + ("x" if executable else ""))
    if not kept.exists() or kept.stat().st_size != len(content):
        with records.atomic_file(kept) as file:
            file.write(content)
        kept.chmod(0o555 if executable else 0o444)
    try:
        os.link(kept, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(kept, target)
    return digest


def tree_hash(files: dict[str, str]) -> str:
    """sha256 over the sorted paths and content hashes."""
    return hashlib.sha256("\n".join(f"{name}\0{digest}" for name, digest in sorted(files.items())).encode()).hexdigest()


def differences(directory: Path) -> list[str]:
    """What in `directory/code` is not as it was frozen, one phrase a file: changed, missing or added."""
    recorded: dict[str, str] = records.read_json(directory / "code.json")["files"]
    code = directory / "code"
    found = []
    for name, digest in recorded.items():
        if not (code / name).is_file():
            found.append(f"{name} is missing")
        elif hashlib.sha256((code / name).read_bytes()).hexdigest() != digest:
            found.append(f"{name} was changed")
    present = (path for path in code.rglob("*.py") if path.is_file())
    return found + [f"{name} was added" for path in present if (name := str(path.relative_to(code))) not in recorded]


def check(directory: Path) -> None:
    """Raises `UserError` naming every file of the frozen code that differs from the record."""
    found = differences(directory)
    record = records.read_json(directory / "code.json")
    if tree_hash(record["files"]) != record["hash"]:
        found.append("code.json was changed")
    if found:
        raise UserError(f"{directory / 'code'} is not the code that was frozen: {_listing(found)}; submit a new run")


def _listing(phrases: list[str], most: int = 5) -> str:
    return ", ".join(phrases[:most]) + (f" and {len(phrases) - most} more" if len(phrases) > most else "")


def remove(directory: Path) -> None:
    """Deletes a run directory whose submission failed, so that nothing half-made stays."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
