"""What a run keeps of the code and the site is readable to nobody who could not read it before."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_queue import Queue
from toy_project import ToyProject
from waiting import finished, wait_until

from pipeline import records
from slurm.cluster.daemons import PrivateCluster
from slurm.record import secret_files, snapshot
from slurm.record.run_directory import RunDirectory

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n-----END OPENSSH PRIVATE KEY-----\n"


@pytest.fixture
def umask() -> Iterator[None]:
    """The usual umask, whatever the shell's is; put back even if the test sets another."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def checkout(tmp_path: Path, umask: None) -> Path:
    root = tmp_path / "checkout"
    write(root / "pipeline/run.py", "one\n")
    write(root / ".gitignore", "ignored/\n")
    git(root, "init", "-q", "-b", "main")
    commit(root)
    return root


def write(path: Path, text: str, mode: int = 0o644) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


def commit(root: Path) -> None:
    git(root, "add", "-A", "-f")
    git(root, "commit", "-q", "-m", "state")


def freeze(root: Path, name: str = "run") -> Path:
    snapshot.freeze(root, root.parent / name, root.parent / "store")
    return root.parent / name


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def holds(place: Path, text: str, *, readable_by: int = 0o777) -> list[str]:
    """The files under `place`, with one of the mode's bits in `readable_by`, that hold `text`."""
    files = (path for path in place.rglob("*") if path.is_file() and mode(path) & readable_by)
    return [str(path.relative_to(place)) for path in files if text in path.read_text(errors="replace")]


def closed_to_others(path: Path, top: Path) -> bool:
    """Whether the file, or a directory between it and `top`, keeps group and others out."""
    return any(not mode(place) & 0o077 for place in (path, *path.parents) if place.is_relative_to(top))


# -- frozen code ------------------------------------------------------------------------------------------------------


def test_untracked_files_with_the_names_of_secrets_are_left_out_and_named(checkout: Path) -> None:
    names = [".env", ".env.local", "prod.env", ".netrc", "_netrc", ".pypirc", ".git-credentials", "id_rsa", "id_ed25519", "server.pem"]
    names += ["tls.key", "store.p12", "passwords.kdbx", "credentials", "service-account.json", "secrets.yaml", "hf_token"]
    names += [".aws/config", ".ssh/known_hosts", "deploy/.huggingface/token", "notes/.ENV"]
    for name in names:
        write(checkout / name, "hunter2\n")
    run = freeze(checkout)
    assert holds(run.parent / "store", "hunter2") == holds(run, "hunter2") == []
    assert records.read_json(run / "code.json")["left_out"] == dict.fromkeys(sorted(names), "a secret by its name")


def test_what_only_looks_like_a_secret_is_frozen(checkout: Path) -> None:
    names = {".env.example", "id_rsa.pub", "secrets.py", "environment.yaml", "pipeline/tokens.py", "monkey"}
    for name in names:
        write(checkout / name, "plain\n")
    assert set(holds(freeze(checkout) / "code", "plain")) == names


def test_a_private_key_is_left_out_whatever_its_name(checkout: Path) -> None:
    write(checkout / "deploy", KEY)
    write(checkout / "my-project-1f3a.json", '{"type": "service_account", "private_key": "-----BEGIN PRIVATE KEY-----\\nabc"}')
    write(checkout / "reads_keys.py", f'MARK = "{KEY.splitlines()[0]}"\n')
    run = freeze(checkout)
    assert holds(run / "code", "PRIVATE KEY") == ["reads_keys.py"]
    assert secret_files.is_secret_by_content("deploy", KEY.encode())


def test_a_link_is_followed_only_to_what_is_frozen_itself(checkout: Path, tmp_path: Path) -> None:
    write(tmp_path / "outside/secret.txt", "hunter2\n")
    write(checkout / "ignored/password", "hunter2\n")
    write(checkout / ".env", "hunter2\n")
    (checkout / "notes.txt").symlink_to(tmp_path / "outside/secret.txt")
    (checkout / "settings").symlink_to(".env")
    (checkout / "password").symlink_to("ignored/password")
    (checkout / "alias.py").symlink_to("pipeline/run.py")
    (checkout / "gone").symlink_to("nowhere")
    git(checkout, "add", "-A")  # a tracked link leads no further than an untracked one
    git(checkout, "rm", "-q", "--cached", ".env")
    run = freeze(checkout)
    assert holds(run, "hunter2") == holds(tmp_path / "store", "hunter2") == []
    record = (run / "code.json").read_text()
    assert '"notes.txt": "a link that leads out of the tree"' in record
    assert '"settings": "a link to what is not frozen"' in record
    assert (run / "code/alias.py").read_text() == "one\n"
    assert not (run / "code/alias.py").is_symlink()
    snapshot.check(run)


def test_frozen_files_are_as_readable_as_they_were_and_no_more(checkout: Path, tmp_path: Path) -> None:
    write(checkout / "open.txt", "the same\n")
    freeze(checkout, "first")  # the store has this content, readable by all, before the closed one comes
    write(checkout / "closed.txt", "the same\n", 0o600)
    write(checkout / "group.sh", "x\n", 0o750)
    write(checkout / "private/inner.txt", "inner\n").parent.chmod(0o700)
    run = freeze(checkout)
    modes = {name: mode(run / "code" / name) for name in ("open.txt", "closed.txt", "group.sh", "private/inner.txt")}
    assert modes == {"open.txt": 0o444, "closed.txt": 0o400, "group.sh": 0o550, "private/inner.txt": 0o400}
    again = tmp_path / "again"
    snapshot.freeze_again(run, again, tmp_path / "store")
    assert {name: mode(again / "code" / name) for name in modes} == modes
    assert (run / "code/open.txt").samefile(tmp_path / "first/code/open.txt")


def test_the_umask_holds_for_the_store_and_for_a_run(checkout: Path, tmp_path: Path) -> None:
    os.umask(0o077)
    run = freeze(checkout)
    assert [str(path) for place in (run, tmp_path / "store") for path in (place, *place.rglob("*")) if mode(path) & 0o077] == []


def test_edits_of_a_closed_file_or_of_a_tracked_secret_make_a_closed_diff(checkout: Path) -> None:
    write(checkout / "plain.py", "1\n")
    write(checkout / ".env", "1\n")
    write(checkout / "closed.py", "1\n", 0o600)
    commit(checkout)
    assert mode(freeze(checkout, "clean") / "code.diff") == 0o644
    write(checkout / "plain.py", "2\n")
    assert mode(freeze(checkout, "plain") / "code.diff") == 0o644
    write(checkout / "closed.py", "hunter2\n", 0o600)
    run = freeze(checkout, "closed")
    assert mode(run / "code.diff") == 0o600
    git(checkout, "checkout", "closed.py")
    (checkout / ".env").unlink()
    assert mode(freeze(checkout, "secret") / "code.diff") == 0o600
    snapshot.freeze_again(run, run.parent / "again", run.parent / "store")
    assert mode(run.parent / "again/code.diff") == 0o600


def test_a_tracked_secret_is_part_of_the_code_but_for_the_owner_alone(checkout: Path) -> None:
    write(checkout / "tests/server.pem", "x\n")
    commit(checkout)
    assert mode(freeze(checkout) / "code/tests/server.pem") == 0o400


def test_git_is_told_not_to_track_the_usual_files() -> None:
    root = Path(__file__).parents[1]
    names = [".env", ".env.local", ".netrc", "id_rsa", "x.pem", "x.key", "credentials.json", ".ssh/config", "configs/site.yaml"]
    told = [line for line in (root / ".gitignore").read_text().splitlines() if line and not line.startswith("#")]
    ignored = subprocess.run(
        ["git", "-c", f"core.excludesFile={root / '.gitignore'}", "check-ignore", "--no-index", *names],
        capture_output=True, text=True, check=False, cwd=root,
    ).stdout.split()  # fmt: skip
    assert ignored == names or not (root / ".git").exists()
    assert ".env" in told


# -- a run directory --------------------------------------------------------------------------------------------------

SETUP = "export HF_TOKEN=hunter2"


@pytest.fixture
def project(tmp_path: Path, umask: None) -> ToyProject:
    project = ToyProject(tmp_path)
    (project.root / "configs").mkdir()
    (project.root / "configs/site.yaml").write_text(f"setup: ['{SETUP}']\n")
    return project


def open_files_that_hold(place: Path, text: str) -> list[str]:
    return [name for name in holds(place, text) if not closed_to_others(place / name, place)]


def test_setup_lines_of_a_local_run_stand_in_no_file_that_others_can_read(project: ToyProject) -> None:
    done = project.crosscoder("submit", project.config(), "--executor", "local")
    assert done.returncode == 0, done.stderr
    run = RunDirectory(project.only_run())
    wait_until(lambda: finished(run), "the job")
    assert run.setup() == [SETUP]
    assert "setup.json" in holds(run.path, "hunter2")
    assert open_files_that_hold(project.runs, "hunter2") == []


def test_what_is_left_out_is_named_once_however_many_runs_are_frozen(project: ToyProject) -> None:
    write(project.root / ".env", "hunter2\n")
    done = project.crosscoder("submit", project.config("one"), project.config("two"), "--executor", "debug")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("not frozen with the code, so not there in the job: .env (a secret by its name)") == 1
    assert open_files_that_hold(project.runs, "hunter2") == []


def test_a_run_frozen_when_its_setup_lines_stood_in_job_json_keeps_them(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_job({"setup": ["module load cuda"]})
    assert run.setup() == ["module load cuda"]


@pytest.mark.slurm
def test_setup_lines_of_a_slurm_job_stand_in_no_file_that_others_can_read(project: ToyProject, cluster: PrivateCluster) -> None:
    program = project.root / "pipeline/stages/toy.py"
    program.write_text(program.read_text().replace('"task": run.task', '"token": os.environ["HF_TOKEN"][::-1], "task": run.task'))
    (run,) = Queue(project, cluster).submit(project.config())
    wait_until(lambda: finished(run), "the job")
    assert (run.result() or {})["result"]["token"] == "2retnuh"
    assert open_files_that_hold(project.runs, "hunter2") == []
    assert "# the lines of setup.json ..." in run.job()["jobs"][0]["sbatch"]
    assert mode(run.path / "submitit") == 0o700
