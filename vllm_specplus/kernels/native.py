"""Builds, loads and calls the C++ kernels of ``kernels/cpu``.

The library is compiled on first use (2-3 seconds) with the machine's own C++
compiler, which vLLM's CPU back end needs anyway for torch.compile, and kept in
the cache folder under a name that hashes source, flags and processor. Without
a compiler the wheel's library is loaded, if it has one that this processor
runs. Without either everything still works on the torch references of
:mod:`vllm_specplus.kernels.reference`, only slower; ``status`` says so.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
from pathlib import Path

import torch

from vllm_specplus.kernels import compiler

NATIVE = "-march=native"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: Of a KV cache of bytes: vLLM's name -> the kernels' number and the type that the bytes are.
FP8 = {
    "fp8": (3, torch.float8_e4m3fn),
    "fp8_e4m3": (3, torch.float8_e4m3fn),
    "fp8_e5m2": (4, torch.float8_e5m2),
}
#: Of keys and values, and of the latents of multi-head latent attention.
LAYOUTS, LATENT = {"vec": 0, "amx": 1}, 2


class TreeBatch(ctypes.Structure):
    """Mirrors ``struct TreeBatch`` in kernels.cpp; pointers are addresses."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in [
            "num_requests",
            "num_query_heads",
            "num_kv_heads",
            "head_size",
            "value_size",
            "block_size",
            "layout",
            "dtype",
            "cache_dtype",
            "max_blocks",
        ]
    ] + [
        ("scale", ctypes.c_float),
        ("value_scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("window", ctypes.c_int32),
        ("chunk", ctypes.c_int32),
    ]
    _fields_ += [
        (name, ctypes.c_int64)
        for name in ["page_stride", "head_stride", "query_stride", "output_stride"]
    ]
    _fields_ += [
        (name, ctypes.c_void_p)
        for name in [
            "rows",
            "row_start",
            "context",
            "block_table",
            "parents",
            "first",
            "depths",
            "slopes",
            "sinks",
            "query_start",
            "end",
            "readable",
        ]
    ]


def cache_dir() -> Path:
    """Folder for compiled kernels and converted models (``VLLM_SPECPLUS_CACHE``)."""
    return Path(os.environ.get("VLLM_SPECPLUS_CACHE") or Path.home() / ".cache" / "vllm-specplus")


def build() -> Path:
    """Compile the kernels unless the cache has them; returns the library's path.

    Raises RuntimeError with one sentence when there is no working compiler.
    """
    found = compiler.find()
    source = compiler.SOURCE.read_text()
    key = "\0".join([source, *compiler.FLAGS, NATIVE, found, compiler.features()])
    target = cache_dir() / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".so", delete=False) as part:
        pass
    try:
        compiler.run(found, part.name, NATIVE)
    except RuntimeError:
        os.unlink(part.name)
        raise
    os.replace(part.name, target)  # atomic: several engine processes may build at once
    return target


def prebuilt() -> Path:
    """Return the wheel's best library for this processor; raises RuntimeError without one."""
    able = set(compiler.features().split())
    for variant in compiler.variants():
        if variant.needs <= able and variant.path.exists():
            return variant.path
    raise RuntimeError("this installation brings no compiled kernels for this processor")


@functools.cache
def _load() -> ctypes.CDLL | str:
    reasons = []
    # What was compiled here fits the processor best.
    for find in (build, prebuilt):
        try:
            return _declared(ctypes.CDLL(str(find())))
        except (OSError, RuntimeError) as error:
            reasons.append(str(error))
    return "; ".join(reasons)


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    void_p, int64, int32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    batch = ctypes.POINTER(TreeBatch)
    lib.specplus_tree_attention_unsupported.argtypes = [batch]
    lib.specplus_tree_attention.argtypes = [batch, void_p, void_p, void_p]
    lib.specplus_tree_attention.restype = None
    lib.specplus_move_slots.argtypes = [batch, void_p, int32, void_p, void_p, int32]
    lib.specplus_move_slots.restype = None
    lib.specplus_store_slots.argtypes = [batch, void_p, void_p, void_p, int64, void_p, int32]
    lib.specplus_store_slots.restype = None
    lib.specplus_rms_norm.argtypes = [
        void_p, void_p, void_p, int32, int64, int32, ctypes.c_float,
    ]  # fmt: skip
    lib.specplus_rms_norm.restype = None
    lib.specplus_rotate.argtypes = [void_p] * 3 + [int32, int64, int64, int32, int32]
    lib.specplus_rotate.restype = None
    lib.specplus_top_k.argtypes = [void_p, int32, int64, int64, int64, int32, void_p, void_p]
    lib.specplus_top_k.restype = None
    lib.specplus_kv_offset.argtypes = [int32] * 6
    lib.specplus_kv_offset.restype = int64
    return lib


def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None where they cannot be built."""
    lib = _load()
    return None if isinstance(lib, str) else lib


def status() -> str | None:
    """None when the kernels are usable, else the reason they are not."""
    lib = _load()
    return lib if isinstance(lib, str) else None


def origin() -> str:
    """Return where the usable kernels come from, for a report."""
    path = Path(library()._name)
    return f"the wheel's, {path.name}" if path.parent == compiler.FOLDER else "compiled"


UNSUPPORTED = {
    1: "the block size is not a multiple of 16",
    2: "the AMX layout needs bfloat16 and head and block sizes that are multiples of 32",
    3: "the operating system refuses the AMX tile registers",
    4: "this build has no AMX",
    5: "the sizes of latents are not multiples of 16",
}


def unsupported(batch: TreeBatch) -> str | None:
    """Why the tree-attention kernel cannot serve ``batch``'s sizes, or None."""
    lib = library()
    if lib is None:
        return status()
    code = lib.specplus_tree_attention_unsupported(ctypes.byref(batch))
    return UNSUPPORTED[code] if code else None


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest ``k`` entries of each row, best first, ties to the lower index; NaN comes first where
    a row holds any, with ids that mean nothing.

    ``logits`` [rows, V] on the CPU (float32, bfloat16 or float16, rows may be
    strided). Returns (ids int32 [rows, k], values float32 [rows, k]).
    """
    lib = library()
    if lib is None or logits.dtype not in DTYPES or logits.stride(-1) != 1:
        from vllm_specplus.kernels.reference import top_k_reference

        return top_k_reference(logits, k)
    rows, n = logits.shape
    ids = torch.empty(rows, k, dtype=torch.int32)
    values = torch.empty(rows, k, dtype=torch.float32)
    lib.specplus_top_k(
        logits.data_ptr(), DTYPES[logits.dtype], rows, n, logits.stride(0), k,
        ids.data_ptr(), values.data_ptr(),
    )  # fmt: skip
    return ids, values


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``rows`` [T, d] by the root of their mean square, times ``weight`` [d], as transformers'
    Llama has it; both contiguous, on the CPU, in one of :data:`DTYPES`. Needs :func:`library`."""
    out = torch.empty_like(rows)
    library().specplus_rms_norm(
        rows.data_ptr(), weight.data_ptr(), out.data_ptr(), DTYPES[rows.dtype], *rows.shape, eps
    )
    return out


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Apply rotary positions to ``heads`` [T, H, D] in place, whose heads are contiguous; ``cos``,
    ``sin`` [T, D], contiguous. As :func:`rms_norm` otherwise."""
    rows, count, size = heads.shape
    library().specplus_rotate(
        heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), DTYPES[heads.dtype], rows,
        heads.stride(0), count, size,
    )  # fmt: skip
