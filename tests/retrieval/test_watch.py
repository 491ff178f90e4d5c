"""What happens to a datastore's files while they are served is noticed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.datastores import NumberTokenizer, build_datastore, write_corpus
from tests.retrieval.test_datastore import random_documents
from vllm_specplus.retrieval import watch
from vllm_specplus.retrieval.build import add
from vllm_specplus.retrieval.corpus import Corpus
from vllm_specplus.retrieval.datastore import (
    FIRST,
    MANIFEST,
    ORDER,
    TOKENS,
    Datastore,
    DatastoreError,
)
from vllm_specplus.retrieval.watch import Watch

VOCAB = 9


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(watch, "INTERVAL_S", 0.0)
    return build_datastore(tmp_path / "store", random_documents(1, 40, VOCAB), VOCAB)


def now_differs(file: Path) -> None:
    """Two changes within a tick of the file system's clock have the same time."""
    stamp = os.stat(file).st_ctime_ns
    while os.stat(file).st_ctime_ns == stamp:
        os.utime(file)


def test_nothing_happens(store):
    watched = Watch(Datastore.open(store))
    assert [watched.check() for _ in range(3)] == [None] * 3


@pytest.mark.parametrize("name", [TOKENS, ORDER, FIRST])
def test_a_file_that_is_overwritten_in_place(store, name):
    watched = Watch(Datastore.open(store))
    content = bytes(byte ^ 1 for byte in (store / name).read_bytes())
    with open(store / name, "r+b") as file:
        file.write(content)
    now_differs(store / name)
    for _ in range(2):
        with pytest.raises(DatastoreError, match=f"{name} was overwritten while it is served"):
            watched.check()


def test_a_file_that_is_cut(store):
    watched = Watch(Datastore.open(store))
    os.truncate(store / ORDER, os.path.getsize(store / ORDER) - 1)
    with pytest.raises(DatastoreError, match=r"order\.bin has .* bytes instead of"):
        watched.check()


def test_additions_are_nothing_to_report(store, tmp_path):
    """Neither those behind what is mapped nor copies under other names."""
    watched = Watch(Datastore.open(store))
    for number in range(20):
        more = write_corpus(tmp_path / f"more{number}", random_documents(100 + number, 5, VOCAB))
        add(store, Corpus.find([more], "*", ""), NumberTokenizer(VOCAB))
        assert watched.check() is None
    assert not (store / ORDER).exists()  # another generation's


def test_a_datastore_that_is_replaced_by_renaming_is_told_of_once(store, tmp_path):
    watched = Watch(Datastore.open(store))
    other = build_datastore(tmp_path / "other", random_documents(2, 40, VOCAB), VOCAB)
    store.rename(tmp_path / "old")
    other.rename(store)
    assert "was replaced while it is served" in str(watched.check())
    assert watched.check() is None


@pytest.mark.parametrize("remove", [shutil.rmtree, lambda path: (path / MANIFEST).unlink()])
def test_a_datastore_that_is_removed_is_told_of_once(store, remove):
    watched = Watch(Datastore.open(store))
    remove(store)
    assert "was removed or damaged while it is served" in str(watched.check())
    assert watched.check() is None
