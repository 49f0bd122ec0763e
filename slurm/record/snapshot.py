"""Freezes the code that a run executes, and checks later that it is still the same.

`code/` in the run directory holds the tree that `pipeline` was imported from: in a git checkout every tracked file as it
is now, uncommitted edits included, and every untracked file that git does not ignore, up to `LARGE_BYTES`; without git
the two packages. `code.json` says what that is:

    {"hash": "5b1e...", "root": "/home/ana/crosscoder", "commit": "0463cc3...", "branch": "main", "edited": true,
     "files": {"pipeline/run.py": "77d0...", ...}, "left_out": {"notes/big.bin": "73,400,320 bytes", ".env": "a secret by its name"}}

and `code.diff` what differs from the commit. Files are hard links into `<runs>/.code/`, where each content is kept once
for each mode, so a run costs no disk for code that another one froze.

Nothing becomes readable that was not: a file keeps its mode, less what the umask takes, less what the directories between
it and the root of the tree keep others from. Untracked files that are secrets (see `slurm.record.secret_files`) and links
that lead to anything but a frozen file are left out; a tracked secret, which the code may need, is for the owner alone.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import pipeline
from pipeline import records
from pipeline.config.errors import UserError
from pipeline.config.site_file import site_file
from slurm.record.secret_files import is_secret_by_content, is_secret_by_name

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
    tracked: frozenset[str]
    """Those of `files` that git keeps, and so whoever committed them made part of the code."""
    left_out: dict[str, str]
    """What was found and is not frozen, and why."""
    commit: str | None
    branch: str | None
    diff: bytes
    differing: list[str]
    """The paths that `diff` tells of."""


def read_tree(root: Path) -> Tree:
    """The tree at `root` as it is now."""
    if not _is_checkout(root):
        found = (path for package in PACKAGES for path in (root / package).rglob("*"))
        names = [str(path.relative_to(root)) for path in found if path.is_file() and "__pycache__" not in path.parts]
        return Tree(root, *_chosen(root, names, frozenset()), None, None, b"", [])
    tagged = [entry.split(" ", 1) for entry in _names(root, "ls-files", "-z", "-t", "--cached", "--others", "--exclude-standard")]
    tracked = frozenset(name for tag, name in tagged if tag != "?")
    chosen = _chosen(root, [name for _, name in tagged], tracked)
    verify = ["git", "-C", str(root), "rev-parse", "-q", "--verify", "HEAD"]
    if subprocess.run(verify, capture_output=True, check=False, timeout=GIT_TIMEOUT_SECONDS).returncode:
        return Tree(root, *chosen, None, None, b"", [])
    commit = _git(root, "rev-parse", "HEAD").decode().strip()
    branch = _git(root, "rev-parse", "--abbrev-ref", "HEAD").decode().strip()
    diff = _git(root, "diff", "HEAD", "--binary")
    differing = _names(root, "diff", "HEAD", "--name-only", "--no-renames", "-z") if diff else []
    return Tree(root, *chosen, commit, branch, diff, differing)


def _chosen(root: Path, names: Iterable[str], tracked: frozenset[str]) -> tuple[list[str], frozenset[str], dict[str, str]]:
    """The names to freeze, which of them are tracked, and the others with the reason why not."""
    left_out: dict[str, str] = {}
    files, links = [], []
    for name in sorted(set(names)):
        path = root / name
        if path.is_symlink():
            links.append(name)
        elif path.is_file():
            reason = _reason_against(path, name, is_tracked=name in tracked)
            if reason is None:
                files.append(name)
            else:
                left_out[name] = reason
    known = {(root / name).resolve() for name in files} if links else set()
    for name in links:
        target = (root / name).resolve()
        if target in known:
            files.append(name)
        elif not target.is_relative_to(root):
            left_out[name] = "a link that leads out of the tree"
        else:
            left_out[name] = "a link to what is not frozen"
    return sorted(files), tracked & set(files), left_out


def _reason_against(path: Path, name: str, *, is_tracked: bool) -> str | None:
    size = path.stat().st_size
    if size > LARGE_BYTES:
        return f"{size:,} bytes"
    if is_tracked:
        return None
    if is_secret_by_name(name):
        return "a secret by its name"
    return "it holds a private key" if is_secret_by_content(path.read_bytes()) else None


def _names(root: Path, *arguments: str) -> list[str]:
    return [os.fsdecode(name) for name in _git(root, *arguments).split(b"\0") if name]


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
    files = {name: _keep(root / name, _mode(root, name), directory / "code" / name, store) for name in tree.files}
    record = {
        "hash": tree_hash(files),
        "root": str(root),
        "commit": tree.commit,
        "branch": tree.branch,
        "edited": tree.commit is not None and (bool(tree.diff) or len(tree.tracked) < len(tree.files)),
        "files": files,
        "left_out": tree.left_out,
    }
    readers = 0o666
    for name in tree.differing:
        readers &= _mode(root, name)
    with records.atomic_file(directory / "code.diff", 0o600 | readers) as file:
        file.write(tree.diff)
    records.write_json(directory / "code.json", record)
    return record


def freeze_again(origin: Path, directory: Path, store: Path) -> dict[str, Any]:
    """Gives `directory` the code that the run directory `origin` froze. Raises `UserError` if that was changed since."""
    check(origin)
    record = dict(records.read_json(origin / "code.json"))
    for name in record["files"]:
        _keep(origin / "code" / name, _mode(origin / "code", name), directory / "code" / name, store)
    with records.atomic_file(directory / "code.diff", 0o600 | (origin / "code.diff").stat().st_mode & 0o666) as file:
        file.write((origin / "code.diff").read_bytes())
    records.write_json(directory / "code.json", record)
    return record


def in_words(left_out: dict[str, str]) -> str:
    """`.env (a secret by its name), notes/big.bin (73,400,320 bytes)`."""
    return _listing([f"{name} ({reason})" for name, reason in left_out.items()])


def _mode(root: Path, name: str) -> int:
    """The mode that the frozen copy of `name` may have at most: read and execute, for whom the file in the tree has it."""
    target = os.path.relpath((root / name).resolve(), root) if (root / name).is_symlink() else name
    is_for_owner = _is_for_the_owner(root, name) or (target != name and _is_for_the_owner(root, target))
    if not (root / target).is_file():  # deleted, but what it held stands in the diff
        return 0o400 if is_for_owner else 0o555
    mode = (root / target).stat().st_mode & 0o555 | 0o400
    for parent in PurePath(target).parents[:-1]:
        enters = (root / parent).stat().st_mode
        mode &= 0o700 | (0o070 if enters & 0o010 else 0) | (0o007 if enters & 0o001 else 0)
    return mode & 0o700 if is_for_owner else mode


def _is_for_the_owner(root: Path, name: str) -> bool:
    """Of a frozen file: whether it is a tracked secret, or the site's file, whose setup lines may hold one."""
    return is_secret_by_name(name) or name == "configs/site.yaml" or root / name == site_file()


def _keep(source: Path, mode: int, target: Path, store: Path) -> str:
    """Puts the content of `source` at `target`, through the store, as readable as `mode` and the umask say; gives its hash."""
    target.parent.mkdir(parents=True, exist_ok=True)
    content = source.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    mode &= ~_umask()
    kept = store / digest[:2] / f"{digest}.{mode:o}"
    try:
        if not _is_whole(kept, len(content), mode):
            _write(kept, content, mode)
        os.link(kept, target)
    except OSError:  # another file system, one without hard links, a store of another user
        _write(target, content, mode)
    return digest


def _is_whole(kept: Path, size: int, mode: int) -> bool:
    """Whether the store has the content, as this user put it there: what is another's may be changed by him."""
    with contextlib.suppress(FileNotFoundError):
        found = kept.lstat()
        return (found.st_size, found.st_mode & 0o7777, found.st_uid) == (size, mode, os.geteuid())
    return False


def _write(path: Path, content: bytes, mode: int) -> None:
    with records.atomic_file(path, mode | 0o200) as file:
        file.write(content)
        os.fchmod(file.fileno(), mode)


def _umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


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
