"""Pictures that wait to be fetched: for how long, and how many."""

from __future__ import annotations

import pytest

from vllm_specplus.engine.picture_links import PictureLinks


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_name_is_its_pictures_until_its_time_is_over():
    clock = Clock()
    links = PictureLinks(100, 10.0, clock)
    first, second = links.put([b"one", b"two"], "png")
    assert first != second
    assert len(first) > 32
    assert links.get(first).content == b"one"
    assert links.get(second).kind == "png"
    clock.now += 5
    (third,) = links.put([b"three"], "webp")
    clock.now += 5
    assert links.get(first) is links.get(second) is None
    assert links.get(third).content == b"three"
    assert links.get("another") is None


def test_the_oldest_give_way_and_one_request_is_kept_as_a_whole():
    links = PictureLinks(10, 10.0, Clock())
    (old,) = links.put([bytes(6)], "png")
    (kept,) = links.put([bytes(4)], "png")
    both = links.put([bytes(3), bytes(3)], "png")
    assert links.get(old) is None
    assert all(links.get(name) for name in (kept, *both))
    with pytest.raises(ValueError, match="11 bytes, and 10 are kept for links: ask for fewer"):
        links.put([bytes(6), bytes(5)], "png")
    assert len(links) == 3
    assert len(links.put([bytes(10)], "png")) == len(links) == 1
