"""An EAGLE head for an image model, by the trainer of heads for texts.

    python -m vllm_specplus.training.picture_head --target demo_models/emoji

writes ``eagle/`` into the target's folder. The target draws pictures of its classes, with its own
guidance, and the head learns to go on from them: the recipe ``eagle`` and all around it are those
of texts, and the target is one of :class:`Frozen`'s kind. A head reads, and predicts, hidden states
that are mixed by guidance already, as the engine hands them out: where LANTERN's drafter (arXiv
2410.03355) runs both branches, this one runs one.

Differences from LANTERN's drafter: its layer has the rotary positions of texts, along the raster,
where the target's are of two dimensions; and it learns pictures that the target drew, not codes of
a data set.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from vllm_specplus.image.llamagen import Block, LlamaGen, LlamaGenConfig, rotate
from vllm_specplus.strict import StrictModel
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.folder import RunFolder, write_folder, write_text
from vllm_specplus.training.frozen import KEPT, Frozen
from vllm_specplus.training.probe import DEPTH, Group, Probe, groups_of
from vllm_specplus.training.ranks import Ranks
from vllm_specplus.training.recipe import Setup
from vllm_specplus.training.recipes.eagle import EagleRecipe, Settings
from vllm_specplus.training.splits import Gate, HeldOut
from vllm_specplus.training.texts import Text, load_texts, to_line
from vllm_specplus.training.trainer import Plan, Trainer

#: Pictures that are drawn side by side, most that are measured on, and positions that chains are
#: tried behind.
SIDE_BY_SIDE, MEASURED, PROBED = 64, 200, 128


def load_llamagen(folder: Path) -> LlamaGen:
    """The model of classes in a folder, in float32; TrainingError if there is none."""
    try:
        config = LlamaGenConfig(**json.loads((folder / "config.json").read_text()))
        tensors = load_file(folder / "model.safetensors")
        del tensors["codebook"]
        model = LlamaGen(config)
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise TrainingError(
            f"target {folder} is no LlamaGen of classes ({reason}): name the folder of one"
        ) from None
    return model.eval()


class PictureTarget(Frozen):
    """A LlamaGen as the trainer knows targets. A text is a label's token and the codes of its
    picture; hidden states and logits are those that guidance has mixed."""

    def __init__(self, model: LlamaGen, dtype: torch.dtype, kept: int = KEPT):
        # (Not that of a transformers model, which has what is set here under other names.)
        self.model, self.dtype, self.config = model.requires_grad_(False), dtype, model.config
        self.vocab_size, self.hidden_size = model.config.vocab_size, model.config.hidden_size
        self.ends: frozenset[int] = frozenset()
        self._scale = model.config.guidance_scale or 1.0
        self._embedding = torch.cat(
            (model.tok_embeddings.weight, model.cls_embedding.embedding_table.weight)
        )
        self._kept: dict[tuple[Text, tuple[int, ...]], Tensor] = {}
        self._room = kept
        self._probe: tuple[tuple[Text, ...], Probe] | None = None

    @property
    def layers(self) -> nn.ModuleList:
        """The last one, in the form and by the names that heads have."""
        return nn.ModuleList([llama_layer(self.model.layers[-1], self.config)])

    @property
    def norm_weight(self) -> Tensor:
        return self.model.norm.weight

    @property
    def output_weight(self) -> Tensor:
        return self.model.output.weight

    def embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self._embedding)

    def outputs(self, tokens: Tensor, seen: Tensor | None = None, **given: Any) -> Any:
        """``last_hidden_state`` [B, n, hidden] behind the last norm, of ``tokens`` int64 [B, n]
        from a label on."""
        model, labels = self.model, tokens[:, 0] - self.config.codebook_size
        both = torch.cat((labels, model.cls_embedding.anything(labels)))
        x = torch.cat((model.cls_embedding(both), self.embed(tokens[:, 1:]).repeat(2, 1, 1)), 1)
        turn = model.turn[: tokens.shape[1]]
        with self.autocast():
            for layer in model.layers:
                x = layer(x, turn, 0.0)
            given_label, other = model.norm(x).chunk(2)
        mixed = other + self._scale * (given_label - other)
        return SimpleNamespace(last_hidden_state=mixed, hidden_states=())

    def output(self, normed: Tensor) -> Tensor:
        """float32 logits [..., codes]: labels are never generated."""
        return F.linear(normed.to(self.dtype), self.output_weight.to(self.dtype)).float()

    def probe(self, texts: Sequence[Text]) -> Probe:
        if self._probe is None or self._probe[0] != tuple(texts):
            groups = tuple(groups_of(texts, PROBED, 0, self.device))
            truth = torch.cat([self.greedy(group, DEPTH) for group in groups])
            self._probe = tuple(texts), Probe(groups, truth)
        return self._probe[1]

    @torch.no_grad()
    def greedy(self, group: Group, depth: int) -> Tensor:
        """int64 [R, depth]: the most probable codes behind the places of a group, one after
        another; -1 behind a picture's end."""
        tokens, line = group.tokens[group.rows].clone(), torch.arange(len(group.rows))
        found = torch.full((len(line), depth), -1)
        for step in range(depth):
            place = group.places + step
            states = self.outputs(tokens).last_hidden_state
            inside = place + 1 < tokens.shape[1]
            here = line[inside]
            code = self.output(states[here, place[inside]]).argmax(-1)
            found[here, step] = code
            tokens[here, place[inside] + 1] = code
        return found


def llama_layer(block: Block, config: LlamaGenConfig) -> LlamaDecoderLayer:
    """A block as transformers' Llama layer. Of a head's channels, it turns the halves where the
    block turns neighbours; by how much, positions of one dimension differ from those of two."""
    attention, mlp = block.attention, block.feed_forward
    sizes = [count * attention.head_dim for count in attention.heads]
    q, k, v = attention.wqkv.weight.split(sizes)
    given = {
        "self_attn.q_proj.weight": _halves(q, attention.head_dim),
        "self_attn.k_proj.weight": _halves(k, attention.head_dim),
        "self_attn.v_proj.weight": v,
        "self_attn.o_proj.weight": attention.wo.weight,
        "mlp.gate_proj.weight": mlp.w1.weight,
        "mlp.up_proj.weight": mlp.w3.weight,
        "mlp.down_proj.weight": mlp.w2.weight,
        "input_layernorm.weight": block.attention_norm.weight,
        "post_attention_layernorm.weight": block.ffn_norm.weight,
    }
    layer = LlamaDecoderLayer(
        LlamaConfig(
            hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads, rms_norm_eps=config.rms_norm_eps,
        ), 0,
    )  # fmt: skip
    layer.load_state_dict(given)
    return layer


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head in the order 0, 2, 4 .. 1, 3, 5 .."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


@torch.inference_mode()
def draw_pictures(
    model: LlamaGen, labels: Tensor, generator: torch.Generator, temperature: float = 1.0
) -> Tensor:
    """Codes int64 [B, n] of pictures of the classes ``labels`` int64 [B], drawn with the model's
    own guidance: by the plain law that the engine's drafts are verified against."""
    config, scale = model.config, model.config.guidance_scale or 1.0
    both = torch.cat((labels, model.cls_embedding.anything(labels)))
    length, heads = config.grid_size**2, config.num_key_value_heads
    shape = (config.num_hidden_layers, 2, len(both), heads, length, config.head_dim)
    cache, x, codes = torch.zeros(shape), model.cls_embedding(both)[:, 0], []
    for place in range(length):
        for layer, kept in zip(model.layers, cache, strict=True):
            x = x + _attended(layer, layer.attention_norm(x), model.turn[place], kept, place)
            x = x + layer.feed_forward(layer.ffn_norm(x))
        given, other = model.norm(x).chunk(2)
        logits = model.output(other + scale * (given - other)) / temperature
        codes.append(torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0])
        x = model.tok_embeddings(codes[-1].repeat(2))
    return torch.stack(codes, 1)


def _attended(layer: Block, x: Tensor, turn: Tensor, kept: Tensor, place: int) -> Tensor:
    """What attention adds at ``place``; keys and values go to ``kept`` [2, B, heads, n, dim]."""
    attention = layer.attention
    qkv = attention.wqkv(x).unflatten(-1, (-1, attention.head_dim))
    q, k, v = qkv.split(attention.heads, 1)
    every = turn.expand(len(x), -1, -1)
    kept[0, :, :, place], kept[1, :, :, place] = rotate(k, every), v
    keys, values = kept[:, :, :, : place + 1]
    out = F.scaled_dot_product_attention(
        rotate(q, every)[:, :, None], keys, values,
        enable_gqa=attention.heads[0] != attention.heads[1],
    )  # fmt: skip
    return attention.wo(out.flatten(1))


def write_texts(model: LlamaGen, pictures: int, seed: int, folder: RunFolder) -> list[Text]:
    """So many pictures of all classes in turn, as texts; those that are there if they are."""
    if folder.texts.exists():
        return load_texts(folder.texts)
    config, texts = model.config, []
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(pictures) % config.num_classes
    for part in labels.split(SIDE_BY_SIDE):
        drawn = draw_pictures(model, part, generator)
        for label, codes in zip(part.tolist(), drawn.tolist(), strict=True):
            tokens = (config.label_token(label), *codes)
            texts.append(Text(f"picture-{len(texts)}", tokens, 1, "target"))
        print("pictures", len(texts), flush=True)
    write_text(folder.texts, "".join(f"{to_line(text)}\n" for text in texts))
    return texts


class Kept(StrictModel):
    """What a run that goes on must have in common with the one before."""

    target: str
    pictures: int
    epochs: int
    seed: int


def main(
    target: Annotated[Path, typer.Option(help="Folder of a LlamaGen of classes.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; by default beside the target.")
    ] = None,
    pictures: Annotated[int, typer.Option(help="That the target draws to learn from.")] = 4000,
    epochs: Annotated[int, typer.Option()] = 4,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train the head, measure it on pictures it has not seen, and put it into ``eagle/``."""
    console = Console()
    folder = RunFolder(out or target.parent / f"{target.name}-eagle-run")
    try:
        model = load_llamagen(target)
        with folder.held():
            kept = Kept(target=str(target.resolve()), pictures=pictures, epochs=epochs, seed=seed)
            folder.take_settings(kept.model_dump())
            measured = _train(model, target, kept, folder, console)
    except TrainingError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    console.print_json(json.dumps(measured))


def _train(
    model: LlamaGen, target: Path, kept: Kept, folder: RunFolder, console: Console
) -> dict[str, Any]:
    texts = write_texts(model, kept.pictures, kept.seed, folder)
    # By chance and not by class: the head is for all of them.
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(kept.seed)).tolist()
    apart = max(min(len(texts) // 20, MEASURED), 1)
    measured, learnt = ([texts[i] for i in part] for part in (order[:apart], order[apart:]))
    torch.manual_seed(kept.seed)
    setup = Setup(torch.float32, Ranks().device, kept.seed, learnt)
    recipe = EagleRecipe(target, PictureTarget(model, setup.dtype), Settings(), setup)
    gate = Gate(HeldOut(frozenset(), frozenset()), None, console)
    plan = Plan(kept.epochs, 2048, 1e-3, kept.seed)
    Trainer(recipe, learnt, plan, folder, gate, Ranks(), console).run()
    report = {"pictures": len(learnt)} | recipe.measure(measured).to_json()
    write_text(folder.measured, json.dumps(report, indent=1) + "\n")
    write_folder(target / "eagle", recipe.export)
    return report


if __name__ == "__main__":
    typer.run(main)
