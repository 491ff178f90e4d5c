"""The tensors of a head's folder: their names and shapes, and what is wrong with them.

Reads no weights and imports no torch: for checking a user's configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from vllm_specplus.drafting.model import DraftModelError
from vllm_specplus.files import tensor_shapes
from vllm_specplus.strict import quoted

Shapes = Mapping[str, tuple[int, ...]]
Canonical = Callable[[str], str | None]
"""A tensor's name -> that which all writers of checkpoints have in common; None: the tensor is not
the head's."""


def read_shapes(folder: Path, head: str, canonical: Canonical) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of the tensors in the folder's safetensors files.

    DraftModelError, with a sentence that calls the ``head`` so, if they cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DraftModelError(
            f"{head} holds no .safetensors file: save its weights as one (pickled files are not "
            f"read)"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            found = tensor_shapes(file, quoted(file))
        except ValueError as error:
            raise DraftModelError(str(error)) from None
        named = ((canonical(tensor), shape) for tensor, shape in found.items())
        shapes |= {name: shape for name, shape in named if name is not None}
    return shapes


def check_tensors(shapes: Shapes, expected: Shapes, optional: Shapes, head: str) -> None:
    """DraftModelError unless there are the ``expected`` tensors, of these shapes, perhaps some of
    the ``optional`` ones, and no others."""
    missing = sorted(expected.keys() - shapes.keys())
    if missing:
        raise DraftModelError(f"{head} is incomplete: it lacks {some(missing)}")
    unknown = sorted(shapes.keys() - expected.keys() - optional.keys())
    if unknown:
        raise DraftModelError(f"{head} has tensors that are unknown here: {some(unknown)}")
    for tensor, shape in {**expected, **optional}.items():
        if tensor in shapes and shapes[tensor] != shape:
            raise DraftModelError(
                f"{head} has a tensor {tensor} of shape {shapes[tensor]}, and {shape} fits the "
                f"others"
            )


def some(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
