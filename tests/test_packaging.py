"""The wheel: everything a user needs is in it, nothing else, and it works without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PARTS = ("rlhf", "conf", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
"""What a build reads; it is copied, as a build leaves files where it runs."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for part in PARTS:
        path = ROOT / part
        if path.is_dir():
            shutil.copytree(path, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / part)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert built.returncode == 0, built.stderr[-4000:]
    return next(folder.glob("*.whl"))


def files(folder: str, suffix: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(f"*{suffix}")}


def test_the_wheel_holds_the_package_and_its_configuration_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = files("rlhf", ".py") | {f"rlhf/{name}" for name in files("conf", ".py")}
    configs = {f"rlhf/{name}" for name in files("conf", ".yaml")}
    assert len(configs) > 100
    inside = {name for name in names if ".dist-info/" not in name}
    pages = {path for kind in (".html", ".css", ".js", ".yaml") for path in files("rlhf", kind)}
    assert len(pages) >= 7 and inside == modules | configs | pages | files("rlhf", "py.typed")


def test_the_wheel_brings_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    entry = next(name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert archive.read(entry).decode().split() == ["[console_scripts]", "rlhf", "=", "rlhf.cli.main:entry"]
    assert any(name.endswith("LICENSE") for name in archive.namelist())


def test_the_installed_package_composes_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, timeout=180)
    environment = os.environ | {"PYTHONPATH": str(site)}

    def python(*words: str) -> str:
        return subprocess.run(
            [sys.executable, *words], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True, timeout=120
        ).stdout

    assert Path(python("-c", "import rlhf; print(rlhf.__file__)").strip()) == site / "rlhf" / "__init__.py"
    config = yaml.safe_load(python("-m", "rlhf", "sft", "--cfg", "job", "model@actor.model=tiny"))
    assert (config["verb"], config["actor"]["model"]["name"]) == ("sft", "tiny")
    assert (site / "bin" / "rlhf").is_file()
