"""The kernels that a wheel brings, for machines without a compiler."""

from __future__ import annotations

import platform
import zipfile

import pytest
import torch

from tests.kernels import test_native_kernels as equal
from tests.test_packaging import MOST_BYTES, build, checkout
from vllm_specplus.kernels import compiler, native

FEATURES = set(compiler.features().split())
VARIANTS = [
    pytest.param(
        each,
        id=each.name,
        marks=pytest.mark.skipif(not each.needs <= FEATURES, reason="not for this processor"),
    )
    for each in compiler.variants()
]


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without one, from the first look on."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    native._load.cache_clear()
    yield
    monkeypatch.undo()
    native._load.cache_clear()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(checkout(tmp_path_factory.mktemp("kernels")), SPECPLUS_BUILD_KERNELS="1")


@pytest.fixture
def unpacked(wheel, tmp_path, monkeypatch, no_compiler):
    """The wheel's folder of kernels in place of the checkout's."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    monkeypatch.setattr(compiler, "FOLDER", tmp_path / "vllm_specplus" / "kernels" / "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_wheels_kernels_equal_the_references(unpacked, monkeypatch, variant):
    monkeypatch.setattr(compiler, "variants", lambda: (variant,))
    assert native.status() is None
    assert native.origin() == f"the wheel's, kernels-{variant.name}.so"
    layouts = [("vec", torch.float32), ("vec", torch.bfloat16), ("vec", torch.float16)]
    if variant.name == "amx":
        layouts.append(("amx", torch.bfloat16))
    for layout, dtype in layouts:
        equal.attention_equals_reference(layout, dtype, 6, 2, 64, 32)
        equal.test_move_slots(layout, dtype)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        equal.test_top_k(dtype, 1000)
    amx = torch.empty(1, 1, 32, 128, dtype=torch.bfloat16)
    reason = native.unsupported(equal.batch_for(amx, "amx", 1))
    assert reason == (None if variant.name == "amx" else native.UNSUPPORTED[4])


@pytest.mark.slow
def test_a_wheel_with_kernels_is_for_one_kind_of_machine(wheel):
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    packed = zipfile.ZipFile(wheel).namelist()
    for variant in compiler.variants():
        assert f"vllm_specplus/kernels/cpu/{variant.path.name}" in packed
    assert wheel.stat().st_size < MOST_BYTES


def test_without_either_there_is_a_reason(no_compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(compiler, "FOLDER", tmp_path)
    monkeypatch.setenv("VLLM_SPECPLUS_CACHE", str(tmp_path))
    assert native.library() is None
    assert "no-such-compiler cannot be run" in native.status()
    assert "brings no compiled kernels" in native.status()
    assert list(tmp_path.iterdir()) == []


def test_what_was_compiled_here_is_preferred(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "prebuilt", lambda: pytest.fail("there is a compiler"))
    native._load.cache_clear()
    assert native.origin() == "compiled"


@pytest.mark.parametrize(
    ("flags", "best"),
    [
        ("avx2", None),
        ("x86-64-v3", "kernels-x86-64-v3.so"),
        ("x86-64-v4", "kernels-x86-64-v4.so"),
        ("amx", "kernels-amx.so"),
    ],
)
def test_a_processor_gets_no_instruction_that_it_lacks(monkeypatch, tmp_path, flags, best):
    variants = {each.name: each for each in compiler.VARIANTS["x86_64"]}
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(compiler, "FOLDER", tmp_path)
    for each in variants.values():
        each.path.touch()
    able = variants[flags].needs if flags in variants else {flags}
    monkeypatch.setattr(compiler, "features", lambda: "flags : " + " ".join(able))
    if best:
        assert native.prebuilt().name == best
    else:
        with pytest.raises(RuntimeError, match="brings no compiled kernels"):
            native.prebuilt()
