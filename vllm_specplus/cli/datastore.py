"""`vllm-specplus datastore`: build, extend and inspect what `rest` drafts from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vllm_specplus.retrieval import build as building
from vllm_specplus.retrieval.corpus import Corpus, CorpusError
from vllm_specplus.retrieval.datastore import (
    MANIFEST,
    DatastoreError,
    Manifest,
    check_target,
    read_manifest,
)
from vllm_specplus.retrieval.datastore import verify as verify_datastore

app = typer.Typer(no_args_is_help=True, help="Datastores of text, for the method rest.")

#: Corpora that are listed.
MOST_CORPORA = 10

Store = Annotated[Path, typer.Argument(help="Folder of the datastore.", show_default=False)]
Inputs = Annotated[
    list[Path],
    typer.Argument(
        help="Text files, .jsonl, .parquet, or folders of them (see --glob).", show_default=False
    ),
]
Glob = Annotated[str, typer.Option(help="Which files of a folder to read.")]
TextKey = Annotated[str, typer.Option(help="Field of .jsonl and column of .parquet to read.")]
ShardTokens = Annotated[
    int,
    typer.Option(
        min=1024, help="Tokens sorted or merged at a time; about 50 bytes of memory each."
    ),
]


@contextmanager
def _errors() -> Iterator[None]:
    """One line for the user, exit code 1."""
    try:
        yield
    except (DatastoreError, CorpusError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'datastore'}: {error.strerror}; run the same command to go on")
    except KeyboardInterrupt:
        _fail("interrupted; run the same command to go on")


def _fail(message: str) -> None:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1)


@app.command()
def build(
    store: Store,
    inputs: Inputs,
    tokenizer: Annotated[str, typer.Option(help="The model, or its tokenizer: a folder or name.")],
    glob: Glob = "**/*",
    text_key: TextKey = "text",
    shard_tokens: ShardTokens = building.SHARD_TOKENS,
    append: Annotated[
        bool, typer.Option("--append", help="Add what a finished datastore does not hold yet.")
    ] = False,
) -> None:
    """Tokenise a corpus into a new datastore, or finish an interrupted build.

    What is stored already is not stored again.
    """
    with _errors():
        before = _documents(store)
        loaded, vocab_size = _load(tokenizer)
        corpus = Corpus.find(inputs, glob, text_key)
        with _progress(corpus.size) as progress:
            manifest = building.build(
                store, corpus, loaded, tokenizer, vocab_size, shard_tokens, progress, append
            )
    _say_what_came(manifest, before)
    _describe(store, manifest)


@app.command()
def add(
    store: Store,
    inputs: Inputs,
    glob: Glob = "**/*",
    text_key: TextKey = "text",
    tokenizer: Annotated[
        str | None, typer.Option(help="Where the tokenizer is now, if it has moved.")
    ] = None,
    shard_tokens: ShardTokens = building.SHARD_TOKENS,
) -> None:
    """Append what is new in a corpus. Engines that use it see it after their next start."""
    with _errors():
        before = _documents(store)
        loaded, _ = _load(tokenizer or read_manifest(store).tokenizer_name)
        corpus = Corpus.find(inputs, glob, text_key)
        with _progress(corpus.size) as progress:
            manifest = building.add(store, corpus, loaded, shard_tokens, progress)
    _say_what_came(manifest, before)
    _describe(store, manifest)


@app.command()
def info(store: Store) -> None:
    """What a datastore holds."""
    with _errors():
        manifest = read_manifest(store)
    _describe(store, manifest)


@app.command()
def verify(store: Store) -> None:
    """Read all of a datastore and compare its checksums."""
    with _errors(), _progress(read_manifest(store).read_bytes()) as progress:
        manifest = verify_datastore(store, lambda n: progress(n, 0))
    typer.echo(f"{store}: {manifest.num_tokens} tokens, all checksums are right")


@app.command()
def query(
    store: Store,
    text: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    tokenizer: Annotated[
        str | None, typer.Option(help="Where the tokenizer is now, if it has moved.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, max=80, help="Nodes of the draft tree.")] = 16,
) -> None:
    """Show the draft tree that `rest` would make after a text."""
    import numpy as np

    from vllm_specplus.control.acceptance import label_nodes
    from vllm_specplus.proposer import Services
    from vllm_specplus.proposers.rest import Rest, RestConfig
    from vllm_specplus.step import bare_step

    with _errors():
        manifest = verify_datastore(store)  # as an engine's start does
        loaded, vocab_size = _load(tokenizer or manifest.tokenizer_name)
        check_target(manifest, str(store), loaded, vocab_size)
        ids = np.array([loaded.encode(text, add_special_tokens=False)], np.int32)
        if ids.shape[1] < 2:
            _fail("a query needs two tokens of text at least")
        proposer = Rest(RestConfig(datastore=str(store)), Services(vocab_size))
    draft = proposer.propose(bare_step(proposer.sources, ids, nodes))
    if not len(draft.tokens):
        typer.echo("nothing in the datastore continues the last two tokens")
        return
    _, depths = label_nodes(draft.tokens, draft.parents, ids[0], ids.shape[1], ids.shape[1])
    table = Table("token", "source")
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(draft.parents.tolist()):
        children.setdefault(parent, []).append(node)
    stack = children.get(-1, [])[::-1]
    while stack:
        node = stack.pop()
        word = loaded.decode([int(draft.tokens[node])])
        table.add_row(
            "  " * (int(depths[node]) - 1) + repr(word), proposer.sources[draft.sources[node]].name
        )
        stack += children.get(node, [])[::-1]
    Console().print(table)


def _load(name: str) -> tuple[Any, int]:
    """A tokenizer from a folder (or hub name), and the size of the model's vocabulary."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DatastoreError(f"cannot load the tokenizer {name!r}: {reason}") from None
    vocab_size = len(tokenizer)
    with suppress(OSError, ValueError, AttributeError):  # it may be a tokenizer alone
        # A model may have more rows than its tokenizer has tokens.
        vocab_size = max(vocab_size, AutoConfig.from_pretrained(name).get_text_config().vocab_size)
    return tokenizer, vocab_size


@contextmanager
def _progress(size: int) -> Iterator[Callable[[int, int], None]]:
    """A bar over bytes of input; yields what advances it by (bytes, tokens)."""
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("{task.fields[n]}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task, tokens = bar.add_task("", total=size, n=""), 0

        def advance(read: int, tokenised: int) -> None:
            nonlocal tokens
            tokens += tokenised
            bar.update(task, advance=read, n=f"{tokens:,} tokens" if tokens else "")

        yield advance


def _documents(store: Path) -> int:
    """Documents in the datastore, 0 if there is none yet."""
    return read_manifest(store).num_documents if os.path.lexists(store / MANIFEST) else 0


def _say_what_came(manifest: Manifest, before: int) -> None:
    if manifest.num_documents == before:
        typer.echo("nothing to do: all of it is stored already")


def _describe(store: Path, manifest: Manifest) -> None:
    size = sum(manifest.sizes().values())
    table = Table(show_header=False, box=None)
    table.add_row("datastore", str(store))
    table.add_row("tokens", f"{manifest.num_tokens:,} in {len(manifest.shards)} shard(s)")
    table.add_row("documents", f"{manifest.num_documents:,}")
    table.add_row("on disk", f"{size / 1e6:,.1f} MB")
    table.add_row("tokenizer", f"{manifest.tokenizer_name} ({manifest.vocab_size:,} ids)")
    if len(manifest.corpora) > MOST_CORPORA:
        table.add_row("corpora", f"{len(manifest.corpora):,}, the last of them:")
    for corpus in manifest.corpora[-MOST_CORPORA:]:
        state = "" if corpus.complete else " (unfinished: run the same command to go on)"
        table.add_row("corpus", f"{corpus.description}{state}")
    Console().print(table)
