"""Flamingo in miniature: a frozen language model learns to name real handwritten digits. No downloads.

The three stages of the paper (Alayrac et al. 2022, section 3 and appendix B), each in its own function:

1. a small timm NFNet learns from images and captions by contrast, and is frozen;
2. a small Llama learns captions as text, without ever an image, and is frozen;
3. a Perceiver Resampler and gated cross-attention blocks, the only trained parts, learn to make the second
   say what the first sees.

The images are the 1,797 scans of handwritten digits that ship with scikit-learn.

    python examples/train_tiny.py --out runs/train_tiny

writes metrics.json and gates.png there.
"""

import argparse
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
import transformers
from matplotlib.ticker import MaxNLocator
from sklearn.datasets import load_digits
from timm.models.nfnet import NfCfg, NormFreeNet
from torch import Tensor, nn
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM

import flamingo_blocks
from flamingo_blocks import (
    GatedCrossAttentionBlock,
    LMLayerInjector,
    MediaRuns,
    PerceiverResampler,
    VisionEncoder,
    media_ranges,
)
from flamingo_blocks.blocks import ContrastiveLoss
from flamingo_blocks.language import find_decoder_layers, find_hidden_size

IMAGE_SIZE = 32
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
VOCABULARY = ["<pad>", "<bos>", "<image>", "<EOC>", "a", "handwritten", *DIGITS]
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}


@dataclass
class Split:
    """Images with their digits."""

    images: Tensor  # images 1 height width
    digits: Tensor  # images


def load_splits(device: str) -> dict[str, Split]:
    """Load the digits in a fixed split: whatever is tuned is tuned on "val", "test" is looked at once, at the end."""
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic").clamp(0, 1)
    images = (images - 0.3) / 0.35
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1234))
    parts = dict(zip(("train", "val", "test"), order.split([997, 300, 500]), strict=True))
    digits = torch.tensor(data.target)
    return {name: Split(images[part].to(device), digits[part].to(device)) for name, part in parts.items()}


def captions(digits: Tensor) -> Tensor:
    """Write "a handwritten seven <EOC>" for each digit: images -> images text."""
    words = torch.tensor([TOKEN["a"], TOKEN["handwritten"], 0, TOKEN["<EOC>"]], device=digits.device)
    text = words.repeat(len(digits), 1)
    text[:, 2] = TOKEN["zero"] + digits
    return text


def text_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of the words, in nats. What comes before a caption is given, not predicted."""
    labels = input_ids[:, 1:].clone()
    labels[(labels == TOKEN["<image>"]) | (labels == TOKEN["<bos>"])] = -100
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())


# ---------------------------------------------------------------- stage 1: the vision encoder


def pretrain_vision_encoder(train: Split, steps: int) -> VisionEncoder:
    """Train an NFNet to tell which caption goes with which image, then freeze it."""
    nfnet = NormFreeNet(
        NfCfg(
            depths=(1, 1, 1, 1),
            channels=(32, 64, 96, 128),
            stem_type="deep_quad",
            stem_chs=32,
            group_size=16,
            bottle_ratio=0.5,
            extra_conv=True,
            num_features=0,
            act_layer="gelu",
            attn_layer="se",
            attn_kwargs={"rd_ratio": 0.5},
        ),
        num_classes=0,
        in_chans=1,
        output_stride=8,
    )
    width = 64
    image_head = nn.Linear(nfnet.num_features, width)
    text_tower = nn.Sequential(nn.EmbeddingBag(len(VOCABULARY), width), nn.GELU(), nn.Linear(width, width))
    contrastive_loss = ContrastiveLoss(temperature=0.1)
    model = nn.ModuleList([nfnet, image_head, text_tower, contrastive_loss]).to(train.images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    progress = trange(steps, desc="1/3 vision encoder ")
    for _ in progress:
        batch = torch.randint(len(train.images), (128,), device=train.images.device)
        image_embeddings = image_head(nfnet.forward_features(jitter(train.images[batch])).mean((2, 3)))
        text_embeddings = text_tower(captions(train.digits[batch]))
        positives = train.digits[batch, None] == train.digits[batch]
        loss = contrastive_loss(image_embeddings, text_embeddings, positives)
        descend(loss, model, optimizer, scheduler)
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return VisionEncoder(nfnet, image_size=IMAGE_SIZE, channels=1)


def jitter(images: Tensor) -> Tensor:
    """Turn, scale and shift each image a little."""
    n, device = len(images), images.device
    angle = torch.empty(n, device=device).uniform_(-0.2, 0.2)
    scale = torch.empty(n, device=device).uniform_(0.9, 1.1)
    shift = torch.empty(n, 2, device=device).uniform_(-0.12, 0.12)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    transform = torch.stack(
        [torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)], 1
    )
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


# ---------------------------------------------------------------- stage 2: the language model


def pretrain_language_model(steps: int, device: str) -> LlamaForCausalLM:
    """Train a Llama on captions of nothing, several a text, then freeze it."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=TOKEN["<pad>"],
        bos_token_id=TOKEN["<bos>"],
        eos_token_id=TOKEN["<EOC>"],
    )
    with torch.device(device):
        lm = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    progress = trange(steps, desc="2/3 language model ")
    for _ in progress:
        text = random_text(device)
        loss = text_loss(lm(text).logits, text)
        descend(loss, lm, optimizer, scheduler)
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return lm.requires_grad_(False).eval()


def random_text(device: str, *, rows: int = 32, captions_per_row: int = 4) -> Tensor:
    """Captions of digits that nobody wrote."""
    digits = torch.randint(10, (rows, captions_per_row), device=device)
    text = captions(digits.flatten()).view(rows, -1)
    return F.pad(text, (1, 0), value=TOKEN["<bos>"])


# ---------------------------------------------------------------- stage 3: Flamingo


class TinyFlamingo(nn.Module):
    """A frozen vision encoder and a frozen language model, joined by the two trained parts."""

    def __init__(self, vision_encoder: VisionEncoder, lm: LlamaForCausalLM) -> None:
        super().__init__()
        dim = find_hidden_size(lm)
        _, layers = find_decoder_layers(lm)
        self.vision_encoder = vision_encoder
        self.lm = lm
        self.resampler = PerceiverResampler(
            dim=dim, vision_dim=vision_encoder.vision_dim, depth=2, heads=4, latents=4, max_frames=1
        )
        blocks = {i: GatedCrossAttentionBlock(dim=dim, media_dim=dim, heads=4) for i in range(len(layers))}
        self.injector = LMLayerInjector(blocks).inject(layers)

    def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:
        """Give logits: input_ids (batch, text), features (batch, media, patches, vision_dim)."""
        media = self.resampler(features[:, :, None])
        num_media = torch.full((len(features),), features.shape[1], device=features.device)
        ranges = media_ranges(input_ids == TOKEN["<image>"])
        with self.injector.scope(media, MediaRuns.from_ranges(ranges, num_media=num_media)):
            logits: Tensor = self.lm(input_ids, use_cache=False).logits
        return logits

    def gates(self) -> list[tuple[float, float]]:
        """Give |tanh(alpha)| of the attention and of the feed-forward, layer by layer."""
        blocks: Any = self.injector.blocks.values()
        return [
            (block.gate.alpha.tanh().abs().item(), block.gate_feed_forward.alpha.tanh().abs().item())
            for block in blocks
        ]

    @torch.no_grad()
    def caption(self, images: Tensor) -> Tensor:
        """Write a caption for each image, greedily: images 1 height width -> images text."""
        features = self.vision_encoder(images)[:, None]
        text = prompt(len(images), images.device)
        length = text.shape[1]
        for _ in range(4):
            text = torch.cat([text, self(text, features)[:, -1:].argmax(-1)], dim=1)
        return text[:, length:]


def prompt(rows: int, device: torch.device) -> Tensor:
    """What stands before a caption."""
    return torch.tensor([[TOKEN["<bos>"], TOKEN["<image>"]]], device=device).repeat(rows, 1)


def train_flamingo(model: TinyFlamingo, train: Split, steps: int) -> list[list[tuple[float, float]]]:
    """Train what is not frozen on images and their captions; give the gates after each step."""
    # The encoder is frozen: each image is encoded once.
    features = model.vision_encoder(train.images)
    # The paper's choice: weight decay on the blocks' matrices, none on the resampler and the gates.
    blocks = list(model.injector.parameters())
    groups = [
        {"params": [p for p in blocks if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in blocks if p.ndim <= 1] + list(model.resampler.parameters()), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    gates = [model.gates()]
    progress = trange(steps, desc="3/3 Flamingo       ")
    for _ in progress:
        batch = torch.randint(len(features), (64,), device=features.device)
        input_ids = torch.cat([prompt(len(batch), features.device), captions(train.digits[batch])], dim=1)
        loss = text_loss(model(input_ids, features[batch, None]), input_ids)
        descend(loss, model, optimizer, scheduler)
        gates.append(model.gates())
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return gates


def descend(
    loss: Tensor,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Take one step, with the gradient's norm clipped to 1."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def difference_at_start(model: TinyFlamingo, split: Split) -> float:
    """Give max |logits with blocks - logits of the language model alone|."""
    input_ids = torch.cat([prompt(32, split.images.device), captions(split.digits[:32])], dim=1)
    with_blocks = model(input_ids, model.vision_encoder(split.images[:32])[:, None])
    return (with_blocks - model.lm(input_ids).logits).abs().max().item()


def caption_accuracy(model: TinyFlamingo, split: Split, *, blank: bool = False) -> float:
    """Give the share of images whose whole caption is right, word by word."""
    images = torch.zeros_like(split.images) if blank else split.images
    return round((model.caption(images) == captions(split.digits)).all(-1).float().mean().item(), 4)


@torch.no_grad()
def text_loss_of(lm: LlamaForCausalLM, device: str) -> float:
    """Give the language model's loss on a fixed text."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = random_text(device)
    return text_loss(lm(text).logits, text).item()


def plot_gates(gates: list[list[tuple[float, float]]], path: Path) -> None:
    """Draw |tanh(alpha)| by layer and step, as figure 6 of the paper does."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharex=True, sharey=True, layout="constrained")
    colors = plt.get_cmap("viridis")
    for kind, (axis, title) in enumerate(zip(axes, ("attention", "feed-forward"), strict=True)):
        for layer in range(len(gates[0])):
            color = colors(layer / len(gates[0]))
            axis.plot([step[layer][kind] for step in gates], label=f"layer {layer}", color=color)
        axis.set(title=f"{title} gate", xlabel="step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("|tanh(alpha)|")
    axes[1].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run the three stages and report."""
    parser = argparse.ArgumentParser(description="Flamingo in miniature, on handwritten digits.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=3, default=[300, 150, 300], metavar="N", help="of the three stages")
    parser.add_argument("--quick", action="store_true", help="a few steps a stage, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("runs/train_tiny"), help="where metrics.json and gates.png go")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    arguments = parser.parse_args()
    steps = [5, 5, 5] if arguments.quick else arguments.steps
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    started = time.perf_counter()

    splits = load_splits(arguments.device)
    vision_encoder = pretrain_vision_encoder(splits["train"], steps[0])
    lm = pretrain_language_model(steps[1], arguments.device)
    text_loss_before = text_loss_of(lm, arguments.device)
    model = TinyFlamingo(vision_encoder, lm).to(arguments.device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    difference = difference_at_start(model, splits["val"])
    gates = train_flamingo(model, splits["train"], steps[2])
    metrics = {
        "frozen_parameters": frozen,
        "trained_parameters": trained,
        "max_difference_from_lm_at_start": difference,
        "caption_accuracy": {
            "val": caption_accuracy(model, splits["val"]),
            "test": caption_accuracy(model, splits["test"]),
            "test_with_blanked_images": caption_accuracy(model, splits["test"], blank=True),
        },
        "text_loss_of_the_lm": {"before": text_loss_before, "after": text_loss_of(lm, arguments.device)},
        "gates_at_the_end": [{"attention": a, "feed_forward": f} for a, f in gates[-1]],
        "seed": arguments.seed,
        "steps": steps,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {
            "flamingo_blocks": flamingo_blocks.__version__,
            "python": platform.python_version(),
            "timm": timm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    plot_gates(gates, arguments.out / "gates.png")
    report(model, splits["test"], metrics, arguments.out)


def report(model: TinyFlamingo, test: Split, metrics: dict[str, Any], out: Path) -> None:
    """Print what was found."""
    accuracy, loss = metrics["caption_accuracy"], metrics["text_loss_of_the_lm"]
    print("\nUnseen images and their captions:")
    for digit, caption in zip(test.digits[:5].tolist(), model.caption(test.images[:5]).tolist(), strict=True):
        print(f"  a scan of a {digit}:  {' '.join(VOCABULARY[token] for token in caption)}")
    print(f"\nFrozen parameters           {metrics['frozen_parameters']:>9,}")
    print(f"Trained parameters          {metrics['trained_parameters']:>9,}")
    print(f"Max |with blocks - LM| at the start  {metrics['max_difference_from_lm_at_start']}")
    print(f"Captions right, {len(test.digits)} unseen images     {accuracy['test']:.3f}")
    print(f"Captions right, images blanked       {accuracy['test_with_blanked_images']:.3f}")
    print(f"LM's loss on text, before and after  {loss['before']:.6f}, {loss['after']:.6f} nats")
    for layer, gate in enumerate(metrics["gates_at_the_end"]):
        print(f"|tanh(alpha)| of layer {layer}: attention {gate['attention']:.3f}, ffw {gate['feed_forward']:.3f}")
    print(f"{metrics['seconds']} s in all. Written: {out / 'metrics.json'}, {out / 'gates.png'}")


if __name__ == "__main__":
    main()
