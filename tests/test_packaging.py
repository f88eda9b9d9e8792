"""How the package comes to others.

- The wheel has one top-level name, everything inside it that a run needs, and takes nothing from the checkout.
- constraints.txt pins every dependency to a version that pyproject.toml allows, whatever the index or build of torch.
- `make` installs again when the constraints are others, and only then.
"""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "grit_lightning", "callbacks", "datamodules", "configs")

# Names what no import has named, then imports every module of the installed package, and reports where each came from.
IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys
import grit_lightning
assert {"callbacks", "datamodules", "functional", "geometry"} <= set(dir(grit_lightning))
grit_lightning.callbacks  # an attribute without an import of its own, as are the others
assert grit_lightning.functional.damped_inverse and grit_lightning.datamodules.TASKS
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch import Callback
parser = LightningArgumentParser()
parser.add_argument("--callback", type=Callback)
assert parser.parse_args(["--callback=Reprojection"]).callback.class_path == "grit_lightning.callbacks.Reprojection"
for module in pkgutil.walk_packages(grit_lightning.__path__, "grit_lightning."):
    importlib.import_module(module.name)
print(json.dumps({name: getattr(module, "__file__", None) for name, module in sys.modules.items()}))
"""


def _run(*command: str, **kwargs: object) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)  # type: ignore[call-overload]
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return str(result.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel from a copy of the sources, so that no build folder of the checkout can leak into it."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(source))
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installs the wheel into an otherwise empty folder."""
    folder = tmp_path_factory.mktemp("target")
    options = ("--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check")
    _run(sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(wheel))
    return folder


def test_the_only_top_level_name_is_grit_lightning(target: Path) -> None:
    names = {path.name for path in target.iterdir() if not path.name.endswith(".dist-info") and path.name != "bin"}
    assert names == {"grit_lightning"}


def test_the_wheel_holds_every_python_file_template_and_config(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "grit_lightning"  # with its links, the tree as an importer sees it
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in (package, package / "callbacks", package / "datamodules", package / "configs")
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"grit_lightning/configs/demo.yaml", "grit_lightning/datamodules/templates/boolq.yaml"} < expected
    assert inside == expected


def test_the_wheel_names_its_licence_and_its_program(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name.rpartition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        assert "licenses/LICENSE" in files
        assert "grit = grit_lightning.cli:main" in archive.read(files["entry_points.txt"]).decode()


@pytest.fixture(scope="module")
def loaded(target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Every module by name, with its file, of a new process in which the subpackages are attributes of the package.

    Their classes can be named there in any command line.
    """
    environment, folder = os.environ | {"PYTHONPATH": str(target)}, tmp_path_factory.mktemp("elsewhere")
    said = _run(sys.executable, "-c", IMPORT_EVERYTHING, cwd=folder, env=environment)
    found: dict[str, str | None] = json.loads(said.splitlines()[-1])
    return found


def test_importing_the_installed_package_touches_nothing_outside_it(
    target: Path, loaded: dict[str, str | None]
) -> None:
    ours = {name: file for name, file in loaded.items() if name.partition(".")[0] == "grit_lightning"}
    assert {"grit_lightning.callbacks", "grit_lightning.datamodules", "grit_lightning.cli.program"} <= set(ours)
    assert all(file is not None and file.startswith(str(target)) for file in ours.values())
    environment_root = Path(sys.prefix)  # `make` puts it inside the checkout
    outside = [Path(file) for file in loaded.values() if file and not Path(file).is_relative_to(environment_root)]
    assert not [file for file in outside if file.is_relative_to(ROOT)]


def test_subpackages_are_attributes_and_their_classes_can_be_named_in_any_command_line(
    loaded: dict[str, str | None],
) -> None:
    """What a new process says of itself before it imports everything."""
    assert {"torch", "grit_lightning.callbacks", "grit_lightning.functional"} <= set(loaded)


def test_the_checkout_imports_through_one_root_only() -> None:
    for name in ("callbacks", "datamodules", "configs"):
        link = ROOT / "grit_lightning" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


def test_constraints_pin_every_dependency_to_a_version_that_it_allows(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(archive.read(name).decode())
    dependencies = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    dependencies = [each for each in dependencies if each.marker is None or each.marker.evaluate({"extra": "dev"})]
    assert {"torch", "peft", "pytest"} < {each.name for each in dependencies}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {}
    for pin in pins:
        assert pin.url is None
        (version,) = pin.specifier
        assert version.operator == "=="
        assert Version(version.version).local is None  # 2.14.1 is any build of it, 2.14.1+cpu is not on every index
        versions[canonicalize_name(pin.name)] = version.version
    assert len(versions) == len(pins)
    for dependency in dependencies:
        assert dependency.specifier.contains(versions[canonicalize_name(dependency.name)]), str(dependency)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_installs_again_when_the_constraints_are_others_and_only_then(tmp_path: Path) -> None:
    constraints, venv = tmp_path / "constraints.txt", tmp_path / "venv"
    constraints.touch()

    def installs(setting: Path | str) -> list[str]:
        """The packages' installation, with a `pip` that says only what it would do."""
        words = ("make", "-s", "install", f"VENV={venv}", f"CONSTRAINTS={setting}", "PYTHON=true", "PIP=echo pip")
        said = _run(*words, cwd=ROOT, env={name: value for name, value in os.environ.items() if name != "MAKEFLAGS"})
        return [line for line in said.splitlines() if line.startswith("pip") and line.endswith("--editable .")]

    pinned, newest = (
        [f"pip --constraint {constraints} --editable ."],
        ["pip --upgrade --upgrade-strategy eager --editable ."],
    )
    assert installs(constraints) == pinned
    assert installs(constraints) == []
    assert installs("") == newest
    assert installs("") == []
    assert installs(constraints) == pinned
    assert installs(constraints) == []
    later = constraints.stat().st_mtime + 3600
    os.utime(constraints, (later, later))
    assert installs(constraints) == pinned
