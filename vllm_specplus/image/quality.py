"""How good generated digits are: class accuracy and Fréchet distance.

Both by a small classifier trained on the embedded model's own data: the Fréchet distance (the
FID of arXiv 1706.08500 with another network) compares the Gaussians of its features. Only
distances by the same classifier can be compared, and they depend on the number of pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional as F

from vllm_specplus.image import weights

FEATURES = 64
REFERENCE = Path("classifier") / "reference.safetensors"


class DigitClassifier(nn.Module):
    """Pictures float32 [B, 1, 32, 32] in [-1, 1] to logits [B, 10]."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList(
            (
                nn.Conv2d(1, 16, 3, stride=2, padding=1),
                nn.Conv2d(16, 32, 3, stride=2, padding=1),
                nn.Conv2d(32, 64, 3, stride=2, padding=1),
            )
        )
        self.hidden = nn.Linear(64 * 16, FEATURES)
        self.output = nn.Linear(FEATURES, 10)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """float32 [B, FEATURES]"""
        x = pictures
        for convolution in self.convolutions:
            x = F.gelu(convolution(x))
        return F.gelu(self.hidden(x.flatten(1)))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.output(self.features(pictures))

    @classmethod
    def load(cls, folder: str | Path) -> DigitClassifier:
        return weights.load(cls(), Path(folder) / "classifier" / "model.safetensors")


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Of the features of some pictures."""

    mean: np.ndarray
    """float64 [FEATURES]"""
    covariance: np.ndarray
    """float64 [FEATURES, FEATURES]"""

    @classmethod
    def of(cls, features: np.ndarray) -> Gaussian:
        """``features`` float64 [N, FEATURES]"""
        return cls(features.mean(0), np.cov(features, rowvar=False))

    def distance(self, other: Gaussian) -> float:
        """Fréchet: |mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2))."""
        difference = self.mean - other.mean
        # tr (C C')^(1/2) by the eigenvalues of C^(1/2) C' C^(1/2), which is symmetric.
        values, vectors = np.linalg.eigh(self.covariance)
        root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
        common = np.linalg.eigvalsh(root @ other.covariance @ root).clip(min=0)
        both = np.trace(self.covariance) + np.trace(other.covariance)
        return float(difference @ difference + both - 2 * np.sqrt(common).sum())

    def save(self, folder: Path) -> None:
        save_file({"mean": self.mean, "covariance": self.covariance}, folder / REFERENCE)

    @classmethod
    def load(cls, folder: Path) -> Gaussian:
        """Of the pictures that the classifier in a model's folder was trained on."""
        return cls(**load_file(folder / REFERENCE))


@torch.inference_mode()
def features(classifier: DigitClassifier, pictures: torch.Tensor) -> np.ndarray:
    """float64 [N, FEATURES]"""
    parts = [classifier.features(part) for part in pictures.split(512)]
    return torch.cat(parts).double().numpy()


def accuracy(classifier: DigitClassifier, seen: np.ndarray, labels: np.ndarray) -> float:
    """Share of pictures, of features ``seen``, that show the class asked for."""
    with torch.inference_mode():
        known = classifier.output(torch.from_numpy(seen).float()).argmax(-1).numpy()
    return float((known == labels).mean())


def distance_error(
    seen: np.ndarray, reference: Gaussian, resamples: int = 50, seed: int = 0
) -> float:
    """Standard deviation of the distance over bootstrap samples of the pictures."""
    random = np.random.default_rng(seed)
    again = [
        Gaussian.of(seen[random.integers(len(seen), size=len(seen))]).distance(reference)
        for _ in range(resamples)
    ]
    return float(np.std(again, ddof=1))
