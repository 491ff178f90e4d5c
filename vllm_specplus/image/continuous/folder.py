"""A folder with a model of latents, its draft, and what reads its latents.

``config.json`` and ``model.safetensors`` are the target, causal or masked, ``draft/`` a smaller
model of the same kind. ``vae/`` and, for those that are to be judged, ``classifier/`` are here or
in the folder above.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vllm_specplus.image.continuous.causal import MODEL_TYPE, CausalLatents
from vllm_specplus.image.continuous.chain import Schedule
from vllm_specplus.image.continuous.masked import MaskedLatents
from vllm_specplus.image.continuous.vae import KLDecoder, LatentVAE, load_vae
from vllm_specplus.image.quality import Gaussian, PictureClassifier


@dataclass(frozen=True, slots=True)
class LatentsFolder:
    target: CausalLatents | MaskedLatents
    draft: CausalLatents | MaskedLatents
    vae: LatentVAE | KLDecoder
    classifier: PictureClassifier | None
    reference: Gaussian | None

    @property
    def schedule(self) -> Schedule:
        """Of target and draft alike."""
        return self.target.config.schedule()

    @property
    def masked(self) -> bool:
        return isinstance(self.target, MaskedLatents)

    @property
    def num_classes(self) -> int:
        return self.target.config.num_classes

    @property
    def length(self) -> int:
        """Latents of a picture."""
        config = self.target.config
        return config.length if self.masked else config.grid_size**2

    @property
    def size(self) -> int:
        return self.target.config.size

    @classmethod
    def load(cls, folder: str | Path) -> LatentsFolder:
        """FileNotFoundError says what is missing."""
        folder = Path(folder).expanduser()
        for needed in ("config.json", "draft/config.json"):
            if not (folder / needed).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {needed}: use the folder that "
                    f"`vllm-specplus prepare-model --latents` prints"
                )
        shared = folder if (folder / "vae").is_dir() else folder.parent
        if not (shared / "vae").is_dir():
            raise FileNotFoundError(f"{folder} has no vae/, nor has the folder above it")
        judged = (shared / "classifier").is_dir()
        said = json.loads((folder / "config.json").read_text())
        kind = CausalLatents if said.get("model_type") == MODEL_TYPE else MaskedLatents
        target, draft = kind.load(folder), kind.load(folder / "draft")
        return cls(
            target=target, draft=draft, vae=load_vae(shared),
            classifier=PictureClassifier.load(shared) if judged else None,
            reference=Gaussian.load(shared) if judged else None,
        )  # fmt: skip
