"""The house: imports go one way, the page is thin, nothing shadows other packages, importing is cheap."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_imports_go_one_way(monkeypatch):
    from importlinter.cli import lint_imports

    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename="pyproject.toml", no_cache=True) == 0


def test_a_wrong_import_would_be_found(tmp_path, monkeypatch):
    """The contract can fail: a kernel that imports diffopt breaks it."""
    for source in ("diffopt", "kernels/diffopt_kernels"):
        for path in (ROOT / source).rglob("*.py"):
            target = tmp_path / path.relative_to(ROOT / "kernels" if "kernels" in source else ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    with (tmp_path / "diffopt_kernels" / "cost.py").open("a") as file:
        file.write("\nimport diffopt.errors\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "diffopt_kernels.cost -> diffopt.errors" in done.stdout


def test_the_entry_of_the_page_holds_nothing_else():
    tree = ast.parse((ROOT / "app.py").read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"diffopt.cli"}
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def test_no_package_is_shadowed():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


@pytest.mark.parametrize("heavy", ["torch", "diffusers", "gradio"])
def test_importing_diffopt_is_cheap(heavy):
    code = f"import sys, diffopt, diffopt.cli; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
