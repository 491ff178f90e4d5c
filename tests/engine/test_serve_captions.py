"""Captions over ``/v1/images/generations``, with a text encoder in the model's folder."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.engine.test_captions import CONFIG
from tests.engine.test_images import JACOBI
from tests.engine.test_serve_images import opened, serving
from tests.image.test_captions import text_encoder
from vllm_specplus.image import llamagen
from vllm_specplus.image.captions import FOLDER
from vllm_specplus.image.llamagen import LlamaGen
from vllm_specplus.image.pictures import load_pictures
from vllm_specplus.image.vq import VQConfig, VQModel, to_bytes

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(client, plain model, its pictures)."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("text") / "model"
    model = LlamaGen(CONFIG).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    vq = VQModel(VQConfig(
        codebook_size=200, codebook_dim=4, image_channels=3, channels=32, multipliers=(1, 2),
        blocks=1, latent_channels=16,
    ))  # fmt: skip
    codebook = vq.quantize.vectors().detach()
    llamagen.save(folder, dict(model.state_dict()) | {"codebook": codebook}, CONFIG)
    vq.save(folder)
    text_encoder(folder / FOLDER, CONFIG.caption_size)
    with serving(folder, JACOBI, folder.parent / "log", "--dtype", "float32") as client:
        yield client, model, load_pictures(folder)


@torch.inference_mode()
def painted(model: LlamaGen, pictures, caption: str, scale: float) -> torch.Tensor:
    """uint8 [height, width, 3]: the plain model's most probable codes."""
    states = pictures.prompt(caption)["prompt_embeds"][None]
    codes = torch.empty(1, 0, dtype=torch.long)
    for _ in range(36):
        codes = torch.cat((codes, model.guided(codes, states, scale)[:, -1:].argmax(-1)), 1)
    return to_bytes(pictures.decode(codes))[0]


def test_pictures_of_captions(served):
    """Several at once, each with its own guidance, as the plain model paints them."""
    client, model, pictures = served
    captions = ["A Fox", "a fox, jumping", "one small house.", "x", "a fox, jumping"]
    scales = [1.5, 3.0, 7.5, 4.0, 1.0]

    def make(caption: str, scale: float):
        answer = client.images.generate(
            model="pictures", prompt=caption, n=2,
            extra_body={"temperature": 0, "guidance_scale": scale},
        )  # fmt: skip
        return [opened(each) for each in answer.data]

    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(make, captions, scales))
    for caption, scale, answer in zip(captions, scales, answers, strict=True):
        want = painted(model, pictures, caption, scale).numpy()
        assert want.shape == (12, 12, 3)
        for picture in answer:
            assert (picture == want).all()
    assert len({pair[0].tobytes() for pair in answers}) == 5


def test_a_caption_that_is_too_long_is_one_sentence(served):
    import openai

    with pytest.raises(openai.BadRequestError) as error:
        served[0].images.generate(model="pictures", prompt="a fox " * 9)
    assert "the caption has 54 tokens, and this model reads 40: shorten it" in str(error.value)


@pytest.mark.parametrize("prompt", ["a fox", [3, 4]])
def test_other_routes_are_told_what_a_prompt_is(served, prompt):
    import openai

    with pytest.raises(openai.BadRequestError) as error:
        served[0].completions.create(model="pictures", prompt=prompt)
    assert "or send the caption to /v1/images/generations" in str(error.value)
