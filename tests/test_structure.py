"""The lines drawn between the parts: who may import whom, and what files may be called."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import shipped

ROOT = Path(__file__).parent.parent
ORDER = ["config", "records", "weight_files", "model_kinds", "model_files", "run", "tokens", "text", "contexts", "blocks"]
ORDER += [
    "sublayers",
    "model_trial",
    "sublayer_trial",
    "model_loading",
    "prediction_head",
    "language_model",
    "language_models",
    "activations",
    "crosscoder",
]
ORDER += ["exchange", "interventions", "evaluation", "features", "generation", "stages"]
SLURM_ORDER = ["client", "cluster", "record", "execution", "submission", "watching", "changing", "reporting", "commands"]
TORCH_FREE = {
    "pipeline.config",
    "pipeline.records",
    "pipeline.weight_files",
    "pipeline.model_kinds",
    "pipeline.model_files",
    "pipeline.run",
}
PYTHON_FILES = shipped.files("pipeline/**/*.py", "slurm/**/*.py")
EMPTY_NAMES = {"utils", "util", "common", "helpers", "misc", "manager", "base"}


def imported_modules(path: Path) -> set[str]:
    """Every module that the file imports, at its top or inside a function."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def part(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_a_part_of_the_pipeline_imports_only_parts_before_it() -> None:
    wrong = []
    for path in PYTHON_FILES:
        relative = path.relative_to(ROOT).with_suffix("").parts
        if relative[0] != "pipeline" or len(relative) < 2 or relative[1] not in ORDER:
            continue
        for module in imported_modules(path):
            pieces = module.split(".")
            if pieces[0] == "pipeline" and len(pieces) > 1 and pieces[1] in ORDER and ORDER.index(pieces[1]) > ORDER.index(relative[1]):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert wrong == []


def test_a_part_of_slurm_imports_only_parts_before_it() -> None:
    wrong = []
    for path in shipped.files("slurm/*/*.py"):
        floor = SLURM_ORDER.index(path.parent.name)
        parts = {m.split(".")[1] for m in imported_modules(path) if m.startswith("slurm.")}
        wrong += [f"{path.relative_to(ROOT)} imports slurm.{name}" for name in parts if SLURM_ORDER.index(name) > floor]
    assert wrong == []


def test_a_stage_never_imports_another_stage() -> None:
    for path in shipped.files("pipeline/stages/*.py"):
        others = {
            m for m in imported_modules(path) if m.startswith("pipeline.stages.") and not m.startswith(f"pipeline.stages.{path.stem}")
        }
        assert others == set(), path


def test_slurm_imports_only_the_torch_free_parts_of_the_pipeline() -> None:
    for path in shipped.files("slurm/**/*.py"):
        modules = {part(m) for m in imported_modules(path) if m.startswith("pipeline.")}
        assert modules <= TORCH_FREE, path
        assert not {m for m in imported_modules(path) if m.split(".")[0] in ("torch", "transformers")}, path


def test_the_pipeline_never_imports_slurm() -> None:
    for path in shipped.files("pipeline/**/*.py"):
        assert not {m for m in imported_modules(path) if m.split(".")[0] in ("slurm", "submitit")}, path


@pytest.mark.parametrize(
    "modules", ["pipeline.config.load, pipeline.run, pipeline.model_files", "slurm.__main__", "slurm.submission.freezing"]
)
def test_login_side_modules_load_neither_torch_nor_transformers(modules: str) -> None:
    program = (
        f"import {modules}, sys; print(sorted({{'torch', 'transformers', 'huggingface_hub', 'matplotlib', 'submitit'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_has_a_purpose_a_name_that_says_it_and_a_readable_length(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module opens with one sentence of purpose"
    assert path.stem not in EMPTY_NAMES
    assert path.stem not in sys.stdlib_module_names or path.stem == "__main__", "a module named like the standard library's breaks imports"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, f"{node.name} is too long"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {n.func.attr for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
    assert not {m for m in imported_modules(path) if m.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib")}
    source = path.read_text(encoding="utf-8")
    assert source.count("torch.load(") == len(re.findall(r"torch\.load\(.*weights_only=True", source))  # no code in such a pickle runs
    assert "np.load(" not in source or "allow_pickle=True" not in source
    assert "unsafe_load" not in calls
