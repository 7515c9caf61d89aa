"""A built wheel works elsewhere: configs and the bundled model are inside it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from diffopt.config import config_names
from diffopt.engine.png import read_png

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_code_configs_and_the_bundled_model(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        *(f"diffopt/configs/models/{name}.toml" for name in config_names("models")),
        *(
            f"diffopt/{path.relative_to(ROOT / 'diffopt').as_posix()}"
            for path in (ROOT / "diffopt" / "assets").rglob("*")
            if path.is_file()
        ),
        "diffopt/cli.py",
        "diffopt_kernels/attention.py",
    }
    assert expected <= names
    assert any(name.endswith("model.safetensors") for name in expected)
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"diffopt", "diffopt_kernels"}


@pytest.mark.slow
def test_the_wheel_makes_a_picture_in_another_folder(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = (
        "import sys, diffopt, diffopt_kernels; from diffopt.cli import main; "
        "print(diffopt.__file__, diffopt_kernels.__file__); "
        "raise SystemExit(main(['generate', 'blue heart', '--steps', '2', '--device', 'cpu', '--seed', '7']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{site}/diffopt/__init__.py {site}/diffopt_kernels/__init__.py"
    (picture,) = (tmp_path / "out").iterdir()
    assert read_png(picture)["model"] == "emoji"
