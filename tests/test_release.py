"""``scripts/release.py``: a release with a fault is not tagged."""

from __future__ import annotations

import importlib.util
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHANGELOG = "# Changelog\n\n## Unreleased\n\n## 1.2.3 - 2030-01-31\n\n- All of it.\n"


@pytest.fixture(scope="module")
def release():
    spec = importlib.util.spec_from_file_location("release", ROOT / "scripts" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path, release):
    """A clean checkout of version 1.2.3, ready to be tagged."""
    folder = tmp_path / "checkout"
    (folder / release.PACKAGE).mkdir(parents=True)
    (folder / release.PACKAGE / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (folder / "CHANGELOG.md").write_text(CHANGELOG)
    for command in (
        ["init", "--quiet"],
        ["config", "user.name", "someone"],
        ["config", "user.email", "someone@example.org"],
    ):
        release.git(folder, *command)
    commit(release, folder)
    return folder


def commit(release, root):
    release.git(root, "add", "--all")
    release.git(root, "commit", "--quiet", "--message", "change")


def test_a_clean_checkout_has_no_problems(release, root):
    assert list(release.checkout_problems(root)) == []
    release.git(root, "tag", "v1.2.3")
    assert list(release.checkout_problems(root)) == []


def test_faults_of_a_checkout_are_found(release, root):
    release.git(root, "tag", "v1.2.3")
    release.git(root, "tag", "v1.2.4")
    (problem,) = release.checkout_problems(root)
    assert problem == "the commit is tagged v1.2.4, and the package says v1.2.3"
    (root / "CHANGELOG.md").write_text("## 1.2.3 - 2030-01-31\n\n## 1.2.2 - 2029-01-31\n- Old.\n")
    dirty, tagged, entry = release.checkout_problems(root)
    assert "not clean" in dirty
    assert "v1.2.4" in tagged
    assert "no entry" in entry
    commit(release, root)
    another, entry = release.checkout_problems(root)
    assert "tag of another commit" in another
    assert "no entry" in entry
    release.git(root, "checkout", "--quiet", "HEAD~")
    release.git(root, "tag", "--delete", "v1.2.4")
    assert list(release.checkout_problems(root)) == []
    release.git(root, "tag", "--force", "v1.2.3", "@{-1}")  # of a later commit
    (another,) = release.checkout_problems(root)
    assert "tag of another commit" in another


def test_a_tag_on_this_commit_is_the_packages_version(release):
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    assert list(release.tag_problems(ROOT)) == []


def wheel_of(release, path, lines, version="1.2.3", weight=0):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{release.PACKAGE}-{version}.dist-info/METADATA", "Name: x")
        archive.writestr(
            f"{release.PACKAGE}-{version}.dist-info/entry_points.txt", "\n".join(lines)
        )
        archive.writestr("weights", b"0" * weight)
    return path


def test_faults_of_a_wheel_are_found(release, tmp_path):
    def problems(lines=release.ENTRY_POINTS, **kwargs):
        path = wheel_of(release, tmp_path / "x.whl", lines, **kwargs)
        return list(release.wheel_problems(path, "1.2.3"))

    assert problems() == []
    (size,) = problems(weight=release.MOST_BYTES)
    assert "are the limit" in size
    assert problems(release.ENTRY_POINTS[1:]) == [
        f"x.whl lacks the entry point {release.ENTRY_POINTS[0]}"
    ]
    assert problems(version="1.2.2") == ["x.whl is not of version 1.2.3"]


def test_what_an_sdist_lacks_is_found(release, tmp_path):
    path = tmp_path / "x.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in release.SOURCES[1:]:
            archive.addfile(tarfile.TarInfo(f"{release.PACKAGE}-1.2.3/{name}"), io.BytesIO())
    assert list(release.sdist_problems(path, "1.2.3")) == ["x.tar.gz lacks pyproject.toml"]


def test_what_this_checkout_builds_is_sound(release, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECPLUS_BUILD_KERNELS", "1")  # kernels are for wheels of their own
    wheel, sdist = release.build(ROOT, tmp_path)
    version = release.version_of(ROOT)
    assert wheel.name == f"{release.PACKAGE}-{version}-py3-none-any.whl"
    assert list(release.wheel_problems(wheel, version)) == []
    assert list(release.sdist_problems(sdist, version)) == []


def test_a_release_with_a_fault_is_not_tagged(release, root, monkeypatch):
    monkeypatch.setattr(release, "ROOT", root)
    monkeypatch.setattr(release, "wheel_problems", lambda *_: ["it is too heavy"])
    monkeypatch.setattr(release, "sdist_problems", lambda *_: [])
    monkeypatch.setattr(release, "build", lambda *_: (root / "x.whl", root / "x.tar.gz"))
    with pytest.raises(SystemExit, match="too heavy"):
        release.main(["--tag"])
    assert release.git(root, "tag") == ""
    monkeypatch.setattr(release, "wheel_problems", lambda *_: [])
    release.main(["--tag"])
    assert release.git(root, "tag") == "v1.2.3"
    (root / "dist").mkdir()
    (root / "dist" / "old.whl").touch()
    with pytest.raises(SystemExit, match="not empty"):
        release.main([])
