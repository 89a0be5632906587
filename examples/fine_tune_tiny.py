"""Fine-tune a finished Flamingo on one task, and compare that with examples in the prompt.

The model is one that `train_tiny.py` trained and saved. The task: say which of the ten digits an image shows, in names
that its third stage never used. The same labelled images are put into the prompt, or the model is fine-tuned on them:
with its vision encoder frozen; with the vision encoder trained, too; and that at a higher resolution, which is what the
paper does (Alayrac et al. 2022, section 3.2 and appendix B.2.2). Each is asked for images that no stage has seen.

    python examples/train_tiny.py --out runs/train_tiny
    python examples/fine_tune_tiny.py --model runs/train_tiny/model --out runs/fine_tune_tiny

writes metrics.json and the adapters of the models that were fine-tuned on most images.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sklearn
import timm
import torch
import torch.nn.functional as F
import transformers
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from tqdm import tqdm

import flamingo_blocks
import train_tiny
from flamingo_blocks import FlamingoForConditionalGeneration, FlamingoProcessor, parameter_groups
from flamingo_blocks.configuration_flamingo import FlamingoConfig
from tiny_world import IMAGE_SIZE, UNSEEN_NAMES, Digits, Features, draw_prompts, ids_of, load_splits
from train_tiny import encode, jitter, tokens_of

# Ways to fine-tune: whether the vision encoder is trained, too, and the images' height and width.
WAYS: dict[str, tuple[bool, int]] = {
    "frozen_encoder": (False, IMAGE_SIZE),
    "trained_encoder": (True, IMAGE_SIZE),
    "higher_resolution": (True, 3 * IMAGE_SIZE // 2),  # as in the paper, from 320 to 480
    "names_shuffled": (False, IMAGE_SIZE),
}
# Those that are tried with each number of labelled images; the others with the last one alone.
BY_EXAMPLES = ("frozen_encoder", "trained_encoder")


def load(path: Path, *, train_encoder: bool, image_size: int) -> tuple[FlamingoForConditionalGeneration, Any]:
    """Load a finished model, to be fine-tuned, and its processor.

    Args:
        path: What `save_pretrained` wrote.
        train_encoder: Whether the vision encoder is to be trained, too. The language model stays frozen.
        image_size: Height and width. An NFNet takes any.
    """
    config: Any = FlamingoConfig.from_pretrained(path)
    config.vision_config.image_size = [image_size, image_size]
    config.freeze = ["language_model"] if train_encoder else ["language_model", "vision_encoder"]
    model = FlamingoForConditionalGeneration.from_pretrained(path, config=config)
    processor: Any = FlamingoProcessor.from_pretrained(path)
    processor.image_processor.size = {"height": image_size, "width": image_size}
    return model, processor


def fine_tune(
    model: FlamingoForConditionalGeneration,
    pixel_values: Tensor,
    names: Tensor,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 32,
) -> None:
    """Train what is not frozen to call images by their names, without examples in front.

    Args:
        model: It is left in eval mode.
        pixel_values: Of the labelled images, (images, channels, height, width).
        names: Token ids, (images,).
        steps: Number of steps.
        learning_rate: At its highest.
        batch_size: Images of a step.
    """
    text = tokens_of(model).interleave(names[:, None])  # <bos> <image> name <EOC>
    labels = tokens_of(model).labels(text)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: train_tiny.learning_rate(step, steps))
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(names), (batch_size,))
        images = jitter(pixel_values[batch])[:, None, None]  # batch media frames channels height width
        loss: Any = model(text[batch], pixel_values=images, labels=labels[batch]).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.train(False)


@torch.no_grad()
def ask(
    model: FlamingoForConditionalGeneration, asked: Features, names: Tensor, shown: Features | None = None
) -> Tensor:
    """Ask which digit images show, and give the logit of each name, (images, 10).

    Args:
        model: In eval mode.
        asked: Images that are asked for.
        names: Token id of each digit's name, (10,).
        shown: Examples in front of each image, in another order each time. None: none.
    """
    order = torch.rand(len(asked.digits), 0 if shown is None else len(shown.digits)).argsort(1)
    features, shown_names = asked.features, order
    if shown is not None:
        features = torch.cat([shown.features[order, 0], features], dim=1)
        shown_names = names[shown.digits[order]]
    text = tokens_of(model).interleave(shown_names, query=True)
    logits = [
        model(ids, vision_features=part[:, :, None], logits_to_keep=1).logits[:, -1, names]
        for ids, part in zip(text.split(100), features.split(100), strict=True)
    ]
    return torch.cat(logits)


def share_of_right(logits: Tensor, digits: Tensor) -> float:
    """Give the share of images whose likeliest name is that of their digit."""
    return (logits.argmax(1) == digits).float().mean().item()


def few_shot_accuracy(model: FlamingoForConditionalGeneration, asked: Features) -> float:
    """Ask as `train_tiny.py` does: two digits get other names in each prompt, and eight examples tell them."""
    prompts = draw_prompts(asked, list(range(10)), 8, 200, seed=8)
    return train_tiny.accuracy(train_tiny.answer(model, asked, prompts), prompts)[0]


def linear_classifier_accuracy(labelled: Features, asked: Features) -> float:
    """Do without a language model: a logistic regression on the mean features of the frozen vision encoder."""
    vectors, unseen = labelled.features.mean((1, 2)), asked.features.mean((1, 2))
    mean, std = vectors.mean(0), vectors.std()
    classifier = LogisticRegression(max_iter=1000).fit(((vectors - mean) / std).numpy(), labelled.digits.numpy())
    return float(classifier.score(((unseen - mean) / std).numpy(), asked.digits.numpy()))


def encode_upright(model: FlamingoForConditionalGeneration, processor: Any, split: Digits) -> Features:
    """Encode the images of a split as they are."""
    return Features(encode(model, processor.image_processor(split.pictures)["pixel_values"])[:, None], split.digits)


def draw_labelled(train: Digits, count: int) -> Digits:
    """Draw images for labels: each digit equally often, or one more of some, as long as there are enough."""
    order = torch.randperm(len(train.digits))
    one_hot = F.one_hot(train.digits[order])
    nth = ((one_hot.cumsum(0) - one_hot) * one_hot).sum(1)  # of its digit
    chosen = order[(nth + torch.rand(len(nth))).argsort()][:count]
    return Digits([train.pictures[i] for i in chosen.tolist()], train.pixel_values[chosen], train.digits[chosen])


def size_of(folder: Path) -> int:
    """Give the bytes of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a finished Flamingo on handwritten digits.")
    parser.add_argument("--model", type=Path, default=Path("runs/train_tiny/model"), help="what train_tiny.py saved")
    parser.add_argument("--seed", type=int, default=0, help="of the names, of what is labelled and of training")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 2, 4, 8, 16], metavar="N", help="in the prompt")
    parser.add_argument(
        "--examples", type=int, nargs="+", default=[16, 64, 256, 997], metavar="N", help="to fine-tune on"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--quick", action="store_true", help="2 steps and 16 examples, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("runs/fine_tune_tiny"), help="where everything is written")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    parser.add_argument(
        "--evaluate-on", choices=("test", "val"), default="test", help="val is for tuning, so that test stays unseen"
    )
    arguments = parser.parse_args(words)
    if min(arguments.shots) < 0 or max(arguments.shots) > 32:
        parser.error("--shots: give numbers from 0 to 32")
    if min(arguments.examples) < 10 or max(arguments.examples) > 997:
        parser.error("--examples: give numbers from 10 to 997, which is all there are")
    if arguments.quick:
        arguments.steps, arguments.examples, arguments.shots = 2, [16], [0, 2]
    return arguments


def main() -> None:
    """Prompt, fine-tune, evaluate and report."""
    arguments = parse_arguments()
    out: Path = arguments.out
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    splits = load_splits()
    unseen = splits[arguments.evaluate_on]
    torch.manual_seed(arguments.seed)
    names = ids_of(UNSEEN_NAMES)[torch.randperm(len(UNSEEN_NAMES))[:10]]
    labelled = draw_labelled(splits["train"], len(splits["train"].digits))

    model, processor = load(arguments.model, train_encoder=False, image_size=IMAGE_SIZE)
    examples, asked = encode_upright(model, processor, labelled), encode_upright(model, processor, unseen)
    found: dict[str, dict[int, float]] = {"prompting": {}, "linear_classifier": {}}
    for shots in tqdm(arguments.shots, desc="prompting"):
        shown = Features(examples.features[:shots], examples.digits[:shots]) if shots else None
        found["prompting"][shots] = share_of_right(ask(model, asked, names, shown), unseen.digits)
    for count in arguments.examples:
        some = Features(examples.features[:count], examples.digits[:count])
        found["linear_classifier"][count] = linear_classifier_accuracy(some, asked)
    few_shot = {"before": {0: few_shot_accuracy(model, asked)}}

    adapters: dict[str, dict[str, float]] = {}
    for way in arguments.ways:
        train_encoder, image_size = WAYS[way]
        found[way], few_shot[way] = {}, {}
        for count in tqdm(arguments.examples if way in BY_EXAMPLES else arguments.examples[-1:], desc=way):
            model, processor = load(arguments.model, train_encoder=train_encoder, image_size=image_size)
            digits = labelled.digits[:count]
            fine_tune(
                model,
                processor.image_processor(labelled.pictures[:count])["pixel_values"],
                names[digits[torch.randperm(count)] if way == "names_shuffled" else digits],
                steps=arguments.steps,
                learning_rate=arguments.learning_rate,
            )
            asked = encode_upright(model, processor, unseen)
            logits = ask(model, asked, names)
            found[way][count] = share_of_right(logits, unseen.digits)
            few_shot[way][count] = few_shot_accuracy(model, asked)
        model.save_adapter(out / way)
        processor.save_pretrained(out / way)
        loaded = FlamingoForConditionalGeneration.from_adapter(out / way)
        difference = ask(loaded, encode_upright(loaded, processor, unseen), names) - logits
        adapters[way] = {
            "bytes": size_of(out / way),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "max_difference_of_the_loaded_model": difference.abs().max().item(),
        }
    metrics = {
        "evaluated_on": arguments.evaluate_on,
        "accuracy": found,
        "few_shot_accuracy": few_shot,
        "adapters": adapters,
        "bytes_of_the_whole_model": size_of(arguments.model),
        "seed": arguments.seed,
        "steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {
            "flamingo_blocks": flamingo_blocks.__version__,
            "python": platform.python_version(),
            "scikit-learn": sklearn.__version__,
            "timm": timm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    report(metrics, out)


def report(metrics: dict[str, Any], out: Path) -> None:
    """Print what was found."""
    for title, table in (
        ("right names of ten, by labelled images", metrics["accuracy"]),
        ("right names of two, told in the prompt, after fine-tuning", metrics["few_shot_accuracy"]),
    ):
        print(f"\n{title}")
        for name, row in table.items():
            cells = ", ".join(f"{count}: {accuracy:.3f}" for count, accuracy in row.items())
            print(f"{name:<20}{cells}")
    print(f"\n{metrics['seconds']} s in all. Written to {out}: metrics.json, {', '.join(metrics['adapters'])}")


if __name__ == "__main__":
    main()
