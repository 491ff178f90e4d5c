"""Which attention back ends may get a draft tree: ours, and nobody else.

Most of vLLM's back ends never start on a CPU. The layers here are stubs that carry the wheel's own
back-end and metadata classes; where a class cannot be imported without a GPU or another package
(FlashInfer), one of its name stands in.
"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.attention.chunked_local_attention import (
    create_chunked_local_attention_backend,
)
from vllm.model_executor.layers.attention.encoder_only_attention import (
    create_encoder_only_attention_backend,
)
from vllm.model_executor.layers.attention.static_sink_attention import (
    create_static_sink_attention_backend,
)
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl
from vllm.v1.attention.backends.composite import (
    MMPrefixAttentionRouting,
    create_composite_attention_backend,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.utils import create_fast_prefill_custom_backend

from vllm_specplus.engine import attention
from vllm_specplus.engine.attention import base
from vllm_specplus.engine.attention.cpu import PictureCPUBackend, TreeCPUBackend
from vllm_specplus.engine.attention.flash import TreeFlashAttentionBackend
from vllm_specplus.engine.attention.triton import PictureTritonBackend, TreeTritonBackend

OURS = [
    TreeCPUBackend,
    PictureCPUBackend,
    TreeFlashAttentionBackend,
    TreeTritonBackend,
    PictureTritonBackend,
]


NAMES = [each.name for each in AttentionBackendEnum if each.value]
#: Which can be imported without a GPU, in a second.
IMPORTABLE = (
    "B12X",
    "CPU_ATTN",
    "FLASH_ATTN",
    "FLASH_ATTN_DIFFKV",
    "FLEX_ATTENTION",
    "TRITON_ATTN",
    "TRITON_ATTN_DIFFKV",
    "TURBOQUANT",
)


def stock(name: str) -> type[AttentionBackend]:
    """vLLM's class of that name, without overrides, or a stand-in of the same path."""
    path = AttentionBackendEnum[name].value
    if name in IMPORTABLE:
        return resolve_obj_by_qualname(path)
    module, _, qualname = path.rpartition(".")
    stub = type(qualname, (AttentionBackend,), {"get_name": staticmethod(lambda: name)})
    stub.__module__ = module
    stub.get_impl_cls = staticmethod(lambda: AttentionImpl)
    return stub


#: What vLLM makes out of our back ends, whose classes inherit all that ours state.
DERIVED = {
    "composite": lambda: create_composite_attention_backend(
        TreeTritonBackend,
        TreeFlashAttentionBackend,
        name="Composite",
        backend_name="COMPOSITE",
        module=__name__,
        routing_policy=MMPrefixAttentionRouting,
    ),
    "chunked": lambda: create_chunked_local_attention_backend(TreeFlashAttentionBackend, 64),
    "encoder": lambda: create_encoder_only_attention_backend(TreeCPUBackend),
    "static sink": lambda: create_static_sink_attention_backend(TreeFlashAttentionBackend, 16),
    "fast prefill": lambda: create_fast_prefill_custom_backend("FastPrefill", TreeTritonBackend),
}


def implementation(backend: type[AttentionBackend]) -> SimpleNamespace:
    """An instance of the back end's implementation that was never constructed."""
    made = object.__new__(backend.get_impl_cls())
    made.head_size = 8
    return made


def layer(backend: type[AttentionBackend], impl=None) -> SimpleNamespace:
    return SimpleNamespace(
        get_attn_backend=lambda: backend,
        impl=impl or implementation(backend),
        kv_cache=torch.zeros(4, 2, 16, 16),
        isa="vec",
    )


def group(backend: type[AttentionBackend], *names: str) -> SimpleNamespace:
    return SimpleNamespace(backend=backend, layer_names=list(names))


def refuse_everywhere(foreign: SimpleNamespace, backend: type[AttentionBackend], metadata) -> None:
    """The three places where a back end that is not ours could slip in."""
    assert not attention.ours(foreign)
    assert attention.supports(foreign) == frozenset()
    sentence = attention.refusal("model.layers.0.attn", foreign)
    assert "model.layers.0.attn" in sentence
    assert backend.__qualname__ in sentence
    assert "--attention-backend" in sentence
    with pytest.raises(ValueError, match="verifies no draft trees"):
        attention.page_cache({"a": foreign})
    for position in (("ours", "foreign"), ("foreign", "ours")):
        layers = {"ours": layer(TreeCPUBackend), "foreign": foreign}
        with pytest.raises(TypeError, match="'foreign' is served by"):
            attention.attach(
                dict.fromkeys(position, metadata), group(TreeCPUBackend, *position), layers, "tree"
            )
    assert base.tree_metadata(metadata) is None
    # Negative control: nothing but the check keeps the tree off this object.
    setattr(metadata, base.TREE_ATTRIBUTE, "tree")
    assert base.tree_metadata(metadata) == "tree"


def metadata_of(backend: type[AttentionBackend]):
    """An instance, never constructed, of the metadata class that a back end uses."""
    module = sys.modules.get(backend.__module__)
    for name, value in vars(module).items() if module else ():
        if name.endswith("Metadata") and name not in (
            "AttentionMetadata",
            "CommonAttentionMetadata",
        ):
            return object.__new__(value)
    return SimpleNamespace()


@pytest.mark.parametrize("backend", [TreeCPUBackend, TreeTritonBackend])
def test_chunks_of_a_back_end_that_serves_them_are_ours(backend):
    chunked = create_chunked_local_attention_backend(backend, 64)
    assert base.is_tree_backend(chunked)
    made = layer(chunked)
    assert attention.ours(made)
    assert attention.supports(made) == backend.supports
    assert base.chunk_of(made) == 0
    made.attention_chunk_size = 64
    assert base.chunk_of(made) == 64
    # Chunks of something else that vLLM derives are not.
    assert not base.is_tree_backend(
        create_chunked_local_attention_backend(DERIVED["fast prefill"](), 64)
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_stock_backend_gets_a_tree(name):
    backend = stock(name)
    stub = layer(backend, SimpleNamespace(head_size=8))
    refuse_everywhere(stub, backend, metadata_of(backend))


def test_the_wheels_own_metadata_takes_a_tree():
    """Else the test above would prove little."""
    for name in IMPORTABLE:
        assert not isinstance(metadata_of(stock(name)), SimpleNamespace)


@pytest.mark.parametrize("kind", DERIVED)
def test_nothing_derived_from_ours_gets_a_tree(kind):
    backend = DERIVED[kind]()
    refuse_everywhere(layer(backend), backend, SimpleNamespace())


def test_a_group_whose_backend_is_not_its_layers_gets_no_tree():
    """vLLM derives a back end for fast prefill when it builds groups; the layers keep theirs."""
    backend = DERIVED["fast prefill"]()
    metadata = SimpleNamespace()
    with pytest.raises(TypeError, match="as if it were a chain"):
        attention.attach(
            {"a": metadata}, group(backend, "a"), {"a": layer(TreeTritonBackend)}, "tree"
        )
    assert base.tree_metadata(metadata) is None


@pytest.mark.parametrize("backend", OURS)
def test_another_implementation_under_our_backend_gets_no_tree(backend):
    other = layer(backend, SimpleNamespace(head_size=8))
    assert not attention.ours(other)


@pytest.mark.parametrize("backend", OURS)
def test_ours_get_trees(backend):
    layers = {"a": layer(backend), "b": layer(backend)}
    assert all(attention.ours(each) for each in layers.values())
    assert attention.refusal("a", layers["a"]) is None
    assert attention.supports(layers["a"]) == backend.supports == backend.get_impl_cls().supports
    shared = SimpleNamespace()
    tree = object()
    attention.attach({"a": shared, "b": shared}, group(backend, "a", "b"), layers, tree)
    assert base.tree_metadata(shared) is tree


@pytest.mark.parametrize("device", attention.BACKENDS)
def test_registered_under_the_name_that_the_class_states(device, monkeypatch):
    from vllm.v1.attention.backends import registry

    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    attention.register(device)
    for name in attention.BACKENDS[device]:
        backend = AttentionBackendEnum[name].get_class()
        assert base.is_tree_backend(backend)
        assert backend.vllm_name == name == backend.get_name() == backend.__base__.get_name()


def test_a_backend_must_state_what_it_supports():
    with pytest.raises(TypeError, match="must state 'supports'"):
        base.tree_backend(type("Careless", (), {"vllm_name": "CPU_ATTN"}))


def test_values_of_another_size_than_keys_are_refused():
    odd = layer(TreeCPUBackend)
    odd.kv_cache = torch.zeros(4, 2, 16, 8 + 4)
    with pytest.raises(ValueError, match="keys and values of one size"):
        attention.page_cache({"a": odd})


def test_block_sizes_that_differ_are_refused():
    other = layer(TreeCPUBackend)
    other.kv_cache = torch.zeros(4, 2, 32, 16)
    with pytest.raises(ValueError, match=r"one KV cache block size in all layers, not \[16, 32\]"):
        attention.page_cache({"a": layer(TreeCPUBackend), "b": other})


def test_pages_of_unlike_layouts_are_refused():
    with pytest.raises(ValueError, match="one layout of KV cache pages"):
        attention.page_cache({"a": layer(TreeCPUBackend), "b": layer(TreeTritonBackend)})


IMPORTS = """
import sys
import vllm_specplus.engine.attention
import vllm_specplus.engine.attention.cpu
ours = [name for name in sys.modules if name.startswith("vllm_specplus")]
assert not [n for n in ours if n.endswith(("cuda", "flash", "triton", "tree_attention"))], ours
stock = ("flash_attn", "triton_attn")
assert not [n for n in sys.modules if n.startswith("vllm.") and n.endswith(stock)]
"""


@pytest.mark.slow
def test_a_cpu_engine_imports_no_cuda_module():
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
