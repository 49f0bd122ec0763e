"""Makes a test run the same whoever runs it from wherever: the caller's environment, home, git settings, site and signals stay outside.

`conftest.py` imports this before anything else, so that no module of the project or of a library reads the caller's settings first.
Workers of pytest-xdist, and a pytest that a test starts, share the home that the first process made.
"""

import atexit
import locale
import os
import resource
import shutil
import signal
import site
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

# All else is taken away, rather than a list of what is known to disturb: SLURM_*, SBATCH_*, HF_*, GIT_*, COLUMNS, FORCE_COLOR, RANK, ...
KEPT = {"PATH", "LD_LIBRARY_PATH", "LD_PRELOAD", "USER", "LOGNAME", "TMPDIR", "VIRTUAL_ENV"}
KEPT_PREFIXES = (
    *("PYTEST_", "COVERAGE_", "SURVIVAL_", "CUDA_", "NVIDIA_"),
    # How sums are computed: tests are run under several of these to stand for other processors.
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_", "DNNL_"),
)
HOME_VARIABLE = "PYTEST_CROSSCODER_HOME"
SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGCHLD)


def isolate() -> None:
    """Gives this process, and all that it starts, an environment that depends on the caller's PATH and temporary directory alone."""
    user_base = site.getuserbase()
    kept = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith(KEPT_PREFIXES)}
    kept.pop("PYTEST_ADDOPTS", None)  # this pytest has read it; one that a test starts would empty the directory of --basetemp
    home = Path(kept.get(HOME_VARIABLE) or _new_home())
    os.environ.clear()
    os.environ.update(kept)
    os.environ[HOME_VARIABLE] = os.environ["HOME"] = str(home)
    # A library may be installed for the user alone (`pip install --user`): not found under another HOME.
    os.environ["PYTHONUSERBASE"] = user_base
    os.environ["GIT_CONFIG_NOSYSTEM"] = "1"
    # The caller's configs/site.yaml is not read: the site of the tests has the defaults.
    os.environ["CROSSCODER_SITE"] = str(home / "site.yaml")
    # Several processes share the cores: threads of each would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["LC_ALL"] = "C.UTF-8"
    locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    os.umask(0o022)
    # Daemons of Slurm that crash would leave a `core` in the directory that a job was submitted from, the clone.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Whoever starts pytest in the background (`make test &`, nohup) has SIGINT or SIGHUP ignored, and so would every process below.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    # Before another clone that PYTHONPATH may name.
    sys.path.insert(0, str(ROOT))


def _new_home() -> Path:
    home = Path(tempfile.mkdtemp(prefix="crosscoder-tests-home-"))
    atexit.register(_remove, home, os.getpid())
    (home / "site.yaml").write_text("resources: {}\n")
    # A clone that belongs to another user is read all the same.
    (home / ".gitconfig").write_text("[safe]\n\tdirectory = *\n[user]\n\tname = tests\n\temail = tests@example.org\n")
    return home


def _remove(home: Path, made_by: int) -> None:
    if os.getpid() == made_by:  # and not in a process that a test forked
        shutil.rmtree(home, ignore_errors=True)
