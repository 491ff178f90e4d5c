"""On the path of a process, lets it import torchvision's wheel beside a CPU build of torch.

The wheel's own operators are built for CUDA and do not load there; two of them are described when
it is imported, which fails if nobody has defined them. What resizes pictures needs none.
"""

import importlib.abc
import sys


class _Operators(importlib.abc.MetaPathFinder):
    """Defines them as soon as somebody asks for torchvision, and finds nothing itself."""

    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in ("nms", "qnms"):
                torch.library.define(
                    f"torchvision::{operator}",
                    "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                )


sys.meta_path.insert(0, _Operators())
