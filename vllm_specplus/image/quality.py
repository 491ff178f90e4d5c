"""How good generated pictures are: class accuracy and Fréchet distance.

Both by a small classifier trained on the embedded model's own data: the Fréchet distance (the
FID of arXiv 1706.08500 with another network) compares the Gaussians of its features. Only
distances by the same classifier can be compared, and they depend on the number of pictures.

Whether a change costs quality is asked of two sets of pictures at once: :func:`increase` has the
difference of their distances to the same reference, with its bootstrap interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional as F

from vllm_specplus.image import weights
from vllm_specplus.strict import StrictModel

REFERENCE = Path("classifier") / "reference.safetensors"
#: Bootstrap samples of an interval.
RESAMPLES = 200


class ClassifierConfig(StrictModel):
    """The defaults are those of the classifier of digits, whose folder says nothing."""

    name: str = "digits"
    """What its distances are called by: those of another cannot be compared."""
    side: int = 32
    image_channels: int = 1
    classes: int = 10
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of its convolutions, each of which halves the picture's side."""
    features: int = 64


class PictureClassifier(nn.Module):
    """Pictures float32 [B, channels, side, side] in [-1, 1] to logits [B, classes]."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        channels = (config.image_channels, *config.widths)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise(channels)
        )
        left = config.side >> len(config.widths)
        self.hidden = nn.Linear(channels[-1] * left**2, config.features)
        self.output = nn.Linear(config.features, config.classes)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """float32 [B, features]: the layer before the last, behind its GELU."""
        x = pictures
        for convolution in self.convolutions:
            x = F.gelu(convolution(x))
        return F.gelu(self.hidden(x.flatten(1)))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.output(self.features(pictures))

    @classmethod
    def load(cls, folder: str | Path) -> PictureClassifier:
        """Of ``classifier/`` in a model's folder."""
        folder = Path(folder) / "classifier"
        said, config = folder / "config.json", ClassifierConfig()
        if said.is_file():
            config = ClassifierConfig.model_validate_json(said.read_text())
        return weights.load(cls(config), folder / "model.safetensors")

    def save(self, folder: Path) -> None:
        """As ``classifier/`` of a model's folder, in half precision."""
        weights.save(self, folder / "classifier" / "model.safetensors")
        said = self.config.model_dump_json(indent=2)
        (folder / "classifier" / "config.json").write_text(said + "\n")


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Of the features of some pictures."""

    mean: np.ndarray
    """float64 [features]"""
    covariance: np.ndarray
    """float64 [features, features]"""

    @classmethod
    def of(cls, features: np.ndarray, weights: np.ndarray | None = None) -> Gaussian:
        """``features`` float64 [N, features]; ``weights`` [N] of the pictures, by default equal."""
        mean = np.average(features, 0, weights)
        return cls(mean, np.cov(features, rowvar=False, aweights=weights))

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
def features(classifier: PictureClassifier, pictures: torch.Tensor) -> np.ndarray:
    """float64 [N, features]"""
    parts = [classifier.features(part) for part in pictures.split(512)]
    return torch.cat(parts).double().numpy()


def accuracy(classifier: PictureClassifier, seen: np.ndarray, labels: np.ndarray) -> float:
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


@dataclass(frozen=True, slots=True)
class Increase:
    """By how much further from a reference one set of pictures is than another."""

    mean: float
    low: float
    high: float
    """Bounds of the 95 % bootstrap interval, two-sided: ``high`` is the 97.5th percentile."""


def increase(
    seen: np.ndarray, baseline: np.ndarray, reference: Gaussian, resamples: int = RESAMPLES,
    seed: int = 0,
) -> Increase:  # fmt: skip
    """Distance of ``seen`` less that of ``baseline``, float64 [N, features] each, to ``reference``.

    ``mean`` is the plain difference; both sets are resampled, each by itself, for the interval.
    Distances of few pictures are too large; sets of one size are so alike, which is why a
    difference of sets of other sizes is refused (ValueError).
    """
    if len(seen) != len(baseline):
        raise ValueError(f"{len(seen)} and {len(baseline)} pictures: as many are needed of each")
    random = np.random.default_rng(seed)

    def again(rows: np.ndarray) -> float:
        chosen = rows[random.integers(len(rows), size=len(rows))]
        return Gaussian.of(chosen).distance(reference)

    found = Gaussian.of(seen).distance(reference) - Gaussian.of(baseline).distance(reference)
    drawn = np.array([again(seen) - again(baseline) for _ in range(resamples)])
    # A bootstrap sample's distance is itself too large: its spread is used, not its place.
    low, high = np.percentile(drawn - drawn.mean(), (2.5, 97.5))
    return Increase(found, found + float(low), found + float(high))


def same_law(
    seen: np.ndarray, other: np.ndarray, permutations: int = RESAMPLES, seed: int = 0
) -> float:
    """Probability of a distance like that of ``seen`` and ``other``, float64 [N, features] each, if
    both are pictures of one law: a permutation test, of at least ``1 / (permutations + 1)``."""
    both, count = np.concatenate((seen, other)), len(seen)
    found = Gaussian.of(seen).distance(Gaussian.of(other))
    random, further = np.random.default_rng(seed), 1
    for _ in range(permutations):
        order = random.permutation(len(both))
        one, two = (Gaussian.of(both[part]) for part in (order[:count], order[count:]))
        further += one.distance(two) >= found
    return further / (permutations + 1)
