"""Datastores that are kept for years: documents once, few shards, little waste, old versions."""

from __future__ import annotations

import json
import math
import os
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.datastores import NumberTokenizer, build_datastore, write_corpus
from tests.retrieval.test_datastore import brute_force, contents, find, random_documents
from vllm_specplus.retrieval import corpus as corpora
from vllm_specplus.retrieval import datastore, writer
from vllm_specplus.retrieval.build import Known, add, build
from vllm_specplus.retrieval.corpus import Corpus
from vllm_specplus.retrieval.datastore import (
    DOCUMENTS,
    FIRST,
    INDEX,
    MANIFEST,
    ORDER,
    TOKENS,
    Datastore,
    DatastoreError,
    read_manifest,
    verify,
)

VOCAB = 9
TOKENIZER = NumberTokenizer(VOCAB)


def of(folder: Path) -> Corpus:
    return Corpus.find([folder], "*", "text")


def built(store: Path, folder: Path, append: bool = False, shard_tokens: int = 1 << 20):
    return build(store, of(folder), TOKENIZER, "numbers", VOCAB, shard_tokens, append=append)


# -- a document is stored once ---------------------------------------------------------


def test_touched_moved_and_renamed_inputs_are_not_stored_again(tmp_path):
    documents = random_documents(1, 20, VOCAB)
    text = write_corpus(tmp_path / "text", documents)
    built(tmp_path / "store", text)
    before = contents(tmp_path / "store")
    for file in text.iterdir():
        os.utime(file, (1, 1))
    built(tmp_path / "store", text)
    built(tmp_path / "store", write_corpus(tmp_path / "elsewhere", documents, "x"))
    rows = tmp_path / "rows.jsonl"
    texts = [" ".join(map(str, document)) for document in documents]
    rows.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    add(tmp_path / "store", Corpus.find([rows], "*", "text"), TOKENIZER)
    assert contents(tmp_path / "store") == before


def test_other_text_is_added_only_if_somebody_says_so(tmp_path):
    first, second = random_documents(1, 20, VOCAB), random_documents(2, 20, VOCAB)
    store, text = tmp_path / "store", write_corpus(tmp_path / "text", first)
    built(store, text)
    before = contents(store)
    other = write_corpus(tmp_path / "other", second)
    with pytest.raises(DatastoreError, match=r"holds .*doc00000.* not all of .*: add that with"):
        built(store, other)
    assert contents(store) == before
    built(store, other, append=True)
    assert read_manifest(store).num_documents == 40


def test_of_a_corpus_that_has_changed_only_what_is_new_is_added(tmp_path):
    documents = random_documents(1, 20, VOCAB)
    store, text = tmp_path / "store", write_corpus(tmp_path / "text", documents)
    tokens = built(store, text).num_tokens
    (text / "doc00003.txt").write_text("1 2 3 4")
    (text / "new.txt").write_text("5 6 7")
    with pytest.raises(DatastoreError, match="--append"):
        built(store, text)
    assert built(store, text, append=True).num_tokens == tokens + 5 + 4


def test_equal_documents_of_one_corpus_keep_their_number(tmp_path):
    """How often something was said is what nodes are weighed by."""
    store = tmp_path / "store"
    text = write_corpus(tmp_path / "text", [[1, 2, 3]] * 5 + [[1, 2, 4]])
    assert built(store, text).num_documents == 6
    assert built(store, text).num_documents == 6
    (text / "more.txt").write_text("1 2 3")
    assert built(store, text, append=True).num_documents == 7
    length, after = find(Datastore.open(store), [1, 2])
    assert (length, after) == (2, [[3]] * 6 + [[4]])


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_known_documents_are_taken_one_by_one(stored, wanted):
    known = Known(np.array(stored, np.uint64))
    found = [digest for digest in wanted if known.take(digest)]
    for digest in range(4):
        assert found.count(digest) == min(stored.count(digest), wanted.count(digest))


class Interrupted(Exception):
    pass


def interrupt_after(pieces: int):
    number = count(1)

    def progress(size: int, tokens: int) -> None:
        if next(number) == pieces:
            raise Interrupted

    return progress


@pytest.fixture
def long_document(tmp_path, monkeypatch) -> Path:
    """A document of many pieces between two short ones."""
    monkeypatch.setattr(corpora, "PIECE", 60)
    lines = [" ".join(map(str, each)) for each in random_documents(3, 30, VOCAB)]
    text = write_corpus(tmp_path / "text", [[1, 2], [], [3, 4]])
    (text / "doc00001.txt").write_text("\n".join(lines))
    return text


def test_an_interruption_within_a_document(tmp_path, long_document):
    whole, store = tmp_path / "whole", tmp_path / "store"
    built(whole, long_document, shard_tokens=40)
    assert read_manifest(whole).num_documents == 3
    args = (of(long_document), TOKENIZER, "numbers", VOCAB, 40)
    with pytest.raises(Interrupted):
        build(store, *args, interrupt_after(7))
    partial = read_manifest(store).partial
    assert partial is not None
    assert 0 < partial.pieces < 7
    build(store, *args)
    assert contents(store) == contents(whole)
    assert read_manifest(store).partial is None


def test_a_document_whose_rest_never_comes_is_ended(tmp_path, long_document):
    """What is added behind it must not look like its continuation."""
    store = tmp_path / "store"
    with pytest.raises(Interrupted):
        build(store, of(long_document), TOKENIZER, "numbers", VOCAB, 40, interrupt_after(7))
    other = write_corpus(tmp_path / "other", [[8, 8, 8, 8]])
    with pytest.raises(DatastoreError, match="is unfinished"):
        built(store, other)
    built(store, other, append=True)
    opened = Datastore.open(store)
    place = opened.tokens.tolist().index(opened.manifest.separator, 3)  # the first one is of [1, 2]
    assert opened.tokens[place + 1 : place + 5].tolist() == [8] * 4
    assert opened.manifest.num_documents == 3
    verify(store)


# -- few shards, little waste -------------------------------------------------------------


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.sampled_from([500, 1 << 20]))
@settings(deadline=None)
def test_shards_stay_few_and_are_sorted_seldom(sizes, most):
    shards: list[int] = []
    sorted_tokens = 0
    for size in sizes:
        shards.append(size)
        first = writer.first_to_merge(shards, most)
        if first < len(shards):
            merged = sum(shards[first:])
            assert merged <= most
            sorted_tokens += merged
            shards[first:] = [merged]
    total = sum(sizes)
    assert len(shards) <= 2 * total / most + math.log2(total / min(sizes)) + 2
    assert sorted_tokens <= total * (math.log2(total / min(sizes)) + 1)


def test_many_additions_are_searched_as_one(tmp_path):
    documents = random_documents(1, 5, VOCAB)
    store = build_datastore(tmp_path / "store", documents, VOCAB)
    opened = Datastore.open(store)
    rng, generations = np.random.default_rng(0), set()
    for number in range(40):
        more = random_documents(100 + number, 3, VOCAB)
        add(store, of(write_corpus(tmp_path / f"more{number}", more)), TOKENIZER)
        documents += more
        generations.add(read_manifest(store).generation)
    manifest = verify(store)
    assert len(manifest.shards) <= 6
    assert len(generations) > 2
    sizes = manifest.sizes()
    used = 4 * manifest.num_tokens + len(manifest.shards) * manifest.row_bytes
    assert sum(sizes[name] for name in INDEX) <= 2 * used
    names = {MANIFEST, *map(manifest.file, manifest.names())}
    assert {file.name for file in store.iterdir()} == names
    for _ in range(100):
        context = rng.integers(0, VOCAB, 8).tolist()
        assert find(Datastore.open(store), context) == brute_force(documents, context)
        # Who opened it at the start still has what there was then.
        assert find(opened, context) == brute_force(documents[:5], context)


def test_shards_merge_within_the_memory_that_is_allowed(tmp_path):
    documents = random_documents(1, 60, VOCAB)
    store = build_datastore(tmp_path / "store", documents, VOCAB, 100)
    sizes = [shard.tokens for shard in read_manifest(store).shards]
    assert len(sizes) > 5
    more = of(write_corpus(tmp_path / "more", random_documents(2, 3, VOCAB)))
    manifest = add(store, more, TOKENIZER, 100)
    assert [shard.tokens for shard in manifest.shards[: len(sizes) - 1]] == sizes[:-1]


@pytest.mark.parametrize("name", [TOKENS, DOCUMENTS])
def test_damage_gets_no_new_checksum(tmp_path, name):
    store = build_datastore(tmp_path / "store", random_documents(1, 5, VOCAB), VOCAB)
    content = bytearray((store / name).read_bytes())
    content[0] ^= 1
    (store / name).write_bytes(content)
    more = of(write_corpus(tmp_path / "more", random_documents(2, 20, VOCAB)))
    with pytest.raises(DatastoreError, match=f"damaged: checksum of {name}, shard 0"):
        add(store, more, TOKENIZER)


@pytest.mark.parametrize("name", [TOKENS, DOCUMENTS, ORDER, FIRST])
def test_nothing_is_added_to_what_was_cut_short(tmp_path, name):
    store = build_datastore(tmp_path / "store", random_documents(1, 5, VOCAB), VOCAB)
    os.truncate(store / name, os.path.getsize(store / name) - 1)
    more = of(write_corpus(tmp_path / "more", [[1, 2]]))
    with pytest.raises(DatastoreError, match=f"damaged: {name} has"):
        add(store, more, TOKENIZER)


def test_what_a_crash_left_is_cut_off(tmp_path):
    store = build_datastore(tmp_path / "store", random_documents(1, 5, VOCAB), VOCAB)
    for name in (TOKENS, DOCUMENTS, ORDER, FIRST):
        with open(store / name, "ab") as file:
            file.write(b"half a shard")
    (store / "order.1.bin").write_bytes(b"half a copy")
    (store / f"{MANIFEST}.part").write_text("{")
    add(store, of(write_corpus(tmp_path / "more", [[1, 2]])), TOKENIZER)
    verify(store)
    assert not (store / "order.1.bin").exists()
    assert not (store / f"{MANIFEST}.part").exists()


def test_a_reader_that_a_writer_overtakes_reads_the_newer_manifest(tmp_path, monkeypatch):
    documents = random_documents(1, 5, VOCAB)
    store = build_datastore(tmp_path / "store", documents, VOCAB)
    old = read_manifest(store)
    for number in count():
        more = random_documents(100 + number, 3, VOCAB)
        documents += more
        add(store, of(write_corpus(tmp_path / f"more{number}", more)), TOKENIZER)
        if read_manifest(store).generation:
            break
    read = iter([old])
    newest = datastore.read_manifest
    monkeypatch.setattr(datastore, "read_manifest", lambda path: next(read, None) or newest(path))
    assert find(Datastore.open(store), [1, 2]) == brute_force(documents, [1, 2])


# -- datastores of version 1 ---------------------------------------------------------------


def made_version_1(store: Path, complete: bool = True) -> None:
    """As an earlier vllm-specplus wrote it: shards side by side, no digests."""
    content = json.loads((store / MANIFEST).read_text())
    for shard in content["shards"]:
        del shard["order_at"], shard["first_row"], shard["sha256"][DOCUMENTS]
    log = {"fingerprint": "0" * 32, "description": "old", "pieces": 3, "complete": complete}
    for key in ("id", "generation", "partial"):
        del content[key]
    (store / MANIFEST).write_text(json.dumps(content | {"version": 1, "corpora": [log]}))
    (store / DOCUMENTS).unlink()


def test_a_datastore_of_version_1_is_read_and_added_to(tmp_path):
    documents = random_documents(1, 40, VOCAB)
    store = build_datastore(tmp_path / "store", documents, VOCAB, 100)
    made_version_1(store)
    before = (store / MANIFEST).read_text()
    assert len(verify(store).shards) > 3
    assert find(Datastore.open(store), [1, 2]) == brute_force(documents, [1, 2])
    with pytest.raises(DatastoreError, match="holds old, and not all of"):
        built(store, tmp_path / "store-text")  # what it holds is not known
    assert (store / MANIFEST).read_text() == before
    more = random_documents(2, 40, VOCAB)
    manifest = add(store, of(write_corpus(tmp_path / "more", more)), TOKENIZER)
    assert (manifest.version, manifest.num_documents) == (2, 80)
    assert manifest.id
    verify(store)
    assert find(Datastore.open(store), [1, 2]) == brute_force(documents + more, [1, 2])


def test_an_unfinished_datastore_of_version_1_is_not_gone_on_with(tmp_path):
    store = build_datastore(tmp_path / "store", random_documents(1, 5, VOCAB), VOCAB)
    made_version_1(store, complete=False)
    with pytest.raises(DatastoreError, match="begun by an older vllm-specplus"):
        built(store, tmp_path / "store-text")


@pytest.mark.parametrize("change", [{"shards": [1]}, {"shards": 3}, {"corpora": None}])
def test_a_damaged_manifest_of_version_1(tmp_path, change):
    store = build_datastore(tmp_path / "store", random_documents(1, 5, VOCAB), VOCAB)
    made_version_1(store)
    content = json.loads((store / MANIFEST).read_text())
    (store / MANIFEST).write_text(json.dumps(content | change))
    with pytest.raises(DatastoreError, match="has a damaged manifest"):
        read_manifest(store)
