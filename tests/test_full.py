"""Long tests are stamped with what they cover: a change that they have not seen fails here."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from tests import stamps

HERE = {"t", "u", "new", "gone"}


def test_every_long_test_has_passed_as_its_files_are(pytestconfig):
    """Of those that were collected: all of them in `make test` and `make check`."""
    tests, files = pytestconfig.stash[stamps.LONG], pytestconfig.stash[stamps.FILES]
    assert stamps.stale(tests, files) == [], "run `make full` and commit tests/full.json"


def report(name="t", when="call", outcome="passed", digest="d1"):
    return SimpleNamespace(
        nodeid=name, when=when, passed=outcome == "passed", failed=outcome == "failed",
        duration=1.25, user_properties=[("covers", digest)] if digest else [],
    )  # fmt: skip


def finish(path, *reports):
    stamping = stamps.Stamping(path)
    for each in reports:
        stamping.pytest_runtest_logreport(each)
    stamping.pytest_sessionfinish()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "full.json"


def test_what_passes_is_stamped_and_others_stamps_stay(path):
    finish(path, report(when="setup"), report(), report("u"), report("short", digest=None))
    assert stamps.stale({"t": "d1", "u": "d1"}, HERE, path) == []
    finish(path, report("u", digest="d2"))
    assert stamps.stale({"t": "d1", "u": "d2"}, HERE, path) == []
    assert json.loads(path.read_text())["tests"]["t"] == {"digest": "d1", "seconds": 1.2}


@pytest.mark.parametrize("when", ["setup", "call", "teardown"])
def test_what_fails_loses_its_stamp(path, when):
    finish(path, report())
    finish(path, report(), report(when=when, outcome="failed"))
    assert stamps.stale({"t": "d1"}, HERE, path) == ["t: never passed"]


def test_what_is_stale_is_said(path):
    tests = {"t": "d1", "new": "d1"}
    assert stamps.stale(tests, HERE, path) == ["t: never passed", "new: never passed"]
    finish(path, report(digest="d0"), report("gone"))
    assert stamps.stale(tests, HERE, path) == [
        "t: its files have changed since it passed", "new: never passed",
        "gone: stamped, and no more there",
    ]  # fmt: skip
    assert len(stamps.stale(tests, {"t"}, path)) == 2


def test_a_digest_is_of_paths_and_contents(tmp_path):
    for name, text in (("a/x.py", "1"), ("a/b/y.py", "2"), ("c.py", "3")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    digests = [stamps.digest(["a/**/*.py", "a/x.py"], tmp_path)]
    assert stamps.digest(["a/*.py", "a/b/y.py"], tmp_path) == digests[0]
    (tmp_path / "c.py").write_text("4")
    assert stamps.digest(["a/**/*.py"], tmp_path) == digests[0]
    (tmp_path / "a/b/y.py").write_text("5")
    digests.append(stamps.digest(["a/**/*.py"], tmp_path))
    (tmp_path / "a/b/y.py").rename(tmp_path / "a/b/z.py")
    digests.append(stamps.digest(["a/**/*.py"], tmp_path))
    assert len(set(digests)) == 3
    with pytest.raises(ValueError, match=r"'d/\*' names no file"):
        stamps.digest(["d/*"], tmp_path)
