"""What a run keeps of the code and the site is readable to nobody who could not read it before."""

import os
import shutil
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

ARMOR = "-----BEGIN {kind}PRIVATE KEY{block}-----"
BASE64 = "b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2"
KEY = f"{ARMOR.format(kind='OPENSSH ', block='')}\n{BASE64}\n"
PGP = f"{ARMOR.format(kind='PGP ', block=' BLOCK')}\nVersion: GnuPG v2\n\n{BASE64}\n"
ENCRYPTED = f"{ARMOR.format(kind='RSA ', block='')}\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,5A2F\n\n{BASE64}\n"


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


SERVICES = [".s3cfg", ".boto", ".dockercfg", "auth.json", ".vault-token", "terraform.tfstate", "kaggle.json", ".wandb_api_key"]
CALLED = ["huggingface_token", "token.txt", "password", "passwords.txt", "api_key.txt", "openai_api_key", "API-KEY.json"]
COPIES = [".env~", ".env.~2~", ".env.swp", ".env.un~", "#.env#", ".netrc.swp", ".id_rsa.swo", "id_rsa.bak", "id_rsa.txt", "id_rsa-2026"]
COPIES += ["id_rsa (copy)", "Copy of id_rsa", "server.pem.old.gz", "#tls.key#", ".kaggle.json.swp~", ".credentials.json.kate-swp"]


@pytest.mark.parametrize("name", [*SERVICES, *CALLED, *COPIES])
def test_services_files_and_editors_copies_are_secrets_by_their_names(name: str) -> None:
    assert secret_files.is_secret_by_name(f"notes/{name}")


PLAIN = [".env.example", ".env.example~", "id_rsa.pub", "id_rsa.pub.bak", "secrets.py", "secrets.py~", "#secrets.py#", "environment.yaml"]
PLAIN += [
    "pipeline/tokens.py",
    "tokens.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "pile-000.bin",
    "monkey",
    "monkey.bak",
    "~",
    "##",
]


def test_what_only_looks_like_a_secret_is_frozen(checkout: Path) -> None:
    for name in PLAIN:
        write(checkout / name, "plain\n")
    assert set(holds(freeze(checkout) / "code", "plain")) == set(PLAIN)


def test_a_private_key_is_left_out_whatever_its_name_and_wherever_it_lies(checkout: Path) -> None:
    escaped = KEY.replace("\n", "\\n")
    files = {
        "deploy": KEY,
        "chain.crt": f"-----BEGIN CERTIFICATE-----\n{BASE64}\n-----END CERTIFICATE-----\n{KEY}",
        "my-project-1f3a.json": f'{{"type": "service_account", "private_key": "{escaped}"}}',
        "settings.yaml": "key: |\n" + "".join(f"  {line}\n" for line in ENCRYPTED.splitlines()),
        "signing.asc": PGP,
        "windows.crt": KEY.replace("\n", "\r\n"),
        "constants.py": "KEY = (\n" + "".join(f'    "{line}\\n"\n' for line in KEY.splitlines()) + ")\n",
        "session.notes": f"PuTTY-User-Key-File-3: ssh-ed25519\n{BASE64}\n",
        "identity": f"# created: 2026\nAGE-SECRET-KEY-1{'Q' * 58}\n",
        "buffer": f"b0VIM 9.0\0\0{BASE64}\0{ARMOR.format(kind='', block='')}\0",
    }
    for name, text in files.items():
        write(checkout / name, text)
    left_out = records.read_json(freeze(checkout) / "code.json")["left_out"]
    assert left_out == dict.fromkeys(sorted(files), "it holds a private key")


def test_code_that_looks_for_private_keys_is_frozen(checkout: Path) -> None:
    names = {"reads_keys.py": f'MARK = "{KEY.splitlines()[0]}"\nreturn MARK', "notes": "AGE-SECRET-KEY-1... PuTTY-User-Key-File-2: x"}
    for name, text in names.items():
        write(checkout / name, text)
    assert records.read_json(freeze(checkout) / "code.json")["left_out"] == {}


def test_a_key_that_ssh_keygen_makes_is_known_by_its_content(tmp_path: Path) -> None:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not here")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "made"], check=True)
    assert secret_files.is_secret_by_content((tmp_path / "made").read_bytes())
    assert not secret_files.is_secret_by_content((tmp_path / "made.pub").read_bytes())


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
