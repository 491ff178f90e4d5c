"""The family's layout of texts and pictures, its decoder, prompts, and the images route."""

from __future__ import annotations

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests import chameleon
from tests.chameleon import BEGIN, CODES, END, LINE, OPENING, SIZE, TURN, VOCAB, allowed
from tests.image.test_convert_mar import BLOCKS, CHANNELS, MULTIPLIERS, autoencoder, decoded
from tests.image.test_convert_mar import SIZE as LATENT
from vllm_specplus.image.chameleon import (
    CHAMELEON,
    LUMINA,
    NOTHING_KNOWN,
    Known,
    Layout,
    complete,
    load_decoder,
    pixels_of_code,
)
from vllm_specplus.image.pictures import TextPictures, pictures_of
from vllm_specplus.image.vq import to_bytes
from vllm_specplus.samplers.relaxed_sampling import neighbours

KINDS = ("text", "code", "line", "end", "size")


def layout(architecture: str) -> Layout:
    return Layout.of(chameleon.config(architecture))


def written(architecture: str, length: int, seed: int) -> list[int]:
    """A text that keeps to the grammar, with small pictures in it."""
    rng = np.random.default_rng(seed)
    text = [OPENING]
    while len(text) < length:
        kind, tokens, _ = allowed(text, architecture == LUMINA)
        if kind == "size":
            tokens = tokens[:2]
        elif kind == "text":
            tokens = [BEGIN, 30, 31, END]
        text.append(int(rng.choice(tokens)))
    return text


@pytest.mark.parametrize("architecture", chameleon.ARCHITECTURES)
@pytest.mark.parametrize("seed", range(4))
def test_a_text_is_read_on_from_what_is_known(architecture, seed):
    """As if all of it were read again."""
    found, rng = layout(architecture), np.random.default_rng(seed)
    text = np.array(written(architecture, 300, seed), np.int32)
    known, end = NOTHING_KNOWN, 0
    while end < len(text):
        first, end = end, min(end + int(rng.integers(1, 9)), len(text))
        first = int(rng.integers(known.length, first + 1))
        depths = np.arange(1, int(rng.integers(1, 5)), dtype=np.int32)
        want = found.read(text[:end], first, depths)
        kept = found.kept(text[:end], np.full(len(depths), 30), depths)
        assert found.kept(text[:end], np.full(len(depths), 30), depths, known) == kept
        got = found.read(text[:end], first, depths, known)
        assert [each.tolist() for each in got[:2]] == [each.tolist() for each in want[:2]]
        known = got[2]
        assert known == want[2]
        assert known.length == end
    # The control: what is known matters.
    inside = np.flatnonzero(found.begins(text)[:-1] >= 0)[-1] + 1
    wrong = found.begins(text, Known(int(inside), -1))
    assert wrong.tolist() != found.begins(text)[inside:].tolist()


@pytest.mark.parametrize("architecture", chameleon.ARCHITECTURES)
@pytest.mark.parametrize("seed", range(4))
def test_what_may_follow_a_token_is_what_the_grammar_says(architecture, seed):
    """At every token of texts with several pictures, from any token on."""
    found, text = layout(architecture), written(architecture, 120, seed)
    forbidden = found.forbidden()
    truth = [allowed(text[: i + 1], architecture == LUMINA) for i in range(len(text))]
    assert {kind for kind, _, _ in truth} == set(KINDS[: 4 if architecture == CHAMELEON else 5]) - (
        {"line"} if architecture == CHAMELEON else set()
    )
    for first in (0, 50, 119):
        none = np.empty(0, np.int32)
        begins, follows, _ = found.read(np.array(text, np.int32), first, none)
        for i, (kind, tokens, begin) in enumerate(truth[first:]):
            assert KINDS[follows[i]] == kind
            assert begins[i] == begin
            assert np.flatnonzero(~forbidden[follows[i]]).tolist() == tokens


@pytest.mark.parametrize("architecture", chameleon.ARCHITECTURES)
def test_drafts_end_where_a_picture_does(architecture):
    """What is kept of the text's own continuation reads like the text; one more would not."""
    found, text = layout(architecture), np.array(written(architecture, 120, 1), np.int32)
    _, truth, _ = found.read(text, 0, np.empty(0, np.int32))
    begins = found.begins(text)
    for known in range(1, 110):
        draft = text[known : known + 10]
        depths = np.arange(1, len(draft) + 1, dtype=np.int32)
        kept = found.kept(text[:known], draft, depths)
        read = found.read(text[:known], known - 1, depths[:kept])
        assert read[0].tolist() == begins[known - 1 : known + kept].tolist()
        assert read[1].tolist() == truth[known - 1 : known + kept].tolist()
        sized = architecture == CHAMELEON or known - begins[known - 1] > 2
        if kept < len(draft) and (begins[known - 1] < 0 or sized):
            assert draft[kept] in (BEGIN, END)


def test_a_siblings_subtree_is_cut_as_a_whole():
    """Nodes are kept up to the first that is wrong."""
    found = layout(CHAMELEON)
    text = np.array([OPENING, BEGIN, *[4] * 14], np.int32)
    depths = np.array([1, 1, 2, 3, 2], np.int32)
    assert found.kept(text, np.full(5, 4), depths) == 3
    assert found.kept(text[:2], np.array([4, END, 4, 4, 4]), depths) == 1
    assert found.kept(text[:1], np.array([30, 31, BEGIN, 4, 4]), depths) == 2


def test_a_picture_of_a_size_that_does_not_exist_ends_at_once():
    found = layout(LUMINA)
    none = np.empty(0, np.int32)
    _, follows, _ = found.read(np.array([OPENING, BEGIN, 30, SIZE + 2], np.int32), 0, none)
    assert [KINDS[kind] for kind in follows] == ["text", "size", "size", "end"]


def test_codes_are_read_back_row_by_row():
    codes = np.arange(24)
    for architecture, rows, columns in ((CHAMELEON, 4, 4), (LUMINA, 2, 6)):
        found = layout(architecture)
        grid = codes[: rows * columns].reshape(rows, columns)
        tokens = found.codes[grid]
        if architecture == LUMINA:
            tokens = np.pad(tokens, ((0, 0), (0, 1)), constant_values=LINE)
        assert found.grid(tokens.reshape(-1)).tolist() == grid.tolist()


def test_codes_are_interchangeable_with_codes_alone():
    found, vectors = layout(CHAMELEON), torch.randn(CODES, 4)
    near = neighbours(found.by_token(vectors), 5)
    by_code = neighbours(vectors, 5)
    for code, token in enumerate(found.codes.tolist()):
        assert near[token].tolist() == found.codes[by_code[code]].tolist()


def test_the_public_ids():
    """As in the public tokenizer: code 150 is IMGIMGBFAZ, Lumina-mGPT's sizes begin at 8804."""
    names = {"<s>": 0, "<eoss>": 8196, "<racm3:break>": 8197, "<image>": 8711}
    names |= {f"<reserved{i:05d}>": i + 4 for i in range(8706, 9000)}
    letters = [str(i).translate(str.maketrans("0123456789", "ABCDEFGHIJ")) for i in range(8192)]
    names |= {f"IMGIMG{name}Z": token for token, name in enumerate(letters, 4)}
    assert names["IMGIMGBFAZ"] == 154
    keys = {"vocab_size": 65536, "vocabulary_map": names, "vq_config": None}
    config = chameleon.config(LUMINA, **keys)
    found = Layout.of(config)
    assert found.codes.tolist() == list(range(4, 8196))
    assert (found.line, found.size, found.turn, found.side) == (8803, 8804, 8710, 32)
    assert pixels_of_code(config) == 16
    complete(config)
    assert (config.guidance_scale, config.codebook_size) == (4.0, 8192)
    config = chameleon.config(CHAMELEON, **keys, guidance_scale=None)
    complete(config)
    assert config.guidance_scale is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocabulary_map": None}, "must name 24 codes of pictures (IMGIMGAZ, IMGIMGBZ, ...)"),
        (
            {"vocabulary_map": {k: v for k, v in chameleon.vocabulary().items() if k != "<eoss>"}},
            "vocabulary_map in the model's config.json has no '<eoss>'",
        ),
    ],
)
def test_a_config_without_the_ids_is_refused(change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Layout.of(chameleon.config(CHAMELEON, **change))


def vq_config() -> dict:
    return {
        "num_embeddings": CODES, "embed_dim": LATENT, "latent_channels": LATENT,
        "base_channels": CHANNELS, "channel_multiplier": MULTIPLIERS, "num_res_blocks": BLOCKS,
        "resolution": 16,
    }  # fmt: skip


@pytest.fixture(params=["vqgan.ckpt", "model.safetensors"])
def with_decoder(request, tmp_path):
    """(folder of a model with its VQ model in that file, the VQ model's tensors)."""
    tensors = autoencoder() | {"quantize.embedding.weight": torch.randn(CODES, LATENT)}
    if request.param == "vqgan.ckpt":
        torch.save({"state_dict": tensors}, tmp_path / request.param)
    else:
        named = {f"model.vqmodel.{name}": t.contiguous() for name, t in tensors.items()}
        save_file(named | {"lm_head.weight": torch.zeros(2)}, tmp_path / request.param)
    return tmp_path, tensors


def test_pictures_are_decoded_like_by_the_original(with_decoder):
    folder, tensors = with_decoder
    model = load_decoder(chameleon.config(CHAMELEON, vq_config=vq_config()), folder)
    codes = torch.randint(CODES, (2, 3, 5))
    latents = tensors["quantize.embedding.weight"][codes].movedim(-1, 1)
    with torch.inference_mode():
        made = model.decode(codes)
        torch.testing.assert_close(made, decoded(tensors, latents), atol=1e-4, rtol=1e-4)
    assert made.shape == (2, 3, 3 * 4, 5 * 4)


def test_a_folder_without_a_decoder_says_what_is_missing(tmp_path):
    chameleon.build(tmp_path, CHAMELEON)
    with pytest.raises(ValueError, match=r"put Chameleon's vqgan\.ckpt there"):
        load_decoder(chameleon.config(CHAMELEON), tmp_path)


@pytest.fixture(params=[CHAMELEON, LUMINA])
def pictures(request, tmp_path) -> TextPictures:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = chameleon.vocabulary() | {"<image>": 150, "a": 151, "cat": 152, "64x32": 153}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
    tensors = autoencoder() | {"quantize.embedding.weight": torch.randn(CODES, LATENT)}
    torch.save({"state_dict": tensors}, tmp_path / "vqgan.ckpt")
    config = chameleon.config(request.param, vq_config=vq_config(), vocabulary_map=words)
    return pictures_of(config, str(tmp_path))


def test_prompts_are_those_of_the_reference_codes(pictures):
    if pictures.layout.size is None:
        prompt, sampling = pictures.request("a cat", "16x16")
        assert prompt["prompt_token_ids"] == [OPENING, 151, 152, TURN, BEGIN]
        assert sampling["max_tokens"] == 16
        assert pictures.defaults == {"temperature": 0.7, "top_p": 0.9}
        return
    prompt, sampling = pictures.request("a cat", "64x32")
    ids = prompt["prompt_token_ids"]
    # "Generate an image of 64x32 according to the following prompt:\na cat"
    assert ids[:6] == [OPENING, 3, 3, 3, 3, 153]
    assert ids[6:] == [3, 3, 3, 3, 3, 151, 152, TURN, BEGIN, SIZE + 4, SIZE + 8]
    assert sampling["max_tokens"] == 8 * 17
    prompt, sampling = pictures.request("a", None)
    assert prompt["prompt_token_ids"][-2:] == [SIZE + 24, SIZE + 24]
    assert sampling["max_tokens"] == 48 * 49
    assert pictures.defaults == {"temperature": 1.0, "top_k": 2000}


class FakeEngine:
    """Answers every request with one picture, and remembers the parameters."""

    def __init__(self, pictures: TextPictures, length: int):
        self.model_config = SimpleNamespace(max_model_len=length)
        self.pictures, self.seen = pictures, []

    async def generate(self, prompt, params, name):
        self.seen.append((prompt["prompt_token_ids"], params))
        lumina = self.pictures.layout.size is not None
        text = list(prompt["prompt_token_ids"])
        for _ in range(params.max_tokens):
            text.append(allowed(text, lumina)[1][len(text) % 2 - 1])
        made = text[len(prompt["prompt_token_ids"]) :]
        made = SimpleNamespace(token_ids=made, logprobs=None, finish_reason="length")
        yield SimpleNamespace(outputs=[made])


def client(pictures: TextPictures, length: int = 4096):
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from vllm_specplus.engine.image_service import ImageService
    from vllm_specplus.engine.images_api import ImagesEndpoint

    endpoint, engine = ImagesEndpoint(), FakeEngine(pictures, length)
    endpoint.serve(ImageService(engine, pictures), models=None)
    app = FastAPI()
    endpoint.attach_router(app)
    return TestClient(app), engine


def test_the_images_route_answers_with_the_decoded_codes(pictures):
    http, engine = client(pictures)
    size, shape = ("16x16", (16, 16, 3)) if pictures.layout.size is None else ("64x32", (32, 64, 3))
    body = {"prompt": "a cat", "n": 2, "size": size, "seed": 5, "guidance_scale": 2.0, "top_k": 7}
    answer = http.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    seen = [np.asarray(Image.open(io.BytesIO(base64.b64decode(each["b64_json"]))))
            for each in answer.json()["data"]]  # fmt: skip
    assert [each.shape for each in seen] == [shape] * 2
    (ids, first), (_, second) = engine.seen
    assert ids == pictures.request("a cat", size)[0]["prompt_token_ids"]
    assert (first.seed, second.seed, first.top_k) == (5, 6, 7)
    assert (first.temperature, first.top_p) == (
        pictures.defaults["temperature"], pictures.defaults.get("top_p", 1.0)
    )  # fmt: skip
    assert first.extra_args == {"guidance_scale": 2.0}
    text = list(ids)
    for _ in range(first.max_tokens):
        text.append(allowed(text, pictures.layout.size is not None)[1][len(text) % 2 - 1])
    codes = torch.from_numpy(pictures.layout.grid(np.array(text[len(ids) :])))
    assert seen[0].tolist() == to_bytes(pictures.decode(codes[None]))[0].tolist()


def test_a_picture_that_is_not_whole_shows_its_rows(pictures):
    """Lumina-mGPT's have a token behind each row."""
    lumina, side = pictures.layout.size is not None, pictures.layout.side
    rows, stride = (8, 17) if lumina else (side, side)
    prompt, sampling = pictures.request("a cat", "64x32" if lumina else None)
    text, most = list(prompt["prompt_token_ids"]), sampling["max_tokens"]
    for _ in range(most):
        text.append(allowed(text, lumina)[1][len(text) % 2 - 1])
    made = text[len(prompt["prompt_token_ids"]) :]

    def shown(count: int):
        return pictures.beginning(SimpleNamespace(token_ids=made[:count], logprobs=None), most)

    assert shown(stride - 1) is None
    some = shown(2 * stride + 1)
    codes = torch.from_numpy(pictures.layout.grid(np.array(made[: 2 * stride])))
    height = len(some) // rows
    assert some[: 2 * height].tolist() == to_bytes(pictures.decode(codes[None]))[0].tolist()
    assert (some[2 * height :] == 128).all()
    whole = pictures.pixels(SimpleNamespace(token_ids=made, logprobs=None))
    assert some.shape == whole.shape
    assert shown(most).tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": "a", "size": "100x40"}, "size '100x40': this model makes "),
        ({"prompt": "a", "size": "64x"}, "size '64x': this model makes "),
        ({"prompt": "a <image>"}, "only words can be given"),
        ({"prompt": "a <racm3:break>"}, "only words can be given"),
        ({"prompt": "a " * 4096}, "max_model_len is 4096"),
    ],
)
def test_mistakes_are_one_sentence(pictures, body, words):
    http, engine = client(pictures)
    answer = http.post("/v1/images/generations", json=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert engine.seen == []


def test_vocabulary_of_the_tests_fits():
    assert SIZE + 64 < VOCAB
