"""``vllm-specplus serve-latents``: the images route for a masked model, without vLLM's engine."""

from __future__ import annotations

import asyncio
import base64
import io

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from typer.testing import CliRunner

from vllm_specplus.cli.main import app as command
from vllm_specplus.cli.model import LATENTS_MODEL
from vllm_specplus.engine.latents_server import make_app
from vllm_specplus.image.continuous.batches import Batches
from vllm_specplus.image.continuous.folder import LatentsFolder
from vllm_specplus.image.continuous.generation import Cspd, PictureMaker, Recipe

MASKED = LATENTS_MODEL / "masked"
RECIPE = Recipe(iterations=4, cspd=Cspd(window=2), guidance_scale=1.5)


@pytest.fixture(scope="module")
def app():
    batches = Batches(LatentsFolder.load(MASKED), RECIPE, 8)
    yield make_app(batches, "mar", api_key="key")
    batches.close()


def client_of(app, key: str = "key") -> openai.AsyncOpenAI:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False))
    return openai.AsyncOpenAI(
        base_url="http://server/v1", api_key=key, max_retries=0, http_client=http
    )


def asked(app, **keys):
    return asyncio.run(client_of(app).images.generate(**{"prompt": "7", "model": "mar"} | keys))


def opened(data) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.b64_json))))


def test_pictures_are_those_of_the_library(app):
    answer = asked(app, n=3, extra_body={"seed": 2**40})
    expected = PictureMaker(MASKED, RECIPE)([7, 7, 7], [2**40 + i for i in range(3)])
    for each, picture in zip(answer.data, expected, strict=True):
        # Sums in batches of another shape differ by rounding.
        assert np.abs(opened(each).astype(int) - picture[..., 0]).max() <= 2
    assert answer.usage.output_tokens == 3 * 64


def test_a_request_may_have_its_own_guidance_and_several_go_side_by_side(app):
    async def all_of_them():
        client = client_of(app)
        return await asyncio.gather(*(
            client.images.generate(
                prompt=str(i % 10), extra_body={"seed": i, "guidance_scale": 1.0 + i % 2}
            )
            for i in range(12)
        ))  # fmt: skip

    answers = asyncio.run(all_of_them())
    for i, answer in enumerate(answers):
        recipe = RECIPE.model_copy(update={"guidance_scale": 1.0 + i % 2})
        expected = PictureMaker(MASKED, recipe)([i % 10], [i])[0, ..., 0]
        assert np.abs(opened(answer.data[0]).astype(int) - expected).max() <= 2


def test_events_and_names_and_keys(app):
    async def stream():
        events = await client_of(app).images.generate(prompt="1", stream=True, partial_images=2)
        return [event.type async for event in events]

    assert asyncio.run(stream()) == ["image_generation.completed"]

    async def names():
        return [each.id async for each in client_of(app).models.list()]

    assert asyncio.run(names()) == ["mar"]
    with pytest.raises(openai.AuthenticationError):
        asyncio.run(client_of(app, "wrong").images.generate(prompt="1"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt": "a cat"}, "names no class of this model (it has '0', '1'"),
        ({"size": "64x64"}, "this model makes 32x32"),
        ({"extra_body": {"temperature": 0}}, "temperature is 0: latents are drawn"),
        ({"extra_body": {"top_p": 0.5}}, "top_p is for tokens"),
        ({"extra_body": {"vllm_xargs": {"specplus.enabled": False}}}, "for an engine of vLLM's"),
    ],
)
def test_mistakes_are_one_sentence(app, keys, message):
    with pytest.raises(openai.BadRequestError) as error:
        asked(app, **keys)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere has no config.json"),
        ([str(MASKED), "--recipe", '{"rounds": 3}'], "--recipe: unknown key 'rounds'"),
        ([str(MASKED), "--recipe", "{"], "--recipe: "),
        ([str(MASKED), "--recipe", '{"iterations": 65}'], "a picture of 64 latents has 1 to 64"),
        ([str(MASKED), "--device", "tv"], "tv"),
    ],
)
def test_what_cannot_be_served_ends_the_start_with_one_sentence(arguments, message):
    result = CliRunner().invoke(command, ["serve-latents", *arguments])
    assert result.exit_code == 2
    assert message in result.output
