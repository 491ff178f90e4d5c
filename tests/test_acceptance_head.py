from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file, save_model  # noqa: E402

from vllm_specplus.control.acceptance_head import AcceptanceHead, draft_length  # noqa: E402

H = 6


def weights(num_blocks, shared=False, dtype=torch.float32):
    """A checkpoint with the reference's names."""
    generator = torch.Generator().manual_seed(num_blocks)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    state, block = {}, (normal(H, H), normal(H))
    for i in range(num_blocks):
        if not shared:
            block = normal(H, H), normal(H)
        state[f"model.{i}.linear.weight"], state[f"model.{i}.linear.bias"] = (
            tensor.clone() for tensor in block
        )
    return state | {
        f"model.{num_blocks}.weight": normal(2, H),
        f"model.{num_blocks}.bias": normal(2),
    }


def by_definition(state, num_blocks, hidden):
    x = hidden.double()
    for i in range(num_blocks):
        y = x @ state[f"model.{i}.linear.weight"].double().T + state[f"model.{i}.linear.bias"]
        x = x + y / (1 + torch.exp(-y))
    reject, accept = (
        x @ state[f"model.{num_blocks}.weight"].double().T + state[f"model.{num_blocks}.bias"]
    ).unbind(-1)
    return 1 / (1 + torch.exp(reject - accept))


def hidden_states(n=5):
    return torch.randn(n, H, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(("num_blocks", "shared"), [(0, False), (1, False), (3, False), (3, True)])
def test_loads_and_computes_the_definition(tmp_path, num_blocks, shared):
    state = weights(num_blocks, shared)
    save_file(state, tmp_path / "head.safetensors")
    head = AcceptanceHead.load(tmp_path / "head.safetensors", shared)
    acceptance = head.acceptance(hidden_states())
    assert acceptance.dtype == torch.float32
    assert not acceptance.requires_grad
    expected = by_definition(state, num_blocks, hidden_states()).float()
    torch.testing.assert_close(acceptance, expected)
    assert head.acceptance(hidden_states(0)).shape == (0,)
    # Shared blocks are held once.
    sets = min(num_blocks, 1) if shared else num_blocks
    assert sum(p.numel() for p in head.parameters()) == sets * (H * H + H) + 2 * H + 2


def test_bfloat16_weights_take_any_hidden_and_give_float32(tmp_path):
    state = weights(2, dtype=torch.bfloat16)
    save_file(state, tmp_path / "head.safetensors")
    head = AcceptanceHead.load(tmp_path / "head.safetensors", shared=False)
    assert {p.dtype for p in head.parameters()} == {torch.bfloat16}
    acceptance = head.acceptance(hidden_states())
    assert acceptance.dtype == torch.float32
    expected = by_definition(state, 2, hidden_states()).float()
    torch.testing.assert_close(acceptance, expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("shared", [True, False])
def test_what_training_saves_is_loaded(tmp_path, shared):
    """``save_model`` drops the copies of shared blocks; the file has one block of three."""
    trained = AcceptanceHead(H, 3, shared)
    save_model(trained, str(tmp_path / "head.safetensors"))
    head = AcceptanceHead.load(tmp_path / "head.safetensors", shared)
    torch.testing.assert_close(
        head.acceptance(hidden_states()), trained.acceptance(hidden_states()), rtol=0, atol=0
    )
    if shared:
        with pytest.raises(ValueError, match=r"missing .*share one weight set\? .*shared=True"):
            AcceptanceHead.load(tmp_path / "head.safetensors", shared=False)


@pytest.mark.parametrize("kept", range(3))
def test_a_shared_set_may_have_any_blocks_name(tmp_path, kept):
    state = weights(3, shared=True)
    for i in {0, 1, 2} - {kept}:
        del state[f"model.{i}.linear.weight"], state[f"model.{i}.linear.bias"]
    save_file(state, tmp_path / "head.safetensors")
    head = AcceptanceHead.load(tmp_path / "head.safetensors", shared=True)
    expected = by_definition(weights(3, shared=True), 3, hidden_states()).float()
    torch.testing.assert_close(head.acceptance(hidden_states()), expected)


def drop(*names):
    return lambda state: [state.pop(name) for name in names]


def put(name, tensor):
    return lambda state: state.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "shared", "message"),
    [
        (drop("model.2.weight"), False, r"one last layer named model\.<blocks>\.weight, found 0"),
        (put("model.1.weight", torch.zeros(2, H)), False, "one last layer .* found 2"),
        (drop("model.2.bias"), False, r"missing \['model\.2\.bias'\]"),
        (drop("model.0.linear.bias"), False, r"missing \['model\.0\.linear\.bias'\]"),
        (
            drop("model.0.linear.bias", "model.1.linear.bias"),
            True,
            r"missing \['model\.0\.linear\.bias', 'model\.1\.linear\.bias'\]$",
        ),
        (put("lm_head.weight", torch.zeros(1)), False, r"with 2 blocks: \['lm_head\.weight'\]"),
        (
            put("model.2.linear.bias", torch.zeros(H)),
            False,
            r"with 2 blocks: \['model\.2\.linear\.bias'\]",
        ),
        (
            put("model.2.weight", torch.zeros(3, H)),
            False,
            r"shape \[3, 6\], not \[2, hidden size\]",
        ),
        (put("model.2.weight", torch.zeros(2)), False, r"model\.2\.weight has shape \[2\]"),
        (put("model.2.weight", torch.tensor(1.0)), False, r"model\.2\.weight has shape \[\]"),
        (put("model.1.linear.weight", torch.zeros(H, 5)), False, r"shape \[6, 5\], not \[6, 6\]"),
        (put("model.2.bias", torch.tensor([0.0, torch.nan])), False, "not finite"),
        (put("model.2.bias", torch.zeros(2).half()), False, "not float16, float32"),
        (put("model.0.linear.bias", torch.ones(H)), True, "differ in bias.*shared=False"),
    ],
)
def test_bad_files_are_refused(tmp_path, change, shared, message):
    state = weights(2, shared)
    change(state)
    save_file(state, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=message):
        AcceptanceHead.load(tmp_path / "head.safetensors", shared)


def test_integer_weights_are_refused(tmp_path):
    save_file({k: t.to(torch.int8) for k, t in weights(1).items()}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match="not int8"):
        AcceptanceHead.load(tmp_path / "head.safetensors", shared=False)


def test_pickles_are_not_read(tmp_path):
    torch.save(weights(1), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a safetensors file"):
        AcceptanceHead.load(tmp_path / "pytorch_model.bin", shared=False)
    with pytest.raises(FileNotFoundError):
        AcceptanceHead.load(tmp_path / "nothing.safetensors", shared=False)


@pytest.mark.parametrize("shape", [(H,), (3, H + 1), (1, 3, H)])
def test_hidden_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"hidden must have shape \[N, 6\], not \["):
        AcceptanceHead(H, 1).acceptance(torch.zeros(shape))


@pytest.mark.parametrize(
    ("acceptance", "threshold", "bounds", "length"),
    [
        # Survival .9, .81, .405 once d_2, d_3, d_4 are drawn; d_4 stays.
        ((0.9, 0.9, 0.5), 0.3, (2, 20), 4),
        ((0.9, 0.9, 0.5, 1.0, 1.0), 0.3, (2, 20), 4),
        ((0.5, 1.0), 0.5, (2, 20), 3),  # strictly more than the threshold
        ((0.0, 1.0), 0.3, (2, 20), 2),
        ((0.0, 1.0, 1.0), 0.3, (3, 20), 3),
        ((1.0,) * 30, 0.3, (2, 20), 20),
        ((0.0,) * 30, 1.0, (2, 7), 7),
        ((), 0.3, (2, 20), 1),  # nothing rated yet
        ((0.9,), 0.3, (1, 1), 1),
    ],
)
def test_stop_rule(acceptance, threshold, bounds, length):
    assert draft_length(acceptance, threshold, *bounds) == length


def test_ratings_behind_the_stop_are_not_asked_for():
    """A rating costs a forward of the draft; a head's tensor will do as well as floats."""
    ratings = itertools.chain(torch.tensor([0.9, 0.9, 0.5]), (1 / 0 for _ in range(1)))
    assert draft_length(ratings, 0.3) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.1,), r"threshold must be in \[0, 1\], not 1\.1"),
        ((float("nan"),), r"threshold must be in \[0, 1\]"),
        ((0.3, 0, 5), "need 1 <= minimum <= maximum, not 0 and 5"),
        ((0.3, 6, 5), "need 1 <= minimum <= maximum, not 6 and 5"),
    ],
)
def test_bad_bounds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draft_length((0.9,), *arguments)
