"""The embedded models of emoji: what is read, and one command each, on a few squares."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from vllm_specplus.image.continuous.folder import LatentsFolder
from vllm_specplus.image.pictures import load_pictures
from vllm_specplus.image.quality import Gaussian, PictureClassifier
from vllm_specplus.training import emoji, emoji_data, emoji_latents
from vllm_specplus.training.emoji import Pictures, shifted


def run(main, *arguments: str):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(arguments))


def archive(path: Path, key: str, folder: str, rows: list[dict]) -> Path:
    """A package as npm packs it, with a picture of one colour for each row."""

    def add(members: tarfile.TarFile, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        members.addfile(info, io.BytesIO(content))

    with tarfile.open(path, "w:gz") as members:
        add(members, emoji_data.TABLE, json.dumps(rows).encode())
        for row in rows:
            if row[key]:
                out = io.BytesIO()
                Image.new("RGBA", (64, 64), (row["sort_order"], 0, 0, 255)).save(out, "PNG")
                add(members, folder + row["image"], out.getvalue())
    return path


def row(number: int, category: str, group: str, there: bool = True) -> dict:
    return {
        "unified": f"1F{number:03X}", "image": f"1f{number:03x}.png", "category": category,
        "subcategory": group, "sort_order": number, "has_img_google": there,
    }  # fmt: skip


def test_pictures_are_read_out_of_the_package(tmp_path):
    key, folder = emoji_data.PACKAGES["emoji-datasource-google"]
    rows = [row(2, "Food", "fruit"), row(1, "Food", "drink"), row(3, "Food", "drink", False),
            row(4, "Component", "skin-tone")]  # fmt: skip
    found = emoji_data.read(archive(tmp_path / "p.tgz", key, folder, rows), key, folder)
    assert [each.code for each in found] == ["1F001", "1F002"]
    assert found[0].pixels.shape == (64, 64, 3)
    assert found[0].pixels[0, 0].tolist() == [1, 0, 0]


def test_what_is_transparent_is_white_and_what_is_small_in_the_middle():
    picture = Image.new("RGBA", (32, 16), (10, 20, 30, 255))
    pixels = emoji_data.on_white(picture)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[32, 32].tolist() == [10, 20, 30]
    assert int((pixels == (10, 20, 30)).all(-1).sum()) == 32 * 16
    assert (emoji_data.on_white(Image.new("RGBA", (99, 99), (0, 0, 0, 0))) == 255).all()


def test_small_groups_are_one_class_of_their_category():
    nothing = np.zeros((64, 64, 3), np.uint8)
    found = [emoji_data.Emoji(str(i), "Food", "fruit", nothing) for i in range(3)]
    found += [emoji_data.Emoji("9", "Food", "drink", nothing)] * 4  # one emoji of four packages
    assert emoji_data.classes(found, 3) == ["fruit"] * 3 + ["other Food"] * 4


def squares(path: Path, count: int = 60) -> Path:
    """Squares on white; a class is a colour, and an emoji has two pictures."""
    rng = np.random.default_rng(0)
    images = np.full((count, 64, 64, 3), 255, np.uint8)
    for i in range(count):
        top, left = rng.integers(0, 40, 2)
        images[i, top : top + 24, left : left + 24] = np.eye(3)[i % 3] * 200
    labels = np.arange(count) % 3
    np.savez(
        path, images=images, labels=labels, classes=np.array(["red", "green", "blue"]),
        codes=np.array([str(i % (count // 2)) for i in range(count)]), mirrors=labels > 0,
    )  # fmt: skip
    return path


def test_both_styles_of_an_emoji_are_on_one_side(tmp_path):
    shown, held, classes = emoji.read(squares(tmp_path / "s.npz"))
    assert classes == ["red", "green", "blue"]
    assert (len(held) % 2, len(shown) + len(held)) == (0, 60)
    assert 0 < len(held) <= 6


def test_variants_are_moved_and_mirrored_where_that_is_allowed():
    pixels = torch.arange(2 * 3 * 16.0).view(2, 3, 4, 4)
    some = Pictures(pixels, torch.tensor([5, 6]), torch.tensor([False, True]))
    every, labels = some.variants()
    assert every.shape == (15, 3, 4, 4)
    assert labels.tolist() == [5, 6, 6] * 5
    assert every[2].equal(pixels[1].flip(2))
    for shift, part in zip(emoji.SHIFTS, every.split(3), strict=True):
        down, right = shift
        moved = shifted(pixels, shift)
        assert part[:2].equal(moved)
        inside = moved[:, :, max(down, 0) : 4 + min(down, 0), max(right, 0) : 4 + min(right, 0)]
        back = pixels[:, :, max(-down, 0) : 4 - max(down, 0), max(-right, 0) : 4 - max(right, 0)]
        assert inside.equal(back)
        assert int((moved == 1.0).sum()) >= 2 * 3 * 4 * (down or right != 0)


def test_crops_are_parts_of_the_pictures():
    torch.manual_seed(0)
    pixels = torch.rand(4, 3, 64, 64)
    some = Pictures(pixels, torch.arange(4), torch.zeros(4, dtype=torch.bool))
    crops = some.crops(5)
    assert crops.shape == (5, 3, 32, 32)
    # A patch of each, away from what shifts bring in, is somewhere in a picture.
    windows = pixels.unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    for crop in crops:
        apart = (windows - crop[:, 14:17, 14:17]).abs().amax((1, 2, 3))
        assert float(apart.min()) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("emoji")
    data = squares(folder / "s.npz")
    done = run(
        emoji.main, "--data", str(data), "--out", str(folder / "codes"), "--scale", "0.002",
        "--hidden", "32", "--layers", "1",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder / "codes", data


@pytest.mark.slow
def test_one_command_makes_the_folder_of_codes(made):
    folder, _ = made
    reads = load_pictures(folder)
    assert (reads.side, reads.config.num_classes, reads.config.codebook_size) == (64, 3, 1024)
    assert reads.prompt("green") == {"prompt_token_ids": [1025]}
    assert reads.decode(torch.zeros(2, 256, dtype=torch.long)).shape == (2, 3, 64, 64)
    classifier = PictureClassifier.load(folder)
    assert (classifier.config.name, classifier.config.classes) == ("emoji", 3)
    assert Gaussian.load(folder).covariance.shape == (64, 64)
    log = json.loads((folder / "log.json").read_text())
    assert log["data"]["classes"] == 3
    assert {"vq", "llamagen", "classifier", "codes"} <= set(log)


@pytest.mark.slow
def test_one_command_makes_the_folder_of_latents(made, tmp_path):
    codes, data = made
    done = run(
        emoji_latents.main, "--data", str(data), "--out", str(tmp_path), "--classifier",
        str(codes / "classifier"), "--scale", "0.001", "--vae-steps", "2",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for folder, masked in ((tmp_path, False), (tmp_path / "masked", True)):
        found = LatentsFolder.load(folder)
        assert (found.masked, found.length, found.size, found.num_classes) == (masked, 256, 8, 3)
        assert found.classifier.config.name == "emoji"
        target, draft = (
            sum(each.numel() for each in model.parameters())
            for model in (found.target, found.draft)
        )
        assert 4 < target / draft < 5
