"""LlamaGen of text without an engine: the plain model, captions, checkpoints, prompts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from vllm.exceptions import VLLMValidationError

from tests.image.test_image_models import SMALL, run
from vllm_specplus.image import llamagen
from vllm_specplus.image.captions import FOLDER, CaptionEncoder, clean
from vllm_specplus.image.llamagen import LlamaGen, LlamaGenConfig
from vllm_specplus.image.pictures import CaptionPictures, load_pictures
from vllm_specplus.image.vq import VQModel

CONFIG = LlamaGenConfig(
    codebook_size=20, codebook_dim=4, num_classes=0, grid_size=4, hidden_size=64,
    intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    caption_size=16, caption_tokens=12, guidance_scale=7.5,
)  # fmt: skip


@torch.inference_mode()
def padded(weights: dict, states: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Logits [B, codebook] after ``codes`` [B, n], as the reference code computes them: captions
    ``states`` [B, caption_tokens, size] with their padding on the left, all zeros, masked."""
    config, size = CONFIG, CONFIG.head_dim
    tokens, grid = config.caption_tokens, config.grid_size
    valid = (states != 0).any(-1)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weights[f"{name}.weight"]

    def branch(states):
        x = linear(F.gelu(linear(states, "cls_embedding.cap_proj.fc1"), approximate="tanh"),
                   "cls_embedding.cap_proj.fc2")  # fmt: skip
        x = torch.cat((x, weights["tok_embeddings.weight"][codes]), 1)
        length = x.shape[1]
        # Cosine and sine of a code's row and column, 0 for a caption's positions.
        frequency = 10000 ** -(torch.arange(0, size // 2, 2) / (size // 2))
        place = torch.arange(grid**2)
        angle = torch.cat((torch.outer(place // grid, frequency),
                           torch.outer(place % grid, frequency)), 1)  # fmt: skip
        turn = torch.polar(torch.ones_like(angle), angle)
        turn = torch.cat((torch.zeros(tokens, size // 2, dtype=turn.dtype), turn))[:length]
        sees = torch.ones(length, length, dtype=torch.bool).tril().repeat(len(x), 1, 1)
        sees[:, :, :tokens] &= valid[:, None]
        sees |= torch.eye(length, dtype=torch.bool)
        for i in range(config.num_hidden_layers):
            at = f"layers.{i}"
            heads = linear(norm(x, f"{at}.attention_norm"), f"{at}.attention.wqkv")
            heads = heads.unflatten(-1, (-1, size))
            q, k, v = heads.split((4, 2, 2), dim=2)
            q, k = (
                torch.view_as_real(
                    torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous()) * turn[:, None]
                ).flatten(-2)
                for part in (q, k)
            )
            k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
            score = torch.einsum("bihd,bjhd->bhij", q, k) / size**0.5
            score = score.masked_fill(~sees[:, None], -torch.inf).softmax(-1)
            out = torch.einsum("bhij,bjhd->bihd", score, v).flatten(2)
            x = x + linear(out, f"{at}.attention.wo")
            inner, at = norm(x, f"{at}.ffn_norm"), f"{at}.feed_forward"
            x = x + linear(
                F.silu(linear(inner, f"{at}.w1")) * linear(inner, f"{at}.w3"), f"{at}.w2"
            )
        return linear(norm(x, "norm"), "output")[:, -1]

    unconditional = weights["cls_embedding.uncond_embedding"].expand_as(states)
    given, other = branch(states), branch(unconditional)
    return other + (given - other) * 7.5


@pytest.fixture(scope="module")
def model() -> LlamaGen:
    torch.manual_seed(0)
    model = LlamaGen(CONFIG).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_a_caption_without_padding_is_the_padded_one(model):
    lengths, codes = (1, 3, 7, 12), torch.randint(20, (4, 16))
    states = torch.zeros(4, 12, 16)
    for row, length in zip(states, lengths, strict=True):
        row[12 - length :] = torch.randn(length, 16)
    for count in (0, 1, 5, 15):
        want = padded(dict(model.state_dict()), states, codes[:, :count])
        for i, length in enumerate(lengths):
            with torch.inference_mode():
                got = model.guided(codes[i : i + 1, :count], states[i : i + 1, -length:], 7.5)
            assert got.shape == (1, count + 1, 20)
            torch.testing.assert_close(got[0, -1], want[i], atol=1e-3, rtol=1e-4)


def test_the_configs_ids():
    assert CONFIG.vocab_size == 21
    assert CONFIG.max_position_embeddings == 12 + 16
    assert CONFIG.architectures == ["LlamaGenForTextToImage"]
    again = LlamaGenConfig(**CONFIG.to_dict())
    assert again.to_dict() == CONFIG.to_dict()


@pytest.mark.parametrize(
    ("caption", "read"),
    [
        ("  A Cat,a dog\n and a BIRD! ", "a cat, a dog and a bird!"),
        ("A sign: “Welcome” – in neon", 'a sign: "welcome" - in neon'),
        ("a cube (red) & a sphere [blue]", "a cube red a sphere blue"),
        ("'a man's hat'", "a man's hat"),
        ("a 3.5 inch disk, 4k", "a 3.5 inch disk, 4k"),
        ("half-eaten, well-lit, hand-made, old-fashioned", "half eaten, well lit, hand made, "
         "old fashioned"),
        ("a fox &amp; 日本...", "a fox"),
    ],
)  # fmt: skip
def test_captions_are_cleaned(caption, read):
    assert clean(caption) == read
    assert clean(read) == read


SIGNS = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz ,.!"]


def text_encoder(folder, size: int):
    """A random T5 with a tokenizer of letters, as transformers saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    tokenizer = Tokenizer(
        models.WordLevel({sign: i for i, sign in enumerate(SIGNS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    torch.manual_seed(4)
    config = T5Config(vocab_size=40, d_model=size, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    encoder = T5EncoderModel(config).eval()
    encoder.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    return encoder


@pytest.fixture
def converted(tmp_path, model):
    """(arguments of the converter for files as the public ones are laid out, VQ model)."""
    torch.manual_seed(0)
    vq = VQModel(SMALL)
    state = {"model": model.state_dict() | {"freqs_cis": torch.zeros(3)}, "steps": 7}
    torch.save(state, tmp_path / "ar.pt")
    torch.save({"model": vq.state_dict()}, tmp_path / "vq.pt")
    names = ("--ar", "ar.pt", "--vq", "vq.pt", "--out", "out")
    arguments = [name if name.startswith("-") else f"{tmp_path}/{name}" for name in names]
    return [*arguments, "--grid-size", "4", "--heads", "4"]


def test_a_public_checkpoint_becomes_a_folder_that_reads_captions(tmp_path, model, converted):
    from safetensors.torch import load_file

    encoder = text_encoder(tmp_path / "t5", 16)
    done = run(*converted, "--text-encoder", f"{tmp_path}/t5")
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    made = LlamaGenConfig(**json.loads((out / "config.json").read_text()))
    for name in ("vocab_size", "max_position_embeddings", "architectures", "caption_size",
                 "caption_tokens", "guidance_scale", "num_classes", "num_key_value_heads",
                 "intermediate_size"):  # fmt: skip
        assert getattr(made, name) == getattr(CONFIG, name)
    weights = load_file(out / "model.safetensors")
    del weights["codebook"]
    LlamaGen(made).load_state_dict(weights)

    pictures = load_pictures(out)
    assert isinstance(pictures, CaptionPictures)
    assert pictures.defaults == {"temperature": 1.0, "top_k": 1000, "top_p": 1.0}
    states = pictures.prompt("A Fox!")["prompt_embeds"]
    with torch.inference_mode():
        # Padded and masked, as the reference code has it read.
        ids = torch.tensor([[*map(SIGNS.index, "a fox!"), 1] + 5 * [0]])
        mask = (torch.arange(12) < 7)[None].long()
        want = encoder(input_ids=ids, attention_mask=mask).last_hidden_state[0, :7]
    torch.testing.assert_close(states, want, atol=1e-5, rtol=1e-4)


def test_without_a_text_encoder_captions_are_refused(converted, tmp_path):
    done = run(*converted)
    assert done.exit_code == 0, done.output
    with pytest.raises(ValueError, match=r"text_encoder is not there: write it with .*convert"):
        load_pictures(tmp_path / "out").prompt("a fox")


def test_captions_that_are_too_long_are_refused(tmp_path):
    text_encoder(tmp_path / FOLDER, 16)
    encoder = CaptionEncoder(tmp_path, 12, 16)
    assert encoder.states("abcdefghijk").shape == (12, 16)
    with pytest.raises(ValueError, match="the caption has 13 tokens, and this model reads 12"):
        encoder.states("abcdefghijkl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--text-encoder", "{}/t5"], "states of width 8, and this model was trained with 16"),
        (["--text-encoder", "{}/nothing"], "--text-encoder"),
    ],
)
def test_a_wrong_text_encoder_is_not_converted(tmp_path, converted, change, message):
    text_encoder(tmp_path / "t5", 8)
    done = run(*converted, *(each.format(tmp_path) for each in change))
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", "").split())
    assert not (tmp_path / "out").exists()


ALLOWED = r"prompt_embeds of shape \(1 to 12, 16\)"


@pytest.fixture
def renderer(tmp_path, model):
    from vllm_specplus.engine.models.serving import CaptionRenderer

    weights = dict(model.state_dict()) | {"codebook": torch.zeros(20, 4)}
    llamagen.save(tmp_path, weights, CONFIG)
    renderer = object.__new__(CaptionRenderer)
    renderer.model_config = SimpleNamespace(
        hf_config=CONFIG, model=str(tmp_path), dtype=torch.float32, enable_prompt_embeds=True
    )
    return renderer


def test_prompts_are_captions(renderer, model):
    states = torch.randn(5, 16)
    read = renderer._process_embeds({"prompt_embeds": states, "cache_salt": "a"})
    want = model.cls_embedding(states).detach()
    torch.testing.assert_close(read["prompt_embeds"], want, atol=1e-6, rtol=1e-5)
    assert read["prompt_token_ids"] == [20] * 5
    assert read["is_token_ids"] == [False] * 5
    salts = {
        renderer._process_embeds({"prompt_embeds": states[:count]} | salt)["cache_salt"]
        for count in (4, 5) for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "b"})
    }  # fmt: skip
    assert len(salts) == 6


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt_embeds": torch.zeros(0, 16)},
        {"prompt_embeds": torch.zeros(13, 16)},
        {"prompt_embeds": torch.zeros(5, 64)},
        {"prompt_embeds": torch.zeros(16)},
        {"prompt_embeds": torch.zeros(5, 16, dtype=torch.long)},
        {"prompt_embeds": torch.zeros(2, 16), "prompt_token_ids": [3, 4]},
    ],
    ids=lambda prompt: str(prompt["prompt_embeds"].shape),
)
def test_other_embeddings_are_refused(renderer, prompt):
    with pytest.raises(VLLMValidationError, match=ALLOWED):
        renderer._process_embeds(prompt)


def test_tokens_and_texts_are_refused(renderer):
    with pytest.raises(VLLMValidationError, match=ALLOWED):
        renderer.validate_token_ids([3])
    with pytest.raises(VLLMValidationError, match=ALLOWED):
        renderer._tokenize_prompt({"prompt": "a fox"}, None)
