"""What travels between the engine and a draft's process."""

from __future__ import annotations

import socket
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from vllm_specplus.overlap.channel import Channel, ChannelClosed
from vllm_specplus.overlap.messages import Message, from_bytes, to_bytes
from vllm_specplus.overlap.steps import Asked, StepReader, StepTeller
from vllm_specplus.step import Sampling, Source, StepContext, TargetRows, bare_step

CPU = torch.device("cpu")
SOURCES = (Source("draft", "draft", 0.5),)


def test_a_message_is_what_was_packed():
    arrays = {
        "none": np.empty((0, 3), np.float32), "some": np.arange(7, dtype=np.int32),
        "true": np.array([[True], [False]]), "bytes": np.arange(5, dtype=np.uint8),
        "strided": np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::2],
    }  # fmt: skip
    fields = {"a": 1, "b": [None, "c"], "price": float("inf")}
    found = Message.unpack(Message("kind", fields, arrays).pack())
    assert (found.kind, found.fields) == ("kind", fields)
    for name, each in arrays.items():
        assert found.arrays[name].dtype == each.dtype
        np.testing.assert_array_equal(found.arrays[name], each)


def test_no_objects_travel():
    raw = Message("kind", {}, {"x": np.zeros(1, np.int64)}).pack()
    with pytest.raises(ValueError, match="objects"):
        Message.unpack(raw.replace(b"<i8", b"|O8"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4)])
def test_tensors_travel_bit_by_bit(dtype, shape):
    tensor = torch.randn(shape).to(dtype)
    back = from_bytes(to_bytes(tensor), dtype, CPU)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


@pytest.fixture
def ends():
    pair = [Channel(each) for each in socket.socketpair()]
    yield pair
    for each in pair:
        each.close()


def test_a_channel_keeps_the_order_and_does_not_block_its_ends(ends):
    """One that is not listened to takes more than any buffer of the system holds."""
    here, there = ends
    large = np.zeros(1 << 22, np.uint8)
    start = time.monotonic()
    for i in range(8):
        here.send("large", {"x": large}, number=i)
    assert here.receive(0) is None
    assert time.monotonic() - start < 5
    assert [there.receive(10).fields["number"] for _ in range(8)] == list(range(8))


def test_the_end_of_a_channel_is_heard_behind_what_was_said(ends):
    here, there = ends
    here.send("last")
    here.close()
    assert there.receive(10).kind == "last"
    for _ in range(2):
        with pytest.raises(ChannelClosed):
            there.receive(10)
    with pytest.raises(ChannelClosed):
        there.send("late")


def test_what_is_no_message_ends_the_channel():
    stream, other = socket.socketpair()
    channel = Channel(other)
    stream.sendall(b"\0\0\0\5hello")
    with pytest.raises(ChannelClosed):
        channel.receive(10)
    stream.close()


class Conversation:
    """Steps of texts that grow, and what the other side makes of them."""

    def __init__(self) -> None:
        self.teller, self.reader = StepTeller(8), StepReader(CPU)
        self.sizes: list[int] = []

    def tell(self, step: StepContext) -> StepContext:
        requests = len(step.request_ids)
        asked = Asked(7, True, 0.25, np.arange(requests) / 8, np.full((requests, 4), 0.5))
        message = Message.unpack(self.teller.message(step, asked).pack())
        self.sizes.append(len(message.arrays["tokens"]))
        told, what = self.reader.read(message)
        assert (what.number, what.wanted, what.price) == (7, True, 0.25)
        np.testing.assert_array_equal(what.worth, asked.worth)
        np.testing.assert_array_equal(what.followed, asked.followed)
        for r, length in enumerate(step.num_tokens.tolist()):
            np.testing.assert_array_equal(told.token_ids[r, :length], step.token_ids[r, :length])
        np.testing.assert_array_equal(told.max_nodes, step.max_nodes)
        assert told.request_ids == step.request_ids
        return told


def test_only_what_is_new_of_a_text_travels():
    talk = Conversation()
    texts = np.random.default_rng(0).integers(0, 99, (2, 400)).astype(np.int32)
    step = bare_step(SOURCES, texts, 4)
    for lengths, versions, size in (
        ([300, 100], [1, 2], 400),
        ([303, 101], [1, 2], 4),
        ([304, 90], [1, 3], 91),  # another text of that name
        ([304, 92], [1, 3], 2),
    ):
        talk.tell(
            replace(step, num_tokens=np.array(lengths, np.int32), versions=np.array(versions))
        )
        assert talk.sizes[-1] == size
    talk.teller.forget("request 0")
    talk.reader.forget("request 0")
    talk.tell(replace(step, num_tokens=np.array([305, 93], np.int32), versions=np.array([1, 3])))
    assert talk.sizes[-1] == 306


def test_what_drafting_needs_travels():
    texts = np.zeros((2, 20), np.int32)
    sampling = Sampling(
        np.array([0.0, 0.7], np.float32), np.array([5, 9], np.int32),
        np.array([1.0, 0.9], np.float32), [None, 1 << 62],
    )  # fmt: skip
    rows = TargetRows(
        torch.randn(3, 8).bfloat16(), np.array([3, 4, 9]), np.array([0, 2, 3]),
        np.arange(40, dtype=np.int32).reshape(2, 20),
    )  # fmt: skip
    step = replace(
        bare_step(SOURCES, texts, 4), sampling=sampling, target_rows=rows,
        chain_only=np.array([True, False]), max_nodes=np.array([0, 4], np.int32),
    )  # fmt: skip
    told = Conversation().tell(step)
    assert told.sampling.seeds == sampling.seeds
    for name in ("temperature", "top_k", "top_p"):
        np.testing.assert_array_equal(getattr(told.sampling, name), getattr(sampling, name))
    assert told.chain_only.tolist() == [True, False]
    assert torch.equal(told.target_rows.states, rows.states)
    assert told.target_rows.pages.tolist() == rows.pages[:, :3].tolist()  # 20 tokens
    assert told.target_rows.positions.tolist() == [3, 4, 9]
