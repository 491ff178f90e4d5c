"""Does drawn text follow a model's distribution? A chi-square test against an enumeration."""

from __future__ import annotations

import numpy as np

Text = tuple[int, ...]


def chisquare():
    """Return scipy's test; an ImportError that says what to install where it is not."""
    try:
        from scipy.stats import chisquare
    except ImportError as error:
        raise ImportError("the chi-square test needs scipy: pip install scipy") from error
    return chisquare


def joint_probabilities(
    model: str, prompt: list[int], top_k: int, tokens: int
) -> dict[Text, float]:
    """Compute the distribution of the next ``tokens`` tokens under top-k sampling, exactly, by
    enumeration."""
    import torch
    from transformers import AutoModelForCausalLM

    target = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    joint: dict[Text, float] = {(): 1.0}
    for _ in range(tokens):
        paths = list(joint)
        with torch.inference_mode():
            logits = target(torch.tensor([prompt + list(p) for p in paths])).logits[:, -1].double()
        values, ids = logits.topk(top_k)
        probabilities = values.softmax(-1)
        joint = {
            (*path, int(t)): joint[path] * float(q)
            for path, row, p in zip(paths, ids, probabilities, strict=True)
            for t, q in zip(row, p, strict=True)
        }
    return joint


def chi_square(joint: dict[Text, float], texts: list[Text]) -> float:
    """Return the p-value of the observed texts, 0 for an impossible one; cells expected below 5
    are pooled."""
    counts = dict.fromkeys(joint, 0)
    for text in texts:
        if text not in counts:
            return 0.0
        counts[text] += 1
    expected = np.array([joint[p] for p in counts]) * len(texts)
    observed = np.array(list(counts.values()))
    small = expected < 5
    expected = np.append(expected[~small], expected[small].sum())
    observed = np.append(observed[~small], observed[small].sum())
    keep = expected > 0
    scaled = expected[keep] * observed.sum() / expected[keep].sum()
    return float(chisquare()(observed[keep], scaled).pvalue)
