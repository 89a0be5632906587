"""Pre-train a vision encoder on images with texts by contrast, as Flamingo's: any timm backbone, with BERT for texts.

The loss has two terms, a learned temperature and label smoothing (Alayrac et al. 2022, appendix B.1.3). Without --data
it runs on scikit-learn's handwritten digits, turned and mirrored, with captions of `tiny_world.py`. No downloads then.

    python examples/pretrain_vision_encoder.py --out runs/vision_encoder
    python examples/pretrain_vision_encoder.py --data pairs.jsonl --architecture nfnet_f6 --precision bf16
    torchrun --nproc_per_node 2 examples/pretrain_vision_encoder.py --data pairs.jsonl --batch-size 128

--data is a file with a line `{"image": "cat.jpg", "text": "a cat"}` for each pair, or a folder with `cat.txt` beside
`cat.jpg`. With several processes, images and texts of all of them are compared: two with a batch of 128 each make the
same steps as one with 256. It writes vision_encoder/, which `build_flamingo` takes, metrics.json, and checkpoint.pt,
from which the same command goes on if it was stopped.
"""

import argparse
import hashlib
import json
import os
import random
import sys
from collections import ChainMap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models import save_for_hf
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm
from transformers import AutoTokenizer, BertConfig, BertModel, get_cosine_schedule_with_warmup

import tiny_world
from flamingo_blocks import VisionEncoder, parameter_groups
from flamingo_blocks.blocks import ContrastiveLoss
from flamingo_blocks.data import (
    CorruptSample,
    Document,
    IndexedSource,
    JsonLinesSource,
    Medium,
    PairFolder,
    Source,
    document_from_pair,
)
from flamingo_blocks.data.stream import derive_seed

# ---------------------------------------------------------------- data


def load_data(path: Path | None, held_out: int) -> tuple[Source, Source]:
    """Load pairs, and others that are held out."""
    if path is None:
        splits = tiny_world.load_splits()
        return digits_source(splits["train"]), digits_source(splits["val"], held_out)
    source: Source = PairFolder(path) if path.is_dir() else JsonLinesSource(path, document_from_pair)
    pairs = [sample for shard in range(len(source)) for sample in source.read(shard)]
    if held_out >= len(pairs):
        raise SystemExit(f"--held-out {held_out} leaves nothing to train on of the {len(pairs)} pairs in {path}")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    train, unseen = ([pairs[i] for i in part] for part in (order[held_out:], order[:held_out]))
    return IndexedSource(train), IndexedSource(unseen)


def digits_source(split: tiny_world.Digits, count: int | None = None) -> Source:
    """Show digits in each orientation, with a caption that tells both; all of them, or some."""
    orientations = torch.arange(len(tiny_world.ORIENTATIONS))

    def to_document(item: int) -> Document:
        number, orientation = divmod(item, len(orientations))
        pixels = pil_to_tensor(split.pictures[number])
        picture = to_pil_image(tiny_world.orient(pixels, orientation))
        words = tiny_world.caption(
            split.digits[number : number + 1],
            end=tiny_world.TOKEN["."],
            orientations=orientations[orientation : orientation + 1],
        )
        text = " ".join(tiny_world.VOCABULARY[word] for word in words[0].tolist())
        return Document((Medium.from_pil(picture), text), key=f"digit {number}, {orientation}")

    order = torch.randperm(len(split.pictures) * len(orientations), generator=torch.Generator().manual_seed(0))
    return IndexedSource(order[:count].tolist(), to_document)


class Pairs(Dataset[tuple[Tensor, str, list[CorruptSample]]]):
    """Images and texts, drawn in one order after another, without end. What is drawn is told by seed and number alone.

    Where an image or a text cannot be read, the next pair takes its place.

    Args:
        source: Each shard is a pair.
        transform: Makes a tensor of an image.
        seed: Of orders and augmentation. None: the order of the source.
        max_corrupt: How many pairs may be corrupt.
    """

    def __init__(self, source: Source, transform: Any, *, seed: int | None, max_corrupt: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.max_corrupt = max_corrupt
        self.epoch, self.order = -1, list(range(len(source)))

    def __getitem__(self, number: int) -> tuple[Tensor, str, list[CorruptSample]]:
        epoch, position = divmod(number, len(self.source))
        if self.seed is not None:
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
                self.epoch, self.order = epoch, torch.randperm(len(self.source), generator=generator).tolist()
            # timm's augmentation draws from both.
            random.seed(derive_seed(self.seed, number))
            torch.manual_seed(derive_seed(self.seed, number))
        corrupt: list[CorruptSample] = []
        for i in range(position, position + min(self.max_corrupt + 1, len(self.source))):
            for document in self.source.read(self.order[i % len(self.source)]):
                found = document if isinstance(document, CorruptSample) else self.load(document)
                if not isinstance(found, CorruptSample):
                    return *found, corrupt
                corrupt.append(found)
        names = ", ".join(sample.key for sample in corrupt[:5])
        raise ValueError(f"{len(corrupt)} pairs one after another cannot be read, such as {names}: {corrupt[0].error}")

    def load(self, document: Document) -> tuple[Tensor, str] | CorruptSample:
        """Decode the image."""
        try:
            (medium,), text = document.media, document.text.strip()
            if not text:
                raise ValueError("the text is empty")
            return self.transform(Image.open(medium.open()).convert("RGB")), text
        except Exception as error:  # decoders raise all kinds
            return CorruptSample(document.key, f"{type(error).__name__}: {error}")


class Collate:
    """Put pairs together, with their texts as tokens, and a number for each text that all processes have in common."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def __call__(self, pairs: list[tuple[Tensor, str, list[CorruptSample]]]) -> dict[str, Any]:
        images, texts, corrupt = zip(*pairs, strict=True)
        options = {"padding": True, "truncation": True, "max_length": self.max_tokens, "return_tensors": "pt"}
        tokens = self.tokenizer(list(texts), **options)
        hashes = [hashlib.sha256(text.encode()).digest()[:8] for text in texts]
        return {
            "images": torch.stack(images),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "text_ids": torch.tensor([int.from_bytes(each, signed=True) for each in hashes]),
            "corrupt": [sample for samples in corrupt for sample in samples],
        }


# ---------------------------------------------------------------- model


class DualEncoder(nn.Module):
    """A tower for images and a tower for texts, and the loss over what all processes have embedded."""

    def __init__(self, backbone: Any, bert: BertModel, width: int, label_smoothing: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.bert = bert
        self.image_head = nn.Linear(backbone.head_hidden_size, width, bias=False)
        self.text_head = nn.Linear(bert.config.hidden_size, width, bias=False)
        self.loss = ContrastiveLoss(label_smoothing=label_smoothing, gather=True)

    def embed(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Embed images by the backbone's own pooling, texts by the mean over their tokens."""
        mask = batch["attention_mask"]
        states = self.bert(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        text = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.image_head(self.backbone(batch["images"])), self.text_head(text)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        images, texts = self.embed(batch)
        return self.loss(images, texts, image_ids=batch["text_ids"], text_ids=batch["text_ids"])


def make_backbone(name: str, size: int, *, pretrained: bool) -> tuple[Any, dict[str, Any]]:
    """Make a timm model for images of this size, and tell with which arguments."""
    model_args: dict[str, Any] = {"img_size": size}
    try:
        backbone: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **model_args)
    except TypeError:  # it takes any size
        model_args = {}
        backbone = timm.create_model(name, pretrained=pretrained, num_classes=0)
    VisionEncoder(backbone, image_size=size).unfreeze()  # says which sizes are taken, if this is not
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, "input_size": (3, size, size)}
    return backbone, model_args


def make_text_tower(name: str | None, *, pretrained: bool) -> tuple[BertModel, Any]:
    """Load BERT and its tokenizer; without a name, make a small one for the captions of digits."""
    if name is None:
        config = BertConfig(
            vocab_size=len(tiny_world.VOCABULARY),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return BertModel(config, add_pooling_layer=False), tiny_world.make_tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(name)
    if pretrained:
        return BertModel.from_pretrained(name, add_pooling_layer=False), tokenizer
    return BertModel(BertConfig.from_pretrained(name), add_pooling_layer=False), tokenizer


# ---------------------------------------------------------------- training


def read(
    loader: DataLoader[Any], device: torch.device, corrupt: dict[str, str], most: int
) -> Iterator[dict[str, Tensor]]:
    """Read batches onto a device; report what is corrupt, and stop where it is too much."""
    for batch in loader:
        for sample in batch.pop("corrupt"):
            if sample.key not in corrupt:
                tqdm.write(f"cannot read {sample.key}: {sample.error}", file=sys.stderr)
                corrupt[sample.key] = sample.error
        if len(corrupt) > most:
            raise SystemExit(f"more pairs than --max-corrupt {most} cannot be read; they are named above")
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


@torch.no_grad()
def recall_at_1(model: DualEncoder, batches: Iterable[dict[str, Tensor]]) -> float:
    """Give the share of images to which, of all different texts, their own is the most similar."""
    model.eval()
    rows = [(*model.embed(batch), batch["text_ids"]) for batch in batches]
    model.train()
    images, texts, ids = (torch.cat(column) for column in zip(*rows, strict=True))
    nearest = (images.float() @ F.normalize(texts.float(), dim=-1).T).argmax(1)
    return (ids[nearest] == ids).float().mean().item()


def train(arguments: argparse.Namespace, rank: int, processes: int, device: torch.device) -> None:
    """Train, and write what was found."""
    out: Path = arguments.out
    torch.manual_seed(arguments.seed)
    backbone, model_args = make_backbone(arguments.architecture, arguments.image_size, pretrained=arguments.pretrained)
    bert, tokenizer = make_text_tower(arguments.text_tower, pretrained=arguments.pretrained)
    model = DualEncoder(backbone, bert, arguments.width, arguments.label_smoothing).to(device)
    groups = parameter_groups(model, weight_decay=arguments.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, arguments.warmup, arguments.steps)

    data: Any = resolve_model_data_config(backbone)
    data = {name: data[name] for name in ("input_size", "mean", "std", "interpolation")}
    # Texts tell left from right, and what stands at the border: no mirroring, and crops that keep most of an image.
    augment = create_transform(**data, is_training=True, hflip=0.0, scale=(0.9, 1.0))
    source, held_out = load_data(arguments.data, arguments.held_out)
    pairs = Pairs(source, augment, seed=arguments.seed, max_corrupt=arguments.max_corrupt)
    unseen = Pairs(held_out, create_transform(**data, crop_pct=1.0), seed=None, max_corrupt=arguments.max_corrupt)
    loading: dict[str, Any] = {"collate_fn": Collate(tokenizer, arguments.max_tokens), "num_workers": arguments.workers}
    unseen_loader = DataLoader(unseen, arguments.batch_size, sampler=range(len(held_out)), **loading)

    # What must be the same for a checkpoint to be of the same run.
    run = {name: str(value) for name, value in vars(arguments).items() if name not in ("out", "workers", "device")}
    run |= {"processes": str(processes)}
    start, losses, recalls = 0, list[float](), dict[int, float]()
    checkpoint, unfinished = out / "checkpoint.pt", out / "checkpoint.unfinished"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["run"] != run:
            raise SystemExit(f"{checkpoint} is of a run with other options; give another --out, or remove it")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start, losses, recalls = len(state["losses"]), state["losses"], state["recalls"]

    size = arguments.batch_size * processes
    numbers = [list(range(i * size + rank, (i + 1) * size, processes)) for i in range(start, arguments.steps)]
    corrupt: dict[str, str] = {}
    batches = read(DataLoader(pairs, batch_sampler=numbers, **loading), device, corrupt, arguments.max_corrupt)
    trained = DistributedDataParallel(model) if processes > 1 else model
    mixed_precision = torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16")
    progress = tqdm(batches, "vision encoder", initial=start, total=arguments.steps, disable=rank > 0)
    for step, batch in enumerate(progress, start + 1):
        torch.manual_seed(derive_seed(arguments.seed, step, rank))  # of dropout
        with mixed_precision:
            loss = trained(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        is_last = step == arguments.steps
        if rank == 0 and (is_last or step % arguments.evaluate_every == 0):
            with mixed_precision:
                recalls[step] = recall_at_1(model, read(unseen_loader, device, corrupt, arguments.max_corrupt))
        progress.set_postfix(loss=f"{losses[-1]:.3f}", recall=f"{list(recalls.values())[-1]:.3f}" if recalls else "")
        if rank == 0 and (is_last or step % arguments.save_every == 0):
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**state, "losses": losses, "recalls": recalls, "run": run}, unfinished)
            unfinished.replace(checkpoint)  # so that it is whole, whenever the program is stopped

    found = [corrupt] * processes
    if processes > 1:
        distributed.all_gather_object(found, corrupt)
    if rank == 0:
        save_for_hf(backbone, str(out / "vision_encoder"), model_args=model_args, safe_serialization=True)
        metrics = {"losses": losses, "recall_at_1": recalls, "corrupt": dict(ChainMap(*found))}
        (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(f"Recall at 1 of {len(held_out)} pairs: {recalls[arguments.steps]:.3f}")
        print(f"Pairs that could not be read: {len(dict(ChainMap(*found)))}")
        print(f"Written to {out}: vision_encoder/, metrics.json, checkpoint.pt")


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Pre-train a vision encoder on images and texts by contrast.")
    parser.add_argument("--data", type=Path, help="a file of JSON lines, or a folder; by default handwritten digits")
    parser.add_argument("--held-out", type=int, default=500, metavar="N", help="pairs to measure recall on")
    parser.add_argument("--architecture", help="of timm; by default nfnet_f0, and a tiny one for digits")
    parser.add_argument("--image-size", type=int, help="288 by default, 32 for digits")
    parser.add_argument(
        "--text-tower",
        help="BERT: an id or a path; by default google-bert/bert-base-uncased, and a tiny one for digits",
    )
    parser.add_argument("--pretrained", action="store_true", help="start from pretrained weights of both towers")
    parser.add_argument("--width", type=int, default=256, help="of the embeddings")
    parser.add_argument("--max-tokens", type=int, default=64, help="of a text")
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=128, help="of each process")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=60, metavar="STEPS")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of activations")
    parser.add_argument("--evaluate-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS")
    parser.add_argument(
        "--max-corrupt", type=int, default=100, metavar="N", help="stop if a process cannot read more pairs"
    )
    parser.add_argument("--workers", type=int, default=2, help="that load images, of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/vision_encoder"), help="where everything is written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(words)
    for name in ("held_out", "steps", "batch_size", "evaluate_every", "save_every", "width", "max_tokens"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: give at least 1")
    if arguments.data is not None and not arguments.data.exists():
        parser.error(f"--data: there is no {arguments.data}")
    if arguments.data is None and arguments.text_tower is not None:
        parser.error("--text-tower: give --data, too; the captions of digits have a tower of their own")
    defaults: dict[str, Any] = {"architecture": "test_nfnet", "image_size": 32}
    if arguments.data is not None:
        defaults = {"architecture": "nfnet_f0", "image_size": 288, "text_tower": "google-bert/bert-base-uncased"}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main() -> None:
    """Train in one process, or in one of those that torchrun starts."""
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    device = torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if processes > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(arguments, rank, processes, device)
    if processes > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
