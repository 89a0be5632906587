"""Flamingo in miniature: a frozen language model is taught to name images from examples in its prompt. No downloads.

The three stages of the paper (Alayrac et al. 2022, section 3 and appendix B), each in its own function:

1. a small timm NFNet learns from images and captions by contrast, and is frozen;
2. a small Llama learns a made-up language from text alone, and is frozen;
3. a Perceiver Resampler and gated cross-attention blocks, the only trained parts, learn to make the second say what the
   first sees, from captions and from texts in which images get names.

Then it is tested on images that no stage has seen, of digits that stage 3 has not seen, with names that stage 3 has not
seen: after a few examples in the prompt it should name another image of the same digit.

The images are the 1,797 scans of handwritten digits that ship with scikit-learn; `tiny_world.py` beside this file makes
the texts.

    python examples/train_tiny.py --out runs/train_tiny

writes metrics.json, shots.png, gates.png, samples.png and the trained model there.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import transformers
from timm.models import save_for_hf
from torch import Tensor, nn
from tqdm import tqdm, trange
from transformers import LlamaConfig, LlamaForCausalLM

import flamingo_blocks
from flamingo_blocks import FlamingoForConditionalGeneration, build_flamingo
from flamingo_blocks.blocks import ContrastiveLoss
from tiny_plots import LINES, plot_gates, plot_samples, plot_shots
from tiny_world import (
    IMAGE_SIZE,
    MEAN,
    ORIENTATIONS,
    STD,
    TOKEN,
    VOCABULARY,
    Digits,
    Features,
    Prompts,
    Tokens,
    caption,
    draw_episodes,
    draw_prompts,
    load_splits,
    make_tokenizer,
    make_up_characters,
    orient_all,
    write_captions,
    write_entries,
)

# Architecture and arguments of timm.create_model, which makes the backbone again from them when the model is loaded.
NFNET = "nfnet_f0"
NFNET_ARGUMENTS: dict[str, Any] = {
    "depths": [1, 1, 1, 1],
    "channels": [32, 64, 96, 128],
    "stem_type": "deep_quad",
    "stem_chs": 32,
    "group_size": 16,
    "bottle_ratio": 0.5,
    "extra_conv": True,
    "num_features": 0,
    "act_layer": "gelu",
    "attn_layer": "se",
    "attn_kwargs": {"rd_ratio": 0.5},
    "output_stride": 8,
    "in_chans": 1,
    "num_classes": 0,
}


class Descent:
    """Take steps down a loss, with a warm-up and the gradient's norm clipped to 1.

    The matrices of linear layers are trained by Muon, everything else by AdamW. The paper has AdamW alone, with
    which these small models did not come as far in as many steps.

    Args:
        model: What is trained.
        steps: Number of steps.
        muon: Whether to use Muon at all.
        weight_decay: For everything that AdamW trains.
    """

    def __init__(self, model: nn.Module, steps: int, *, muon: bool = True, weight_decay: float = 0.0) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        linear = {id(m.weight) for m in model.modules() if muon and isinstance(m, nn.Linear)} - embeddings
        gates = {id(p) for name, p in model.named_parameters() if name.endswith("alpha")}
        matrices = [p for p in self.parameters if id(p) in linear]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters if id(p) not in linear | gates], "lr": 3e-3},
            {"params": [p for p in self.parameters if id(p) in gates], "lr": 15e-3},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98), weight_decay=weight_decay)
        ]
        if matrices:
            self.optimizers.append(torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01))
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
            for optimizer in self.optimizers
        ]

    def step(self, loss: Tensor) -> None:
        """Take one step."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def learning_rate(step: int, steps: int) -> float:
    """Give the share of the full learning rate: up in a line for a tenth of the steps, then down as a cosine to 0."""
    return min(1.0, (step + 1) / (0.1 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


# ---------------------------------------------------------------- stage 1: the vision encoder


def pretrain_vision_encoder(
    train: Digits,
    steps: int,
    path: Path,
    device: str,
    *,
    architecture: str = NFNET,
    arguments: Mapping[str, Any] = NFNET_ARGUMENTS,
) -> None:
    """Train a backbone of timm to tell which caption goes with which image, and save it as timm does."""
    overlay = {"input_size": (1, IMAGE_SIZE, IMAGE_SIZE), "mean": (MEAN,), "std": (STD,), "crop_pct": 1.0}
    backbone: Any = timm.create_model(architecture, pretrained_cfg_overlay=overlay, **arguments)
    width = 64
    image_head = nn.Linear(backbone.num_features, width)
    text_tower = nn.Sequential(nn.EmbeddingBag(len(VOCABULARY), width), nn.GELU(), nn.Linear(width, width))
    contrastive_loss = ContrastiveLoss(temperature=0.1)
    model = nn.ModuleList([backbone, image_head, text_tower, contrastive_loss]).to(device)
    descent = Descent(model, steps, muon=False, weight_decay=0.05)
    images = orient_all(train.pixel_values)
    progress = trange(steps, desc="1/4 vision encoder ")
    for _ in progress:
        batch, orientations = torch.randint(len(images), (128,)), torch.randint(len(ORIENTATIONS), (128,))
        digits = train.digits[batch]
        captions = caption(digits, end=TOKEN["."], orientations=orientations)
        is_same = (captions[:, None] == captions).all(-1)
        pixel_values = jitter(images[batch, orientations]).to(device)
        features = backbone.forward_features(pixel_values)  # of a grid, or of patches in a row
        image_embeddings = image_head(features.mean((2, 3) if features.ndim == 4 else 1))
        loss = contrastive_loss(image_embeddings, text_tower(captions.to(device)), is_same.to(device))
        descent.step(loss)
        progress.set_postfix(loss=f"{loss.item():.3f}")
    save_for_hf(backbone, str(path), model_args=dict(arguments), safe_serialization=True)


def jitter(images: Tensor) -> Tensor:
    """Turn, scale and shift each image a little."""
    angle, scale = (torch.empty(len(images)).uniform_(-limit, limit) for limit in (0.25, 0.15))
    shift = torch.empty(len(images), 2).uniform_(-0.125, 0.125)
    cosine, sine = angle.cos() * (1 + scale), angle.sin() * (1 + scale)
    transform = torch.stack([cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


# ---------------------------------------------------------------- stage 2: the language model


def make_language_model_config(*, layers: int = 4, width: int = 96) -> LlamaConfig:
    """Describe a small Llama of the made-up language."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=TOKEN["<pad>"],
        bos_token_id=TOKEN["<bos>"],
        eos_token_id=TOKEN["<eos>"],
    )


def pretrain_language_model(steps: int, path: Path, device: str, *, config: LlamaConfig | None = None) -> None:
    """Train a Llama on text alone, and save it with its tokenizer.

    What it must learn is to find a name again that stood earlier in the text: what Flamingo will use images for. Large
    language models learn that from web-scale text. Here the endings help, which agree with the word before the last and
    so teach the first half of it, to look back.
    """
    lm: Any = LlamaForCausalLM(make_language_model_config() if config is None else config)
    lm.to(device)
    descent = Descent(lm, steps, weight_decay=0.01)
    progress = trange(steps, desc="2/4 language model ")
    for step in progress:
        # Every fourth time longer texts, so that prompts may be longer, too.
        loss = text_loss(lm, *((32, 20) if step % 4 == 0 else (64, 10)))
        descent.step(loss)
        progress.set_postfix(loss=f"{loss.item():.3f}")
    lm.save_pretrained(path)
    make_tokenizer().save_pretrained(path)


def text_loss(lm: Any, rows: int, entries: int) -> Tensor:
    """Give the loss of texts of the made-up language, so many rows of entries and some captions."""
    text, can_be_known = (tensor.to(lm.device) for tensor in write_entries(rows, entries=entries))
    captions = write_captions(16).to(lm.device)
    of_entries = next_word_loss(lm, text)
    # Names that can be known, and the endings, have terms of their own: they are few among all words.
    names, endings = of_entries[:, 1::3][can_be_known], of_entries[:, 2::3]
    return of_entries.mean() + names.mean() + endings.mean() + 0.3 * next_word_loss(lm, captions).mean()


def next_word_loss(lm: Any, text: Tensor) -> Tensor:
    """Give the negative log-likelihood of each word but the first, in nats: batch text -> batch text-1."""
    logits: Tensor = lm(text, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), text[:, 1:], reduction="none")


# ---------------------------------------------------------------- stage 3: Flamingo


def train_flamingo(
    model: FlamingoForConditionalGeneration, train: Features, characters: Tensor, digits: list[int], steps: int
) -> list[list[tuple[float, float]]]:
    """Train what is not frozen, on some of the digits; give the gates after each step.

    Args:
        model: What is trained.
        train: Features of the images.
        characters: Features of made-up characters, (characters, copies, patches, vision_dim).
        digits: Digits that may occur.
        steps: Number of steps.
    """
    images = torch.isin(train.digits, torch.tensor(digits)).nonzero().squeeze(-1)
    descent = Descent(model, steps)
    gates = [gates_of(model)]
    model.train()
    progress = trange(steps, desc="3/4 Flamingo       ")
    for _ in progress:
        # As in the paper, a batch of each kind of data for each step, weighted.
        loss = episodes_loss(model, train, characters, digits) + 0.3 * captions_loss(model, train, images)
        descent.step(loss)
        gates.append(gates_of(model))
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.train(False)
    return gates


def episodes_loss(
    model: FlamingoForConditionalGeneration, train: Features, characters: Tensor, digits: list[int], rows: int = 32
) -> Tensor:
    """Give the loss of texts in which images get names."""
    names, features = draw_episodes(train, characters, digits, rows)
    return loss_of(model, tokens_of(model).interleave(names), features)


def captions_loss(model: FlamingoForConditionalGeneration, train: Features, images: Tensor, rows: int = 32) -> Tensor:
    """Give the loss of captions of some of the images."""
    tokens, batch = tokens_of(model), images[torch.randint(len(images), (rows,))]
    text = torch.cat([tokens.begin(rows), caption(train.digits[batch], end=tokens.end_of_chunk)], dim=1)
    return loss_of(model, text, train.features[batch, :1])


def loss_of(model: FlamingoForConditionalGeneration, input_ids: Tensor, features: Tensor) -> Tensor:
    """Give the loss of text (batch, text) with features (batch, images, patches, vision_dim)."""
    output = model(
        input_ids.to(model.device),
        vision_features=features[:, :, None].to(model.device),
        labels=tokens_of(model).labels(input_ids).to(model.device),
    )
    loss: Tensor = output.loss
    return loss


def tokens_of(model: FlamingoForConditionalGeneration) -> Tokens:
    """Give the two tokens that are new to the language model."""
    config: Any = model.config
    return Tokens(image=config.image_token_id, end_of_chunk=config.end_of_chunk_token_id)


def gates_of(model: FlamingoForConditionalGeneration) -> list[tuple[float, float]]:
    """Give |tanh(alpha)| of the attention and of the feed-forward, layer by layer."""
    blocks: Iterable[Any] = model.injector.blocks.values()
    return [
        (block.gate.alpha.tanh().abs().item(), block.gate_feed_forward.alpha.tanh().abs().item()) for block in blocks
    ]


@torch.no_grad()
def encode(model: FlamingoForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Encode images, once for all, since the encoder is frozen: ... channels height width -> ... patches vision_dim."""
    shape = pixel_values.shape[:-3]
    parts = [model.vision_encoder(part.to(model.device)).cpu() for part in pixel_values.flatten(0, -4).split(256)]
    return torch.cat(parts).unflatten(0, shape)


def encode_split(model: FlamingoForConditionalGeneration, split: Digits, *, copies: int = 0) -> Features:
    """Encode the images of a split, in each orientation, and so many jittered copies of each."""
    images = torch.cat([split.pixel_values, *(jitter(split.pixel_values) for _ in range(copies))])
    return Features(encode(model, orient_all(images)), split.digits.repeat(1 + copies))


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def difference_at_start(model: FlamingoForConditionalGeneration, features: Features) -> float:
    """Give max |logits of Flamingo - logits of the language model|, on text whose every token sees an image."""
    text, _ = write_entries(32)
    text = text.to(model.device)
    sees_the_image = torch.tensor([0, 1], device=model.device).expand(*text.shape, 2)
    images = features.features[:32, :1, None].to(model.device)
    logits = model(text, vision_features=images, media_ranges=sees_the_image).logits
    expected: Tensor = model.language_model(text).logits
    return (logits[..., : expected.shape[-1]] - expected).abs().max().item()


@torch.no_grad()
def text_accuracy(lm: Any) -> float:
    """Give the share of names that a language model finds again in text, of those that stood before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text, can_be_known = write_entries(256, rare_nouns=True)
    predicted = lm(text.to(lm.device)).logits.argmax(-1).cpu()
    return (predicted[:, 1::3] == text[:, 2::3])[can_be_known].float().mean().item()


@torch.no_grad()
def caption_accuracy(
    model: FlamingoForConditionalGeneration, split: Digits, digits: list[int], *, blank: bool
) -> float:
    """Give the share of images of some digits whose whole caption is right, word by word."""
    chosen = torch.isin(split.digits, torch.tensor(digits))
    pixel_values = split.pixel_values[chosen]
    if blank:
        pixel_values = torch.full_like(pixel_values, split.pixel_values.min().item())
    tokens = tokens_of(model)
    text = tokens.begin(len(pixel_values))
    expected = caption(split.digits[chosen], end=tokens.end_of_chunk)
    generated = model.generate(
        text.to(model.device), pixel_values=pixel_values[:, None, None].to(model.device), max_new_tokens=4
    ).cpu()
    generated = F.pad(generated[:, text.shape[1] :], (0, text.shape[1] + 4 - generated.shape[1]))
    return (generated == expected).all(-1).float().mean().item()


@torch.no_grad()
def answer(model: FlamingoForConditionalGeneration, features: Features, prompts: Prompts) -> Tensor:
    """Give the logits of the word that follows each prompt."""
    shown = prompts.names.gather(1, prompts.shown)
    text = tokens_of(model).interleave(shown, query=True)
    images = features.features[prompts.images, 0][:, :, None]
    logits = [
        model(ids.to(model.device), vision_features=part.to(model.device), logits_to_keep=1).logits[:, -1].cpu()
        for ids, part in zip(text.split(100), images.split(100), strict=True)
    ]
    return torch.cat(logits)


def accuracy(logits: Tensor, prompts: Prompts) -> tuple[float, float]:
    """Give the share of right answers: the better of the two names, and the best of all words."""
    better = logits.gather(1, prompts.names).argmax(1) == prompts.which[:, -1]
    best = logits.argmax(1) == prompts.answers
    return better.float().mean().item(), best.float().mean().item()


def nearest_centroid(features: Features, prompts: Prompts, center: Tensor) -> float:
    """Give the share of right answers of a nearest centroid, on the frozen encoder's features of the same prompts."""
    vectors = F.normalize(features.features[:, 0].mean(1) - center, dim=-1)[prompts.images]
    one_hot = F.one_hot(prompts.which[:, :-1], 2).to(vectors.dtype)
    centroids = one_hot.transpose(1, 2) @ vectors[:, :-1]
    scores = F.cosine_similarity(centroids, vectors[:, -1:], dim=-1)
    return (scores.argmax(1) == prompts.which[:, -1]).float().mean().item()


def evaluate_few_shot(
    model: FlamingoForConditionalGeneration,
    features: Features,
    *,
    withheld: list[int],
    shots: list[int],
    center: Tensor,
    count: int,
) -> dict[str, dict[int, float]]:
    """Ask for names of images, after some examples in the prompt.

    Args:
        model: A trained model.
        features: Images that no stage has seen.
        withheld: Digits that stage 3 has not seen.
        shots: Numbers of examples.
        center: Mean of the encoder's features in training, for the nearest centroid.
        count: Prompts for each number of examples.

    Returns:
        Accuracy by number of examples, for each row of the table.
    """
    seen = sorted(set(range(10)) - set(withheld))
    found: dict[str, dict[int, float]] = {
        name: {} for name in ("withheld", "withheld_all_words", "seen", "names_shuffled", "nearest_centroid")
    }
    for number in tqdm(shots, desc="4/4 evaluation     "):
        prompts = draw_prompts(features, withheld, number, count, seed=number)
        better, best = accuracy(answer(model, features, prompts), prompts)
        found["withheld"][number], found["withheld_all_words"][number] = better, best
        if number >= 2:  # with one example of one digit there is one centroid
            found["nearest_centroid"][number] = nearest_centroid(features, prompts, center)
            prompts = draw_prompts(features, withheld, number, count, seed=number, shuffle=True)
            found["names_shuffled"][number] = accuracy(answer(model, features, prompts), prompts)[0]
        prompts = draw_prompts(features, seen, number, count, seed=number)
        found["seen"][number] = accuracy(answer(model, features, prompts), prompts)[0]
    return found


# ---------------------------------------------------------------- samples, through processor and generate


def write_samples(
    model: FlamingoForConditionalGeneration, processor: Any, split: Digits, prompts: Prompts
) -> list[str]:
    """Answer prompts as a user would ask them: text and pictures in, text out."""
    generated = []
    for images, names, shown in zip(prompts.images, prompts.names, prompts.shown, strict=True):
        words = [VOCABULARY[i] for i in names[shown].tolist()]
        text = "<bos> " + " ".join(f"<image> {word} <EOC>" for word in words) + " <image>"
        inputs = processor(text=text, images=[split.pictures[i] for i in images.tolist()]).to(model.device)
        output = model.generate(**inputs, max_new_tokens=1)
        generated += processor.batch_decode(output[:, -1:])
    return generated


# ---------------------------------------------------------------- all together


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Flamingo in miniature, on handwritten digits.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--withhold",
        type=int,
        nargs="+",
        choices=range(10),
        metavar="DIGIT",
        help="digits that stage 3 does not see; by default the seed's last digit and the fifth after it",
    )
    parser.add_argument(
        "--shots", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16], metavar="N", help="examples in a prompt"
    )
    parser.add_argument("--steps", type=int, nargs=3, default=[700, 300, 600], metavar="N", help="of the three stages")
    parser.add_argument("--prompts", type=int, default=500, help="prompts for each number of examples")
    parser.add_argument(
        "--quick", action="store_true", help="5 steps a stage and 20 prompts, to see that everything runs"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/train_tiny"), help="where everything is written")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    parser.add_argument(
        "--evaluate-on", choices=("test", "val"), default="test", help="val is for tuning, so that test stays unseen"
    )
    arguments = parser.parse_args(words)
    if arguments.withhold is None:
        arguments.withhold = [arguments.seed % 10, (arguments.seed + 5) % 10]
    arguments.withhold = sorted(set(arguments.withhold))
    if not 2 <= len(arguments.withhold) <= 5:
        parser.error("--withhold: give 2 to 5 digits: 2 are compared, and stage 3 needs 5")
    if min(arguments.shots) < 0 or max(arguments.shots) > 32:
        parser.error("--shots: give numbers from 0 to 32; there are too few images for more")
    for name in ("steps", "prompts", "threads"):
        values = getattr(arguments, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name}: give at least 1")
    if arguments.quick:
        arguments.steps, arguments.prompts = [5, 5, 5], 20
    return arguments


def main() -> None:
    """Run the three stages, evaluate and report."""
    arguments = parse_arguments()
    out: Path = arguments.out
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    splits = load_splits()
    unseen_split = splits[arguments.evaluate_on]
    withheld = arguments.withhold
    seen = sorted(set(range(10)) - set(withheld))

    torch.manual_seed(arguments.seed)
    pretrain_vision_encoder(splits["train"], arguments.steps[0], out / "vision_encoder", arguments.device)
    pretrain_language_model(arguments.steps[1], out / "language_model", arguments.device)
    model, processor = build_flamingo(
        out / "language_model",
        out / "vision_encoder",
        image_size=IMAGE_SIZE,
        channels=1,
        cross_attention_heads=4,
        cross_attention_hidden=128,
        resampler_dim=64,
        resampler_depth=1,
        resampler_heads=4,
        num_latents=4,
        max_frames=1,
    )
    model.to(arguments.device)
    train, unseen = encode_split(model, splits["train"], copies=3), encode_split(model, unseen_split)
    characters = encode(model, make_up_characters(splits["train"], seen))
    accuracy_before = text_accuracy(model.language_model)
    difference = difference_at_start(model, train)
    gates = train_flamingo(model, train, characters, seen, arguments.steps[2])

    few_shot = evaluate_few_shot(
        model,
        unseen,
        withheld=withheld,
        shots=arguments.shots,
        center=train.features[:, 0].mean((0, 1)),
        count=arguments.prompts,
    )
    captions = {
        name: caption_accuracy(model, unseen_split, seen, blank=name == "blank") for name in ("unseen", "blank")
    }
    model.save_pretrained(out / "model")
    processor.save_pretrained(out / "model")
    loaded = FlamingoForConditionalGeneration.from_pretrained(out / "model").to(arguments.device)
    prompts = draw_prompts(unseen, withheld, 4, arguments.prompts, seed=4)
    logits = answer(model, unseen, prompts)
    metrics = {
        "withheld_digits": withheld,
        "evaluated_on": arguments.evaluate_on,
        "few_shot_accuracy": few_shot,
        "caption_accuracy": captions,
        "text_accuracy_of_the_lm": {"before": accuracy_before, "after": text_accuracy(model.language_model)},
        "max_difference_from_lm_at_start": difference,
        "max_difference_of_the_loaded_model": (logits - answer(loaded, unseen, prompts)).abs().max().item(),
        "frozen_parameters": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "gates_at_the_end": [{"attention": a, "feed_forward": f} for a, f in gates[-1]],
        "prompts": arguments.prompts,
        "seed": arguments.seed,
        "steps": arguments.steps,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {
            "flamingo_blocks": flamingo_blocks.__version__,
            "python": platform.python_version(),
            "timm": timm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    plot_gates(gates, out / "gates.png")
    plot_shots({name: {n: [v] for n, v in row.items()} for name, row in few_shot.items()}, out / "shots.png")
    is_right = logits.argmax(1) == prompts.answers
    chosen = torch.cat([is_right.nonzero()[:4, 0], (~is_right).nonzero()[:2, 0]])
    some = Prompts(*(tensor[chosen] for tensor in vars(prompts).values()))
    answers = write_samples(loaded, processor, unseen_split, some)
    plot_samples(unseen_split.pictures, some, answers, is_right.float().mean().item(), out / "samples.png")
    report(metrics, out)


def report(metrics: dict[str, Any], out: Path) -> None:
    """Print what was found."""
    few_shot, captions, text = (
        metrics[name] for name in ("few_shot_accuracy", "caption_accuracy", "text_accuracy_of_the_lm")
    )
    withheld = " and ".join(map(str, metrics["withheld_digits"]))
    print()
    print(
        f"Frozen, trained parameters              {metrics['frozen_parameters']:,}, {metrics['trained_parameters']:,}"
    )
    print(f"Max |Flamingo - LM| at the start        {metrics['max_difference_from_lm_at_start']}")
    print(f"Max |model - saved and loaded model|    {metrics['max_difference_of_the_loaded_model']}")
    print(f"LM's text accuracy, before and after    {text['before']:.4f}, {text['after']:.4f}")
    print(f"Captions right, of unseen images        {captions['unseen']:.3f}")
    print(f"Captions right, of blank images         {captions['blank']:.3f}")
    print(f"\nNew names for unseen images, told in the prompt alone (withheld from stage 3: {withheld})")
    shots = list(few_shot["withheld"])
    print(f"{'examples in the prompt':<40}" + "".join(f"{number:>7}" for number in shots))
    for name, (label, _) in LINES.items():
        cells = "".join(f"{few_shot[name][n]:>7.3f}" if n in few_shot[name] else " " * 7 for n in shots)
        print(f"{label:<40}{cells}")
    print("Of two names, chance is 0.5.")
    print(f"\n{metrics['seconds']} s in all. Written to {out}: metrics.json, shots.png, gates.png, samples.png, model/")


if __name__ == "__main__":
    main()
