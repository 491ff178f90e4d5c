"""Needs of a launch, read off stand-ins of vLLM's objects, and the sentence for each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_specplus import capabilities
from vllm_specplus.capabilities import TEXT, Found, Need, gaps
from vllm_specplus.config import parse
from vllm_specplus.engine import names, needs
from vllm_specplus.target import Target


def engine_args(**changes):
    fields = {"kv_cache_dtype": "auto", "scheduler_cls": None}
    return SimpleNamespace(**fields | changes)


def model_config(text=None, **changes):
    fields = {"runner_type": "generate", "hf_text_config": SimpleNamespace(**(text or {}))}
    return SimpleNamespace(**fields | changes)


def parallel_config(**changes):
    return SimpleNamespace(**{"worker_cls": "auto"} | changes)


def problems(args=None, model=None, parallel=None, device="cpu", method="token_recycling"):
    config = parse({"method": method}) if isinstance(method, str) else method
    try:
        needs.check_launch(
            config, args or engine_args(), model or model_config(), parallel or parallel_config(),
            device,
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    return None


def test_ordinary_launches_are_served():
    assert problems() is None
    assert problems(parallel=parallel_config(worker_cls=names.WORKERS["cpu"])) is None
    served = engine_args(
        tensor_parallel_size=8, data_parallel_size=2, enable_expert_parallel=True,
        kv_cache_dtype="bfloat16", async_scheduling=False, video_pruning_rate=0.0,
        reasoning_config=object(), kv_transfer_config=None, attention_backend="cpu_attn",
    )  # fmt: skip
    assert problems(served) is None


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"device": "tpu"}, "this device ('tpu'): run it on a CPU"),
        ({"parallel": parallel_config(worker_cls="my.Worker")}, "worker_cls='my.Worker'"),
        ({"args": engine_args(scheduler_cls="my.Scheduler")}, "scheduler_cls='my.Scheduler'"),
        ({"args": engine_args(pipeline_parallel_size=2)}, "pipeline parallelism"),
        ({"args": engine_args(decode_context_parallel_size=2)}, "context parallelism"),
        ({"args": engine_args(prefill_context_parallel_size=2)}, "context parallelism"),
        ({"args": engine_args(enable_dbo=True)}, "remove --enable-dbo"),
        ({"args": engine_args(async_scheduling=True)}, "remove --async-scheduling"),
        ({"args": engine_args(kv_cache_dtype="fp8_inc")}, "kv_cache_dtype='fp8_inc'"),
        ({"args": engine_args(kv_cache_dtype="turboquant_k8v4")}, "a quantized KV cache"),
        ({"args": engine_args(kv_transfer_config={})}, "(--kv-transfer-config): remove it"),
        ({"args": engine_args(kv_offloading_size=1.0)}, "(--kv-offloading-size): remove it"),
        ({"args": engine_args(kv_sharing_fast_prefill=True)}, "remove --kv-sharing-fast-prefill"),
        ({"args": engine_args(enable_prompt_embeds=True)}, "remove --enable-prompt-embeds"),
        ({"args": engine_args(enable_elastic_ep=True)}, "remove --enable-elastic-ep"),
        ({"args": engine_args(video_pruning_rate=0.5)}, "remove --video-pruning-rate"),
        ({"args": engine_args(attention_backend="FLASHINFER")}, "(FLASHINFER): remove --attent"),
        ({"model": model_config(is_hybrid=True)}, "recurrent layers"),
        ({"model": model_config(is_attention_free=True)}, "recurrent layers"),
        ({"model": model_config(is_encoder_decoder=True)}, "encoder-decoder models"),
        ({"model": model_config({"attn_logit_softcapping": 9.0}, use_mla=True)}, "soft-capped"),
        ({"model": model_config(uses_xdrope_dim=4)}, "XD-RoPE"),
        ({"model": model_config(rswa_window=64)}, "reference sliding-window"),
        ({"model": model_config(runner_type="pooling")}, "models that generate nothing"),
        ({"model": model_config({"engram_layer_ids": [1]})}, "n-grams"),
        ({"model": model_config({"sparse_attention_config": {"on": 1}})}, "sparse attention"),
        ({"model": model_config({"layer_types": ["full_attention", "linear_attention"]})},
         "recurrent layers"),
        ({"model": model_config({"layer_types": ["full_attention", "braided"]})},
         "a kind of attention that it does not know (layers of type 'braided')"),
    ],
)  # fmt: skip
def test_what_nobody_serves_is_one_sentence(case, words):
    sentence = problems(**case)
    assert sentence.startswith("speculative method 'token_recycling' does not work with ")
    assert words in sentence
    assert ": " in sentence
    assert "\n" not in sentence


#: What goes by positions, and scores beside those of keys.
POSITIONAL = (
    model_config(uses_alibi=True), model_config({"attn_logit_softcapping": 50.0}),
    model_config({"model_type": "gpt_oss"}), model_config({"add_swa_attention_sink_bias": True}),
    model_config({"model_type": "mistral", "sliding_window": 4096}),
    model_config({"layer_types": ["sliding_attention", "full_attention"]}),
    model_config({"attention_chunk_size": 8192}),
)  # fmt: skip


@pytest.fixture
def two_backends(monkeypatch):
    """As on a GPU: the preferred one serves less."""
    able = frozenset({Need.KV_SHARING, Need.SLIDING_WINDOW, Need.ALIBI, Need.ATTENTION_SINKS,
                      Need.LOGITS_SOFT_CAP, Need.CHUNKED_ATTENTION})  # fmt: skip
    served = {"FLASH_ATTN": frozenset({Need.KV_SHARING}), "TRITON_ATTN": able}
    monkeypatch.setattr(needs, "served_by_backends", lambda device: served)
    monkeypatch.setattr(needs, "backends", lambda device: dict.fromkeys(served, ""))
    monkeypatch.setitem(names.WORKERS, "cuda", "worker")


def test_a_checkpoint_may_ask_for_a_cache_of_bytes(two_backends):
    """Which our kernels on GPUs do not read yet."""
    quantized = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}, "quant_method": "x"}
    model = model_config(hf_config=SimpleNamespace(quantization_config=quantized))
    assert needs.has_fp8_cache(engine_args(), model)
    assert "kv_cache_dtype='auto', which is 'fp8" in problems(model=model, device="cuda")
    bfloat16 = engine_args(kv_cache_dtype="bfloat16")
    assert problems(bfloat16, model, device="cuda") is None
    assert not needs.has_fp8_cache(bfloat16, model)


@pytest.mark.parametrize("model", POSITIONAL)
def test_a_back_end_that_serves_the_model_is_chosen(two_backends, model):
    assert problems(model=model, device="cuda") is None
    assert needs.backend_for(engine_args(), model, "cuda") == "TRITON_ATTN"
    for chosen, words in (("flash_attn", "remove --attention-backend, or choose TRITON_ATTN"),
                          ("TRITON_ATTN", None)):  # fmt: skip
        args = engine_args(attention_backend=chosen)
        assert needs.backend_for(args, model, "cuda") is None
        sentence = problems(args, model, device="cuda")
        assert sentence is None if words is None else sentence.endswith(words)


def test_any_back_end_will_do_for_an_ordinary_model(two_backends):
    assert needs.backend_for(engine_args(), model_config(), "cuda") is None
    assert needs.backend_for(engine_args(), model_config(use_mla=True), "cuda") is None
    assert needs.backend_for(engine_args(), model_config(uses_alibi=True), "cpu") == "TRITON_ATTN"


@pytest.mark.parametrize("model", POSITIONAL)
def test_the_cpu_serves_what_goes_by_positions(model):
    assert problems(model=model) is None
    assert needs.backend_for(engine_args(), model, "cpu") is None


@pytest.mark.parametrize(("device", "name"), [("cpu", "CPU_MLA"), ("cuda", "TRITON_MLA")])
def test_latents_have_a_back_end_of_their_own(device, name):
    """Which has to be named: vLLM would choose another; and which serves no options."""
    model = model_config(use_mla=True)
    assert problems(model=model, device=device) is None
    assert needs.backend_for(engine_args(), model, device) == name
    assert needs.backend_for(engine_args(attention_backend=name), model, device) is None
    fp8 = engine_args(kv_cache_dtype="fp8")
    assert "an FP8 KV cache" in problems(fp8, model, device=device)
    (need,) = {found.need for found in needs.of_model(model)}
    assert needs.served_by_attention(device, needs.of_model(model)) == {need}
    assert need not in needs.served_by_attention(device, [])


def test_what_stays_of_a_text_behind_a_window():
    model = {"max_model_len": 8192}
    windows = {"model_type": "mistral", "sliding_window": 4096}
    mixed = windows | {"layer_types": ["sliding_attention", "full_attention"]}
    assert needs.kept_tokens(model_config(windows, **model)) == 4096
    assert needs.kept_tokens(model_config(windows, max_model_len=4096)) is None
    assert needs.kept_tokens(model_config(mixed, **model)) is None
    full = windows | {"layer_types": ["full_attention"] * 2}
    assert needs.kept_tokens(model_config(full, **model)) is None
    assert needs.mixes_windows(model_config(mixed))
    assert not needs.mixes_windows(model_config(windows))
    target = Target(lambda: None, 9, "mistral", 4, 1, 8, keeps=4096)
    for method in ("layer_skip", "early_exit"):
        with pytest.raises(ValueError, match="set --max-model-len to that at most, or use"):
            parse({"method": method}).check_target(target)


def test_all_needs_are_told_each_once():
    args = engine_args(async_scheduling=True, kv_cache_dtype="fp8_inc", kv_transfer_config={},
                       kv_offloading_size=2.0)  # fmt: skip
    sentences = problems(args, model_config(is_hybrid=True)).split("; speculative method ")
    assert len(sentences) == 4


def test_v2_runner_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert "unset VLLM_USE_V2_MODEL_RUNNER" in problems()


def test_rotary_positions_of_several_axes_are_the_methods_affair():
    model = model_config(uses_mrope=True)
    assert problems(model=model) is None
    assert "use a method that drafts without" in problems(
        model=model, method=parse({"method": "layer_skip"})
    )
    fused = {"method": "rasd", "sources": ["token_recycling", {"method": "early_exit"}]}
    assert "M-RoPE" in problems(model=model, method=parse(fused))


def test_every_need_is_refused_by_default_and_has_a_remedy():
    for need in Need:
        (sentence,) = gaps([Found(need, "somewhere")], "x", engine=frozenset(), method=frozenset())
        assert sentence == f"x does not work with {need.what} (somewhere): {need.remedy}"
        assert need.remedy


def test_the_table_is_in_order():
    assert [need.name for need in Need] == sorted(need.name for need in Need)
    assert len({need.what for need in Need}) == len(Need)


# -- models of pictures -----------------------------------------------------------------


OURS = SimpleNamespace(model=names.DRAFTER, method="custom_class")
FOREIGN = SimpleNamespace(model=None, method="ngram")


def image_config(parallel=None, **changes):
    fields = {
        "parallel_config": parallel_config(**(parallel or {})),
        "scheduler_config": SimpleNamespace(async_scheduling=None), "speculative_config": None,
        "use_v2_model_runner": False, "lora_config": None, "kv_transfer_config": None,
        "quant_config": None,
    }  # fmt: skip
    return SimpleNamespace(**fields | changes)


KINDS = {
    "latents": (names.LATENTS_WORKERS, capabilities.LATENTS),
    "captions": (names.CAPTION_WORKERS, capabilities.CAPTIONS),
    "texts with pictures": (names.WORKERS, capabilities.PICTURES),
}
EVERYWHERE = tuple(KINDS)


def image_problems(kind: str, config):
    workers, served = KINDS[kind]
    try:
        needs.check_image_launch(config, "cpu", workers, f"a model of {kind}", served)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("kinds", "case", "words"),
    [
        (EVERYWHERE, {"parallel": {"worker_cls": "my.Worker"}}, "leave --worker-cls at 'auto'"),
        (EVERYWHERE, {"use_v2_model_runner": True}, "unset VLLM_USE_V2_MODEL_RUNNER"),
        (EVERYWHERE, {"scheduler_config": SimpleNamespace(async_scheduling=True)},
         "remove --async-scheduling"),
        (EVERYWHERE, {"speculative_config": FOREIGN},
         "a speculative method of vLLM's own ('ngram'): use a method of vllm-specplus, such as"),
        (("latents",), {"parallel": {"tensor_parallel_size": 2}}, "set --tensor-parallel-size"),
        (("latents",), {"parallel": {"pipeline_parallel_size": 2}}, "set --pipeline-parallel-s"),
        (("latents",), {"lora_config": {}}, "remove --enable-lora"),
        (("latents",), {"kv_transfer_config": {}}, "a KV connector"),
        (("texts with pictures",), {"speculative_config": None}, "add --speculative-config"),
        (("texts with pictures",), {"quant_config": {}}, "remove --quantization"),
    ],
)  # fmt: skip
def test_what_an_image_model_cannot_work_with_is_named(kinds, case, words):
    for kind in kinds:
        config = image_config(**{"speculative_config": OURS} | case)
        sentence = image_problems(kind, config)
        assert sentence.startswith(f"a model of {kind} does not work with ")
        assert words in sentence
        assert "\n" not in sentence


def test_image_models_are_served():
    for kind, (workers, _) in KINDS.items():
        for worker in ("auto", workers["cpu"], names.WORKERS["cpu"]):
            fine = image_config({"worker_cls": worker}, speculative_config=OURS)
            assert image_problems(kind, fine) is None
    assert image_problems("latents", image_config()) is None
    assert image_problems("captions", image_config({"tensor_parallel_size": 2})) is None


# -- after load -------------------------------------------------------------------------


def specs(kind="FullAttentionSpec", **fields):
    return type(kind, (), fields)()


def caches(*groups):
    return SimpleNamespace(
        kv_cache_groups=[
            SimpleNamespace(layer_names=["model.layers.0.attn"], kv_cache_spec=spec)
            for spec in groups
        ]
    )


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([specs("SlidingWindowSpec")], "SlidingWindowSpec of layer 'model.layers.0.attn'"),
        ([specs("MambaSpec")], "recurrent layers"),
        ([specs("NewSpec")], "a kind of attention that it does not know (NewSpec of layer"),
        ([specs(sliding_window=8)], "sliding-window attention (sliding_window=8)"),
        ([specs(attention_chunk_size=8)], "chunked attention (attention_chunk_size=8)"),
        (
            [specs("UniformTypeKVCacheSpecs", kv_cache_specs={"a": specs("MLAAttentionSpec")})],
            "multi-head latent attention",
        ),
    ],
)
def test_caches_that_nobody_serves_are_refused_after_load(groups, words):
    needs.check_loaded({}, caches(specs()), TEXT)
    with pytest.raises(ValueError, match="vllm-specplus does not work with ") as error:
        needs.check_loaded({}, caches(*groups), TEXT)
    assert words in str(error.value)


def test_groups_of_caches_are_the_methods_affair():
    """Who reads the target's pages needs the same ones in all layers."""
    groups = caches(specs(), specs())
    needs.check_loaded({}, groups, parse({"method": "token_recycling"}).serves())
    layers = parse({"method": "layer_skip"})
    with pytest.raises(ValueError, match=r"several groups, each with pages of its own \(2 of them"):
        needs.check_loaded({}, groups, layers.serves())
    model = model_config(
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    )
    asked = engine_args(disable_hybrid_kv_cache_manager=False)
    assert problems(asked, model) is None
    assert "set --disable-hybrid-kv-cache-manager" in problems(asked, model, method=layers)
    assert problems(engine_args(), model, method=layers) is None


def test_layers_of_different_head_counts_need_a_back_end_that_serves_them():
    from vllm_specplus.engine.attention.cpu import TreeCPUBackend, TreeCPUImpl

    heads = {"a": specs(num_kv_heads=1), "b": specs(num_kv_heads=2)}
    spec = specs("UniformTypeKVCacheSpecs", kv_cache_specs=heads)
    with pytest.raises(ValueError, match="different numbers of KV heads"):
        needs.check_loaded({}, caches(spec), TEXT)
    layer = SimpleNamespace(
        impl=TreeCPUImpl.__new__(TreeCPUImpl), get_attn_backend=lambda: TreeCPUBackend
    )
    needs.check_loaded({"a": layer}, caches(spec), TEXT)
