"""Convert a released checkpoint: `python -m flamingo_blocks.convert open_flamingo checkpoint.pt --out DIRECTORY`."""

import argparse
import importlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flamingo_blocks.convert.checkpoint import read_tensors
from flamingo_blocks.convert.renaming import listed
from flamingo_blocks.language import ordinary_token
from flamingo_blocks.modeling_flamingo import FlamingoForConditionalGeneration

FAMILIES = ("open_flamingo", "idefics", "mllama", "flamingo_mini")


def main(arguments: Sequence[str] | None = None) -> None:
    """Load a checkpoint, save the model and its processor, and check what was saved.

    Args:
        arguments: Of the command line. None: those of this process.

    Raises:
        SystemExit: With what was wrong, if it could not be converted.
    """
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    family, checkpoint, out = options.pop("family"), options.pop("checkpoint"), Path(options.pop("out"))
    module = importlib.import_module(f"flamingo_blocks.convert.{family}")
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := [name for name in given if name not in inspect.signature(module.load_flamingo).parameters]:
        parser.error(f"{family} takes no --{', no --'.join(name.replace('_', '-') for name in unknown)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"--out must be a new or empty directory, got {str(out)!r}")
    try:
        convert(family, checkpoint, out, **given)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def convert(family: str, checkpoint: str, out: Path, **options: Any) -> None:
    """Load a checkpoint, save the model and its processor, and check what was saved.

    Args:
        family: Name of the module.
        checkpoint: See `flamingo_blocks.convert.checkpoint.read_tensors`.
        out: Directory to write to.
        **options: As the family's `load_flamingo` takes them.

    Raises:
        ValueError: If the checkpoint cannot be converted, or what was saved is not what was read.
        OSError: If something cannot be read or written.
    """
    module = importlib.import_module(f"flamingo_blocks.convert.{family}")
    _say(f"reading {checkpoint}")
    model, processor = module.load_flamingo(checkpoint, progress=True, **options)
    if options.get("dtype") is None:
        written, read = getattr(module, f"to_{family}")(model), read_tensors(checkpoint)
        _say(f"{check_tensors(written, read)} of {len(read)} tensors are written back bit for bit")
        del written, read
    _say(f"writing {out}")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    expected = _logits(model)
    # A vision encoder that timm cannot make by name is passed.
    is_passed, summary = model.config.vision_config.architecture is None, model.summary()
    del model  # two may not fit into memory
    _say("reading it again, and comparing logits")
    others = {"vision_encoder": module.make_vision_encoder(out)} if is_passed else {}
    again = FlamingoForConditionalGeneration.from_pretrained(out, dtype="auto", **others)
    if not torch.equal(_logits(again), expected):
        raise ValueError(f"the model in {str(out)!r} does not give the logits of the one that was converted")
    _say(summary)
    encoder = f", vision_encoder={family}.make_vision_encoder({str(out)!r})" if is_passed else ""
    _say(f"\nload it with FlamingoForConditionalGeneration.from_pretrained({str(out)!r}{encoder})")


def check_tensors(written: dict[str, Tensor], read: dict[str, Tensor]) -> int:
    """See that the tensors of a model, by the family's names, are those of its checkpoint, bit for bit.

    Args:
        written: What the model gives back.
        read: What was in the checkpoint.

    Returns:
        How many were compared. Others have the names of another version of the family, or are no weights.

    Raises:
        ValueError: If one differs. It lists them.
    """
    both = written.keys() & read.keys()
    if wrong := [name for name in both if not torch.equal(written[name], read[name])]:
        raise ValueError(f"these tensors are not those of the checkpoint: {listed(wrong)}")
    return len(both)


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Logits of a few tokens with an image between them."""
    word = ordinary_token(model.language_model, besides=(model.config.image_token_id,))
    input_ids = torch.tensor([[word, model.config.image_token_id, word, word]])
    generator = torch.Generator().manual_seed(0)
    encoder = model.vision_encoder
    pixel_values = torch.randn(1, 1, 1, encoder.channels, *encoder.image_size, generator=generator)
    logits: Tensor = model(input_ids, pixel_values=pixel_values).logits
    return logits


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flamingo_blocks.convert", description=__doc__)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("checkpoint", help="file, index of files, or directory")
    parser.add_argument("--out", required=True, help="new directory for the model and its processor")
    parser.add_argument("--config", help="the family's own configuration, a JSON file; usually found by itself")
    parser.add_argument("--tokenizer", help="its id or path, where the checkpoint has none")
    parser.add_argument("--language-model", help="its id or path, where the checkpoint does not hold it")
    parser.add_argument("--vision-encoder", help="name of timm or path, where the checkpoint does not hold it")
    parser.add_argument("--vision-config", help="CLIP's configuration, a JSON file, where it is not on record")
    parser.add_argument("--attend", choices=("last", "all_previous", "next"), help="which media a token sees")
    parser.add_argument("--dtype", type=_dtype, help="of the result, e.g. bfloat16; by default the checkpoint's")
    return parser


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise argparse.ArgumentTypeError(f"must be a floating-point dtype of torch, e.g. bfloat16, got {name!r}")
    return dtype


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
