"""Building, searching and distrusting datastores."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.datastores import NumberTokenizer, build_datastore, write_corpus
from vllm_specplus.cli.main import app
from vllm_specplus.retrieval import datastore
from vllm_specplus.retrieval.build import add, build
from vllm_specplus.retrieval.corpus import PIECE, Corpus, CorpusError
from vllm_specplus.retrieval.datastore import (
    DOCUMENTS,
    FIRST,
    MANIFEST,
    ORDER,
    TOKENS,
    Datastore,
    DatastoreError,
    verify,
)
from vllm_specplus.retrieval.search import SAMPLES, TOTAL, continuations_trie, longest_match
from vllm_specplus.retrieval.writer import first_positions, sort_backwards

ROOT = Path(__file__).parents[2]


def random_documents(seed: int, count: int, vocab: int, length: int = 40) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, rng.integers(1, length)).tolist() for _ in range(count)]


def find(store: Datastore, context: list[int], longest: int = 16) -> tuple[int, list[list[int]]]:
    """(length of the match, what follows at each matching place up to its document's end)."""
    ranges = np.zeros((len(store.manifest.shards), 2), np.int64)
    text = np.array(context, np.int32)
    length = longest_match(
        store.tokens, store.order, store.first, store.shards, text, len(text), 2, longest, ranges
    )
    rest = []
    for s, (low, high) in enumerate(ranges):
        begin, end, part, _ = store.shards[s]
        for place in store.order[part + low : part + high]:
            after = store.tokens[begin + int(place) + 1 : end].tolist()
            separator = store.manifest.separator
            rest.append(after[: after.index(separator)] if separator in after else after)
    return length, sorted(rest)


def brute_force(documents: list[list[int]], context: list[int], longest: int = 16):
    for n in range(min(longest, len(context)), 1, -1):
        pattern = context[-n:]
        rest = [
            document[i + n :]
            for document in documents
            for i in range(len(document) - n + 1)
            if document[i : i + n] == pattern
        ]
        if rest:
            return n, sorted(rest)
    return 0, []


# -- sorting and searching ------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.sampled_from(["<u2", "<u4"]))
@settings(max_examples=40, deadline=None)
def test_positions_are_sorted_by_the_text_read_backwards(seed, dtype):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 4, 60).astype(dtype)
    tokens[rng.integers(0, 60, 5)] = np.iinfo(tokens.dtype).max
    order = sort_backwards(tokens).tolist()
    assert order == sorted(range(60), key=lambda i: tokens[: i + 1][::-1].tolist())
    first = first_positions(tokens, 4)
    for token in range(4):
        assert (tokens[order[first[token] : first[token + 1]]] == token).all()


@pytest.mark.parametrize("vocab", [4, 152_000])
def test_the_longest_match_is_that_of_a_scan(tmp_path, vocab):
    """Small alphabets match long; ids beyond 65,535 survive the file."""
    high = vocab - 4
    documents = [[high + t for t in d] for d in random_documents(0, 12, 4)]
    store = Datastore.open(build_datastore(tmp_path / "store", documents, vocab, 60))
    assert len(store.manifest.shards) > 2
    assert store.tokens.dtype == ("<u2" if vocab == 4 else "<u4")
    rng = np.random.default_rng(1)
    lengths = set()
    for _ in range(400):
        context = (high + rng.integers(0, 4, rng.integers(2, 20))).tolist()
        if rng.random() < 0.5:  # a piece of what is stored, perhaps with a wrong beginning
            document = documents[rng.integers(len(documents))]
            context[-len(document) :] = document[: len(context)]
        expected = brute_force(documents, context)
        assert find(store, context) == expected
        lengths.add(expected[0])
    assert {2, 3, 4, 8, 16} <= lengths


def test_a_trie_counts_its_continuations(tmp_path):
    documents = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6], [9, 1, 2], [7, 7]]
    store = Datastore.open(build_datastore(tmp_path / "store", documents, 10))
    ranges = np.zeros((1, 2), np.int64)
    text = np.array([8, 1, 2], np.int32)
    assert longest_match(
        store.tokens, store.order, store.first, store.shards, text, 3, 2, 16, ranges
    ) == 2  # fmt: skip
    tokens, parents, weights = (np.zeros(SAMPLES * 8, np.int32) for _ in range(3))
    nodes, followed = continuations_trie(
        store.tokens, store.order, store.shards, 10, ranges, SAMPLES, 0, tokens, parents, weights
    )
    assert followed == 4  # one of them ends with its document
    paths = {}
    for i in range(nodes):
        above = next((p for p, j in paths.items() if j == parents[i]), ())
        paths[(*above, int(tokens[i]))] = i
    assert {p: int(weights[i]) for p, i in paths.items()} == {
        (3,): 2, (3, 4): 1, (3, 5): 1, (6,): 1,
    }  # fmt: skip


def test_many_matches_are_sampled_evenly_and_never_cross_documents(tmp_path):
    documents = [[5, 6, i, 90, 91, 92] for i in range(10, 80)] * 4 + [[5, 6]] * 40
    store = Datastore.open(build_datastore(tmp_path / "store", documents, 100, 200))
    ranges = np.zeros((len(store.manifest.shards), 2), np.int64)
    text = np.array([5, 6], np.int32)
    longest_match(store.tokens, store.order, store.first, store.shards, text, 2, 2, 16, ranges)
    assert (ranges[:, 1] - ranges[:, 0]).sum() == len(documents)
    tokens, parents, weights = (np.zeros(SAMPLES * 8, np.int32) for _ in range(3))
    nodes, followed = continuations_trie(
        store.tokens, store.order, store.shards, 100, ranges, SAMPLES, 0, tokens, parents, weights
    )
    assert followed == SAMPLES
    roots = tokens[:nodes][parents[:nodes] < 0]
    assert len(roots) > 20  # not only the first in order
    assert (tokens[:nodes] < 100).all()
    assert nodes <= max(TOTAL, SAMPLES * 8)


# -- building ---------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    manifest = datastore.read_manifest(folder)
    return {name: (folder / manifest.file(name)).read_bytes() for name in manifest.names()}


def test_equal_corpora_make_equal_datastores_in_any_number_of_runs(tmp_path):
    documents = random_documents(3, 50, 9)
    whole = build_datastore(tmp_path / "a", documents, 9, 100)
    again = build_datastore(tmp_path / "b", documents, 9, 100)
    assert contents(whole) == contents(again)
    assert verify(whole).num_documents == 50


def test_two_processes_share_one_datastore(tmp_path):
    """Both have it mapped at the same time, and find the same."""
    documents = random_documents(3, 50, 9)
    store = build_datastore(tmp_path / "store", documents, 9, 100)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.retrieval.test_datastore import Datastore, find\n"
        "store = Datastore.open(Path(sys.argv[1]))\n"
        "print('open', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(find(store, [3, 4, 5]), find(store, [1, 2]))\n"
    )
    line = [sys.executable, "-c", program, str(store)]
    pipe = subprocess.PIPE
    readers = [subprocess.Popen(line, cwd=ROOT, text=True, stdin=pipe, stdout=pipe) for _ in "ab"]
    for reader in readers:
        assert reader.stdout.readline() == "open\n"
    answers = [reader.communicate("go\n", timeout=120)[0] for reader in readers]
    mine = Datastore.open(store)
    assert answers == [f"{find(mine, [3, 4, 5])} {find(mine, [1, 2])}\n"] * 2


def test_appending_touches_nothing_that_is_stored(tmp_path):
    first, second = random_documents(1, 20, 9), random_documents(2, 20, 9)
    store = build_datastore(tmp_path / "store", first, 9)
    reader, before = Datastore.open(store), contents(store)
    context = first[0][:2] if len(first[0]) > 1 else [1, 2]
    found = find(reader, context)
    more = Corpus.find([write_corpus(tmp_path / "more", second)], "*", "")
    manifest = add(store, more, NumberTokenizer(9))
    assert manifest.num_documents == 40
    assert contents(store)[TOKENS].startswith(before[TOKENS])
    assert find(reader, context) == found  # an engine that runs goes on with what it opened
    assert find(Datastore.open(store), context) == brute_force(first + second, context)
    verify(store)
    with pytest.raises(DatastoreError, match="another tokenizer"):
        add(store, more, NumberTokenizer(8))


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_build_goes_on(tmp_path, stop_after):
    """Whatever was appended after the last named shard is cut off first."""
    documents = random_documents(4, 60, 9)
    whole = build_datastore(tmp_path / "whole", documents, 9, 150)
    corpus = Corpus.find([tmp_path / "whole-text"], "*", "")

    class Enough(Exception):
        pass

    def interrupt(size, tokens):
        interrupt.tokens += tokens
        if interrupt.tokens > 150 * stop_after + 100:
            raise Enough

    interrupt.tokens = 0
    part = tmp_path / "part"
    with pytest.raises(Enough):
        build(part, corpus, NumberTokenizer(9), "numbers", 9, 150, interrupt)
    manifest = datastore.read_manifest(part)
    assert len(manifest.shards) == stop_after
    with open(part / ORDER, "ab") as file:
        file.write(b"half a shard")
    build(part, corpus, NumberTokenizer(9), "numbers", 9, 150)
    assert contents(part) == contents(whole)
    verify(part)


def test_an_interrupted_build_goes_on_with_what_has_changed(tmp_path):
    """What was stored of a file that is another now stays; the others are not stored again."""
    documents = random_documents(4, 60, 9)
    text = write_corpus(tmp_path / "text", documents)
    tokenizer = NumberTokenizer(9)

    def interrupt(size, tokens):
        interrupt.calls += 1
        if interrupt.calls > 40:
            raise KeyboardInterrupt

    interrupt.calls = 0
    store, corpus = tmp_path / "store", Corpus.find([text], "*", "")
    with pytest.raises(KeyboardInterrupt):
        build(store, corpus, tokenizer, "numbers", 9, 100, interrupt)
    other = Corpus.find([write_corpus(tmp_path / "other", [[1]])], "*", "")
    with pytest.raises(DatastoreError, match=r"is unfinished: .* was interrupted"):
        build(store, other, tokenizer, "numbers", 9, 100)
    (text / "doc00000.txt").write_text("1 2 3 4 5 6 7 8")
    manifest = build(store, corpus, tokenizer, "numbers", 9, 100)
    assert manifest.num_documents == 61
    assert [log.complete for log in manifest.corpora] == [True]
    assert find(Datastore.open(store), [1, 2, 3, 4, 5, 6, 7])[0] == 7


def test_one_writer_at_a_time(tmp_path):
    text = write_corpus(tmp_path / "text", [[1, 2, 3]])
    tokenizer, store = NumberTokenizer(9), tmp_path / "store"

    def second(size, tokens):
        with pytest.raises(DatastoreError, match="another process is writing"):
            build(store, Corpus.find([text], "*", ""), tokenizer, "numbers", 9)
        second.tried = True

    build(store, Corpus.find([text], "*", ""), tokenizer, "numbers", 9, progress=second)
    assert second.tried
    verify(store)


def test_foreign_folders_are_left_alone(tmp_path):
    text = write_corpus(tmp_path / "text", [[1, 2]])
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.doc").write_text("x")
    with pytest.raises(DatastoreError, match=r"not empty and not a datastore .*thesis\.doc"):
        build(
            tmp_path / "home", Corpus.find([text], "*", ""), NumberTokenizer(9), "numbers", 9
        )  # fmt: skip


# -- corpora ------------------------------------------------------------------------


def test_texts_come_back_whole_and_in_pieces(tmp_path):
    long = "".join(f"line {i} of a long text\n" for i in range(3 * PIECE // 20))
    (tmp_path / "a.txt").write_text(long)
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": long}) + "\n"
    )
    (tmp_path / "c.txt").write_bytes(b"not \xff utf-8")
    pieces = list(Corpus.find([tmp_path], "**/*", "text").pieces())
    documents, text = [], ""
    for piece in pieces:
        assert len(piece.text) < 3 * PIECE
        text += piece.text
        if piece.ends_document:
            documents.append(text)
            text = ""
    assert documents == [long, "one", long, "not � utf-8"]
    assert len(pieces) > 6
    sizes = sum(p.size for p in pieces)
    assert sizes == pytest.approx(Corpus.find([tmp_path], "**/*", "text").size, rel=0.01)


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"body": ["first", "second"]}).to_parquet(str(path))
    assert [p.text for p in Corpus.find([path], "*", "body").pieces()] == ["first", "second"]
    with pytest.raises(CorpusError, match=r"no text under 'text' \(found: body\)"):
        list(Corpus.find([path], "*", "text").pieces())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": 1}', "line 1: no text under 'text'"),
        ("{", "line 1: not valid JSON"),
        ('["x"]', "no text under 'text' .found: list"),
    ],
)
def test_bad_json_lines(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(CorpusError, match=message):
        list(Corpus.find([tmp_path], "*", "text").pieces())


def test_missing_inputs(tmp_path):
    with pytest.raises(CorpusError, match="neither a file nor a folder"):
        Corpus.find([tmp_path / "nothing"], "*", "text")
    with pytest.raises(CorpusError, match=r"no file in .* matches '\*\.py'"):
        Corpus.find([tmp_path], "*.py", "text")


# -- distrust -------------------------------------------------------------------------


def damaged(tmp_path) -> Path:
    return build_datastore(tmp_path / "store", random_documents(5, 40, 9), 9, 200)


@pytest.mark.parametrize("name", [TOKENS, DOCUMENTS, ORDER, FIRST])
def test_a_truncated_file_is_refused(tmp_path, name):
    store = damaged(tmp_path)
    os.truncate(store / name, os.path.getsize(store / name) - 1)
    with pytest.raises(DatastoreError, match=f"is damaged: {name} has .* bytes instead of"):
        Datastore.open(store)
    (store / name).unlink()
    with pytest.raises(DatastoreError, match=name):
        Datastore.open(store)


@pytest.mark.parametrize("name", [TOKENS, DOCUMENTS, ORDER, FIRST])
def test_a_changed_byte_is_found(tmp_path, name):
    store = damaged(tmp_path)
    content = bytearray((store / name).read_bytes())
    content[len(content) // 2] ^= 1
    (store / name).write_bytes(content)
    with pytest.raises(DatastoreError, match=f"checksum of {name}, shard"):
        verify(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "format version 3, this vllm-specplus reads 1 to 2: update"),
        ({"version": 0}, "format version 0, this vllm-specplus reads 1 to 2: build it again"),
        ({"version": -1}, "format version -1"),
        ({"version": True}, r"damaged manifest\.json \(version\)"),
        ({"format": "something"}, "is not a datastore of vllm-specplus"),
        ({"shards": "none"}, r"damaged manifest\.json \(shards\)"),
        ({"unknown": 1}, r"damaged manifest\.json \(unknown\)"),
        ({"shards": []}, "is empty"),
    ],
)
def test_strange_manifests(tmp_path, change, message):
    store = damaged(tmp_path)
    manifest = json.loads((store / MANIFEST).read_text())
    (store / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(DatastoreError, match=message):
        Datastore.open(store)
    (store / MANIFEST).write_text("\x80{")
    with pytest.raises(DatastoreError, match="damaged"):
        Datastore.open(store)
    with pytest.raises(DatastoreError, match="is not a datastore"):
        Datastore.open(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_a_manifest_that_is_no_file(tmp_path, make):
    """Reading a pipe would wait for ever."""
    store = damaged(tmp_path)
    (store / MANIFEST).unlink()
    make(store / MANIFEST)
    corpus = Corpus.find([tmp_path / "store-text"], "*", "")
    for use in (Datastore.open, verify, lambda path: add(path, corpus, NumberTokenizer(9))):
        with pytest.raises(DatastoreError, match=r"is not a datastore \(no file manifest"):
            use(store)
    with pytest.raises(DatastoreError, match=r"is not a datastore \(no file manifest"):
        build(store, corpus, NumberTokenizer(9), "numbers", 9)


def test_the_model_must_fit(tmp_path):
    store = damaged(tmp_path)
    manifest = datastore.read_manifest(store)
    datastore.check_target(manifest, "s", NumberTokenizer(9), 9)
    datastore.check_target(manifest, "s", None, 12)  # a padded vocabulary
    with pytest.raises(DatastoreError, match="another tokenizer"):
        datastore.check_target(manifest, "s", NumberTokenizer(8), 9)
    with pytest.raises(DatastoreError, match="vocabulary of 9, the model's has 8"):
        datastore.check_target(manifest, "s", None, 8)


# -- as users meet it -----------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A byte-level tokenizer as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the log"], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def command(*args, **kwargs) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "vllm_specplus.cli.main", "datastore", *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=300, **kwargs)


def invoke(*args):
    """The same in this process: a new one imports for seconds."""
    return CliRunner().invoke(app, ["datastore", *map(str, args)])


@pytest.mark.slow
def test_the_commands(tmp_path, tokenizer_folder):
    store, text = tmp_path / "store", tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\nthe dog sat on the log\n" * 3)
    done = command("build", store, text, "--tokenizer", tokenizer_folder)
    assert done.returncode == 0, done.stderr
    assert re.search(r"documents +1 *\n", done.stdout)
    shown = invoke("query", store, "dog sat on", "--nodes", "6")
    assert "' the'" in shown.stdout
    assert "datastore, match" in shown.stdout
    nothing = invoke("query", store, "zebra qq")
    assert "nothing in the datastore" in nothing.stdout
    assert "all checksums are right" in invoke("verify", store).stdout
    assert str(tokenizer_folder) in invoke("info", store).stdout.replace("\n", "")
    again = invoke("build", store, text, "--tokenizer", tokenizer_folder)
    assert again.exit_code == 0
    assert "nothing to do" in again.stdout
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "a zebra and a zebu"}))
    unsaid = invoke("build", store, other, "--tokenizer", tokenizer_folder)
    assert unsaid.exit_code == 1
    assert "add that with --append" in unsaid.stderr
    assert invoke("add", store, other).exit_code == 0
    assert "'z'" in invoke("query", store, "and a").stdout
    last = tmp_path / "last.txt"
    last.write_text("the gnu")
    args = ("build", store, last, "--tokenizer", tokenizer_folder, "--append")
    assert invoke(*args).exit_code == 0
    assert re.search(r"documents +3 *\n", invoke("info", store).stdout)
    for args, message in [
        (("info", tmp_path / "none"), "is not a datastore"),
        (("build", tmp_path / "new", other, "--tokenizer", tmp_path), "cannot load the tokenizer"),
        (
            ("build", tmp_path / "new", tmp_path / "gone", "--tokenizer", tokenizer_folder),
            "neither",
        ),
    ]:
        failed = invoke(*args)
        assert failed.exit_code == 1
        assert message in failed.stderr
        assert "Traceback" not in failed.stderr


def test_a_query_trusts_no_damaged_datastore(tmp_path, tokenizer_folder):
    store, text = tmp_path / "store", tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 3)
    invoke("build", store, text, "--tokenizer", tokenizer_folder)
    content = bytearray((store / ORDER).read_bytes())
    content[0] ^= 1
    (store / ORDER).write_bytes(content)
    failed = invoke("query", store, "the cat sat")
    assert failed.exit_code == 1
    assert "checksum of order.bin, shard 0, differs" in failed.stderr


@pytest.fixture
def big_text(tmp_path) -> Path:
    """Enough for several shards of the smallest size."""
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "mat", "and", "dog", "log"]
    folder = tmp_path / "big"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i:04}.txt").write_text(" ".join(rng.choice(words, 400)))
    return folder


@pytest.mark.slow
def test_killed_and_resumed(tmp_path, tokenizer_folder, big_text):
    args = (big_text, "--tokenizer", tokenizer_folder, "--shard-tokens", "2048")
    whole, store = tmp_path / "whole", tmp_path / "store"
    assert command("build", whole, *args).returncode == 0
    line = [sys.executable, "-m", "vllm_specplus.cli.main", "datastore", "build", store, *args]
    child = subprocess.Popen([str(part) for part in line], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (store / MANIFEST).exists() and datastore.read_manifest(store).shards:
            break
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    shards = len(datastore.read_manifest(store).shards)
    assert 0 < shards < len(datastore.read_manifest(whole).shards)
    resumed = command("build", store, *args)
    assert resumed.returncode == 0, resumed.stderr
    assert contents(store) == contents(whole)
    verify(store)


@pytest.mark.slow
def test_a_full_disk(tmp_path, tokenizer_folder, big_text):
    """A limit on file sizes stands for it: writing fails in the same call."""
    import resource

    args = (big_text, "--tokenizer", tokenizer_folder, "--shard-tokens", "2048")
    store = tmp_path / "store"

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    full = command("build", store, *args, preexec_fn=limit)
    assert full.returncode == 1
    assert "run the same command to go on" in full.stderr
    assert "Traceback" not in full.stderr
    assert datastore.read_manifest(store).shards
    assert command("build", store, *args).returncode == 0
    verify(store)
