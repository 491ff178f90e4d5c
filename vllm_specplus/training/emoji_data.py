"""Pictures of emoji, with what they show, out of two packages of the npm registry.

    python -m vllm_specplus.training.emoji_data --out emoji64.npz

``emoji-datasource-google`` and ``emoji-datasource-twitter`` (C. Henderson; the packages MIT) hold
bitmaps of 64 x 64 and a table of what they show. The pictures are Noto Emoji (Google, Apache-2.0)
and Twemoji (Twitter, Inc and other contributors, CC-BY 4.0). Packages are fetched by ``npm pack``,
which runs nothing that they hold; they are read as archives, and pictures and tables as such.

A class is a subgroup of Unicode's list, as "animal-mammal"; groups that are too small to learn are
joined to one of their category. Skin tones are left out: they would be half of all pictures.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

VERSION = "16.0.0"
#: Package -> the key by which its table says that there is a picture, and the folder of pictures.
PACKAGES = {
    "emoji-datasource-google": ("has_img_google", "package/img/google/64/"),
    "emoji-datasource-twitter": ("has_img_twitter", "package/img/twitter/64/"),
}
TABLE = "package/emoji.json"
SIDE = 64
#: Emoji of a class, at least; others of their category are one class together.
SMALLEST_CLASS = 8
#: Categories of what is no picture of its own (skin tones), and of what a mirror falsifies: signs
#: with letters and arrows, and flags.
LEFT_OUT = ("Component",)
ONE_WAY = ("Symbols", "Flags")


@dataclass(frozen=True)
class Emoji:
    """One picture of one package."""

    code: str
    """Unicode's, which is the same in both packages."""
    category: str
    group: str
    pixels: np.ndarray
    """uint8 [SIDE, SIDE, 3], on white."""


def fetch(package: str, folder: Path) -> Path:
    """The archive of a package, by npm's own client; RuntimeError says why there is none."""
    command = ["npm", "pack", "--silent", f"{package}@{VERSION}", "--pack-destination", folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError("npm is missing: install Node.js, which brings it") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["npm failed"])[-1]
        raise RuntimeError(f"cannot fetch {package} {VERSION}: {reason}")
    return folder / done.stdout.strip().splitlines()[-1]


def read(archive: Path, key: str, folder: str) -> list[Emoji]:
    """The pictures of a package, in the order of its table."""
    with tarfile.open(archive) as members:
        rows = json.load(_file(members, TABLE))
        rows = [row for row in rows if row[key] and row["category"] not in LEFT_OUT]
        rows.sort(key=lambda row: row["sort_order"])
        return [
            Emoji(
                row["unified"], row["category"], row["subcategory"],
                on_white(Image.open(_file(members, folder + row["image"]))),
            )
            for row in rows
        ]  # fmt: skip


def _file(members: tarfile.TarFile, name: str) -> io.BytesIO:
    found = members.extractfile(name)
    if found is None:
        raise RuntimeError(f"{name} is no file of the package")
    return io.BytesIO(found.read())


def on_white(picture: Image.Image) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]: the picture in the middle, what is transparent white."""
    picture = picture.convert("RGBA")
    if max(picture.size) > SIDE:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", (SIDE, SIDE), "white")
    place = tuple((SIDE - size) // 2 for size in picture.size)
    white.alpha_composite(picture, place)
    return np.asarray(white.convert("RGB"))


def classes(found: list[Emoji], smallest: int = SMALLEST_CLASS) -> list[str]:
    """What each of ``found`` shows: its group, or its category where the group has less than
    ``smallest`` emoji (of any package)."""
    groups = {(emoji.code, emoji.group) for emoji in found}
    sizes = Counter(group for _, group in groups)
    return [
        emoji.group if sizes[emoji.group] >= smallest else f"other {emoji.category}"
        for emoji in found
    ]


def save(found: list[Emoji], out: Path) -> None:
    """``images`` uint8 [N, SIDE, SIDE, 3], ``labels`` int64 [N] into ``classes`` str [C], which
    emoji each is (``codes`` str [N]), and whether its mirror image may be learnt (``mirrors``
    bool [N])."""
    named = classes(found)
    names, labels = np.unique(named, return_inverse=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        out,
        images=np.stack([emoji.pixels for emoji in found]),
        labels=labels.astype(np.int64),
        classes=names,
        codes=np.array([emoji.code for emoji in found]),
        mirrors=np.array([emoji.category not in ONE_WAY for emoji in found]),
    )


def main(
    out: Annotated[Path, typer.Option(help="File to write, emoji64.npz.")],
) -> None:
    """Fetch both packages and write their pictures."""
    found: list[Emoji] = []
    with tempfile.TemporaryDirectory() as scratch:
        for package, (key, folder) in PACKAGES.items():
            try:
                found += read(fetch(package, Path(scratch)), key, folder)
            except (RuntimeError, tarfile.TarError, KeyError) as error:
                typer.echo(f"Error: {package}: {error}", err=True)
                raise typer.Exit(1) from error
    save(found, out)
    typer.echo(f"{out}: {len(found)} pictures of {len(set(classes(found)))} classes")


if __name__ == "__main__":
    typer.run(main)
