"""Put a converted model together, and take it apart again, tensor by tensor.

A model is made without initial values, and every tensor is in the checkpoint, or given with a backbone, or told by its
name here: one that the family does not have, or a part of a larger one there.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from flamingo_blocks.backbones import ensure_padding, load_tokenizer
from flamingo_blocks.builder import as_dtype, check_injection, choose_decoding
from flamingo_blocks.configuration_flamingo import FlamingoConfig
from flamingo_blocks.convert.renaming import Rename, to_ours, to_theirs
from flamingo_blocks.modeling_flamingo import FlamingoForConditionalGeneration
from flamingo_blocks.processing_flamingo import FlamingoImageProcessor, FlamingoProcessor
from flamingo_blocks.vision import VisionEncoder

# Of CLIP's images, and so of all models of the family.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def assemble(
    config: FlamingoConfig,
    renames: Iterable[Rename],
    tensors: Mapping[str, Tensor],
    *,
    fixed: Mapping[str, Tensor],
    language_model: Any = None,
    vision_encoder: VisionEncoder | None = None,
    dtype: torch.dtype | str | None = None,
) -> FlamingoForConditionalGeneration:
    """Make a model and load a checkpoint into it.

    Args:
        config: What to make.
        renames: Table of the family's names and ours.
        tensors: The checkpoint's tensors, by the family's names.
        fixed: Further tensors by our names: what the family does not have, or has as a part of something else.
        language_model: One that has its weights. None: it is made from the configuration, with the checkpoint's.
        vision_encoder: The same for the vision encoder.
        dtype: Of everything that is loaded here. None: as in the checkpoint.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: If a tensor is left over, is missing or has the wrong shape, or the parts cannot be joined.
    """
    dtype = as_dtype("dtype", dtype)
    with no_init_weights():
        model: Any = FlamingoForConditionalGeneration(
            config, language_model=language_model, vision_encoder=vision_encoder
        )
    if language_model is None:
        model.language_model.tie_weights()  # which goes with the initial values
    given = [
        *(["language_model."] if language_model is not None else []),
        *(["vision_encoder."] if vision_encoder is not None else []),
    ]
    ours = _distinct_tensors(model)
    expected = {
        name: tensor.shape for name, tensor in ours.items() if not name.startswith(tuple(given)) and name not in fixed
    }
    try:
        loaded = {
            # Beside a given language model, which may be elsewhere.
            name: tensor.to(ours[name].device, dtype if tensor.is_floating_point() else None)
            for name, tensor in (to_ours(renames, tensors, expected) | dict(fixed)).items()
        }
        model.load_state_dict(loaded, strict=False, assign=True)
        if language_model is None:
            model.language_model.tie_weights()
        model.freeze()
        model._remember_backbones()
        model.eval()
        check_injection(model)
    except ValueError:
        model.eject()
        raise
    choose_decoding(model)
    return model


def disassemble(
    model: FlamingoForConditionalGeneration,
    renames: Iterable[Rename],
    *,
    fixed: Mapping[str, Tensor],
    without: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Give a model's tensors by the names of a family: the reverse of `assemble`.

    Args:
        model: The model.
        renames: As for `assemble`.
        fixed: Tensors by our names that the family does not have. It cannot hold other values than these.
        without: Prefixes of our names that are left out, such as backbones that checkpoints of the family do not hold.

    Raises:
        ValueError: If a tensor has no place in the family, or a fixed one was trained.
    """
    ours = {name: tensor for name, tensor in _distinct_tensors(model).items() if not name.startswith(without)}
    for name, value in fixed.items():
        found = ours.pop(name, value)
        if not torch.equal(found.to(value), value):
            raise ValueError(f"{name} was trained, but models of this family have no such weights; set it back first")
    return to_theirs(renames, {name: tensor.detach() for name, tensor in ours.items()})


def _distinct_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as in the state_dict, tied ones once."""
    once = dict(model.named_parameters())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: t for name, t in model.state_dict().items() if name in once or name not in parameters}


def make_processor(
    model: FlamingoForConditionalGeneration,
    tokenizer: str | Path | PreTrainedTokenizerBase,
    *,
    image_token: str,
    end_of_chunk_token: str,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
) -> FlamingoProcessor:
    """Make the processor of a converted model, whose images are prepared as CLIP's.

    Args:
        model: The model.
        tokenizer: Its id or path, or the tokenizer, which is copied.
        image_token: Stands for a medium.
        end_of_chunk_token: Ends what belongs to a medium.
        crop_mode: `"center"`: the shorter side is fitted and the longer one cropped; `"squash"`: both are fitted.
        interpolation: `"bicubic"`, as of CLIP's images, or `"bilinear"`.
    """
    tokenizer = load_tokenizer(tokenizer)
    ensure_padding(tokenizer)
    height, width = model.vision_encoder.image_size
    image_processor = FlamingoImageProcessor(
        size={"height": height, "width": width},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        interpolation=interpolation,
        crop_mode=crop_mode,
    )
    generation_config: Any = model.generation_config
    generation_config.pad_token_id = tokenizer.pad_token_id
    return FlamingoProcessor(image_processor, tokenizer, image_token=image_token, end_of_chunk_token=end_of_chunk_token)
