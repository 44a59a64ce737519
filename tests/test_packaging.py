"""The source archive and the wheel: what is in them, and that the tests pass against what the wheel installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILT = ("pyproject.toml", "LICENSE", "README.md")  # what a build needs beside the package
SMOKE = ("tests/test_public.py", "tests/test_space.py", "tests/test_subtasks.py")  # every executor, and scripts

pytestmark = [
    pytest.mark.skipif(not all((ROOT / name).is_file() for name in BUILT), reason="it is built from a checkout"),
    pytest.mark.timeout(600),  # some ten seconds of CPU, which a busy machine takes long to give
    pytest.mark.xdist_group("packaging"),  # what is built is built once
]


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command outside of this run of pytest, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_", "COVERAGE_"))}
    done = subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def package() -> set[str]:
    """Return the files of the package in the checkout."""
    return {f"speval/{name}" for name in files(ROOT / "speval") if "__pycache__" not in name}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (archive,) = folder.iterdir()
    run("tar", "-xf", archive, cwd=folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source archive as an installer builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=sdist)
    (built,) = folder.iterdir()
    return built


def test_the_source_archive_holds_all_that_the_repository_does(sdist: Path):
    if not (ROOT / ".git").exists():
        pytest.skip("no repository to compare with")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    assert files(sdist) == {name for name in listed if (ROOT / name).exists()} | {"PKG-INFO"}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as opened:
        found = {name for name in opened.namelist() if ".dist-info/" not in name}
    assert found == package()
    assert "speval/py.typed" in found
    assert {name for name in found if name.endswith(".sql")} >= {
        "speval/stores/sqlite/schema.sql",
        "speval/stores/postgres/schema.sql",
    }


def test_no_address_of_the_package_leads_to_a_place_that_does_not_exist(wheel: Path):
    with zipfile.ZipFile(wheel) as opened:
        (metadata,) = [name for name in opened.namelist() if name.endswith(".dist-info/METADATA")]
        headers, _, _ = opened.read(metadata).decode().partition("\n\n")
    assert "github.com/speval" not in headers


def test_the_tests_of_the_source_archive_pass_against_the_installed_wheel(sdist: Path, wheel: Path, tmp_path: Path):
    place = tmp_path / "venv"
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    # What speval and its tests import comes from the environment of this run; .pth files there, by which an editable speval
    # would be found, are not read.
    (site,) = place.glob("lib/python*/site-packages")
    (site / "others.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    shutil.rmtree(sdist / "speval")
    shown = run(python, "-c", "import speval; print(speval.__file__)", cwd=sdist)
    assert Path(shown.strip()) == site / "speval" / "__init__.py"
    assert "Usage: speval" in run(place / "bin" / "speval", "--help", cwd=tmp_path)
    assert " passed" in run(python, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *SMOKE, cwd=sdist)
