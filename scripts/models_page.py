"""Writes docs/models.md: which families of models are served, by which methods, and why not.

``python scripts/models_page.py``: half a minute. From the capability contract, of a folder of
every family with a config.json of its architecture in small sizes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.contract import folders  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
#: Of methods that need the same: those that look drafts up or have a model of their own, those
#: with a head, those that draft with the target's layers.
METHODS = ("token_recycling", "eagle_tree", "layer_skip")
#: A stand-in of the tests, which vLLM does not know, and what needs libraries of vision models.
UNKNOWN = {"mrope", "qwen2_vl"}
HEAD = """# Which models are served

<!--fig none in this section: scripts/models_page.py writes this page-->
What a family of models needs beside plain attention, and which methods serve it, on a CPU and on a
GPU with vLLM's back end TRITON_ATTN (which is chosen where FLASH_ATTN does not serve the model; no
GPU has run it yet). Methods that look drafts up, and those with a draft model of their own, serve
the same families as `token_recycling`; a head of `eagle_tree` or `block_tree`, which serve the same
targets, has to be trained for the target, and so has a module of `mtp_tree`.
`scripts/models_page.py` writes this page from the capability contract
([`capabilities.py`](../vllm_specplus/capabilities.py)). The served families are run by `make full`,
as small random models in float32 on a CPU (but for qwen3_fp8kv and kimi_k2, which are others with
another configuration): texts have to be those of plain decoding under `token_recycling`,
`draft_tree` and, where the table says yes, `layer_skip`, with prompts below, about and beyond
windows, read in chunks, with prefixes cached and requests preempted; where it says no, the engine
has to refuse to start (`tests/engine/test_families.py`, stamped in `tests/full.json`). CI runs some
(`tests/engine/test_models.py`).

Multi-head latent attention has a back end of its own, CPU_MLA or TRITON_MLA, which is chosen. On a
CPU vLLM reads whole prompts for it, and its rotary kernel takes the heads from wrong places (0.32:
answers of `--enforce-eager` depend on what else is in the batch); engines of ours rotate in torch,
as compiled ones do.

Models that see pictures are run with pictures of several sizes (`tests/engine/test_pictures.py`):
LLaVA, Qwen2-VL, Qwen2.5-VL and Qwen3-VL. Self-speculation serves those whose rotary positions have
one axis; pruning video frames (`--video-pruning-rate`) is refused. mimo and minicpm are run with
the config of a family like theirs, as transformers has none of their own. A CPU build of vLLM runs
neither values of another size than the keys (MiMo-V2) nor square roots of ALiBi distances (Step-1);
engines of ours refuse both.

`vllm-specplus doctor --model DIR` says the same of your model.

| family | architecture | needs | `token_recycling` | `eagle_tree` | `layer_skip` |
|---|---|---|---|---|---|
"""
REFUSALS = """
Where layers with a sliding window and others alternate, vLLM keeps them in groups with pages of
their own and frees what is behind a window; accepted drafts move within each group. Methods that
read the target's cache or number their own pages like the target's (self-speculation, EAGLE heads)
keep whole texts in all layers instead (`--disable-hybrid-kv-cache-manager`, set at start for
them); attention itself does not look behind a window.

## Why not

"""


def families(root: Path) -> Iterator[tuple[str, str, list[str], dict[str, str | None]]]:
    """Each family's name and architecture, what it needs, and the refusal of each method, None
    where it is served; folders are written below ``root``."""
    from vllm_specplus import capabilities, registry
    from vllm_specplus.capabilities import Need
    from vllm_specplus.drafting.eagle_checkpoint import FAMILIES
    from vllm_specplus.engine import needs

    for name in sorted(folders.MODELS.keys() - UNKNOWN):
        architecture, family, *_ = folders.MODELS[name]
        found = needs.of_folder(folders.make(root, name))
        attention = needs.served_by_attention("cpu", found)
        needed = list(dict.fromkeys(each.need for each in found))
        answers: dict[str, str | None] = {}
        for method in METHODS:
            gaps = capabilities.gaps(
                found, "it", attention=attention, method=registry.config_class(method).supports
            )
            known = family in FAMILIES and name not in folders.STAND_INS
            if not gaps and method == "eagle_tree" and not known:
                gaps = [f"heads are known for targets of type {', '.join(FAMILIES)} only"]
            # What their configs refuse once they see the target, which is not built here.
            windows = Need.SLIDING_WINDOW in needed and not mixes_windows(root / name)
            if not gaps and method != "token_recycling" and windows:
                gaps = ["it reads whole texts in the KV cache, which keeps a window of them"]
            if not gaps and method == "layer_skip" and Need.FP8_KV in needed:
                gaps = ["it reads the target's keys and values as they were computed"]
            # Found when the target is loaded; ``make full`` runs every family.
            if not gaps and method == "layer_skip" and name not in folders.LAYERS_APART:
                gaps = [
                    "its layers are not an attention and an MLP, each behind a norm and added, or "
                    "the attention is not plain"
                ]
            answers[method] = gaps[0] if gaps else None
        yield name, architecture, [need.what.split(",")[0] for need in needed], answers


def mixes_windows(folder: Path) -> bool:
    """Have some layers windows and others not?"""
    config = json.loads((folder / "config.json").read_text())
    return len(set(config.get("layer_types") or ())) > 1


def page() -> str:
    """The page as Markdown."""
    text, reasons = HEAD, {}
    with tempfile.TemporaryDirectory() as root:
        for name, architecture, needed, answers in families(Path(root)):
            cells = []
            for method in METHODS:
                reason = answers[method]
                if reason is None:
                    cells.append("yes")
                else:
                    number = reasons.setdefault(reason, len(reasons) + 1)
                    cells.append(f"[{number}](#why-not)")
            row = " | ".join([name, f"`{architecture}`", "; ".join(needed) or "nothing", *cells])
            text += f"| {row} |\n"
    text += REFUSALS
    for reason, number in reasons.items():
        text += f"{number}. {reason}\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
