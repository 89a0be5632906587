"""Load backbones: a causal language model of transformers, its tokenizer, and a vision encoder of timm.

Either is given as an id, a local path, a configuration or a model. What is loaded knows where it came from.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig
from flamingo_blocks.vision import VisionEncoder


def load_language_model(
    language_model: str | Path | PreTrainedConfig | PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[Any, str | None]:
    """Load a causal language model, or check the given one.

    Args:
        language_model: Its id on the hub, the path of a local copy, a configuration, for random weights, or a model,
            which is not copied.
        dtype: None: as it is.
        revision: Of the id: a commit, tag or branch. None: the newest.

    Returns:
        The language model, in eval mode, whose `config.name_or_path` tells where it came from; and its commit, if it
        came from the hub.

    Raises:
        ValueError: If it is no causal language model of transformers.
        OSError: If the id or path cannot be loaded.
    """
    auto_model: Any = AutoModelForCausalLM
    commit = None
    if isinstance(language_model, PreTrainedConfig):
        lm = make_language_model(language_model, dtype=dtype or language_model.dtype or torch.float32)
    elif isinstance(language_model, str | Path):
        with loading("language_model", language_model):
            lm = auto_model.from_pretrained(language_model, dtype=dtype or "auto", revision=revision or "main")
        commit = _commit(str(language_model), ["config.json"], revision)
    elif isinstance(language_model, nn.Module):
        if dtype is not None and is_quantized(language_model):
            raise ValueError(
                f"language_model is quantised and cannot be brought to {dtype}; leave dtype out, and load it with the "
                "dtype that it should compute in"
            )
        lm = language_model if dtype is None else nn.Module.to(language_model, dtype)
    else:
        raise ValueError(
            "language_model must be an id, a path, a configuration or a causal language model of transformers, got "
            f"{type(language_model).__name__}"
        )
    check_is_causal_lm(lm)
    return lm.eval(), commit


def make_language_model(config: Any, **options: Any) -> Any:
    """Make a language model from its configuration, with random weights.

    Args:
        config: Where `AutoModelForCausalLM` knows no class for it, as for the language models inside of others, its
            `architectures` name one.
        **options: As `AutoModelForCausalLM.from_config` takes them.

    Raises:
        ValueError: If there is no such class.
    """
    auto_model: Any = AutoModelForCausalLM
    try:
        return auto_model.from_config(config, **options)
    except ValueError:
        named: Any = getattr(transformers, (config.architectures or [""])[0], None)
        if getattr(named, "config_class", None) is not type(config):
            raise
        return named._from_config(config, **options)


def check_is_causal_lm(lm: Any) -> None:
    """Check that a language model is one that blocks can be put into.

    Raises:
        ValueError: If it is not a causal language model of transformers, or PEFT has changed it.
    """
    if isinstance(lm, nn.Module) and has_peft(lm):
        raise ValueError(
            "language_model has adapters of PEFT in it, which would be frozen, and saved under names that cannot "
            "be loaded; merge them with merge_and_unload() first, or add LoRA to the Flamingo that is built"
        )
    if not isinstance(lm, PreTrainedModel) or not lm.can_generate() or lm.get_output_embeddings() is None:
        raise ValueError(
            f"language_model must be a causal language model of transformers, with a head, got {type(lm).__name__}; "
            "load it with AutoModelForCausalLM. Into any other module, LMLayerInjector puts blocks"
        )


def has_peft(module: nn.Module) -> bool:
    """Whether PEFT has put modules of its own into a module."""
    return any(type(inner).__module__.startswith("peft.") for inner in module.modules())


def is_quantized(lm: nn.Module) -> bool:
    """Whether a language model was quantised, by transformers or by torchao's `quantize_`."""
    if getattr(lm, "hf_quantizer", None) is not None:
        return True
    return any(type(parameter).__module__.startswith("torchao.") for parameter in lm.parameters())


def load_tokenizer(tokenizer: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Load a tokenizer, or copy the given one.

    Args:
        tokenizer: Its id on the hub, the path of a local copy, or the tokenizer.

    Raises:
        ValueError: If it is none of these.
        OSError: If the id or path cannot be loaded.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return copy.deepcopy(tokenizer)
    if not isinstance(tokenizer, str | Path):
        raise ValueError(f"tokenizer must be an id, a path or a tokenizer, got {type(tokenizer).__name__}")
    with loading("tokenizer", tokenizer):
        return AutoTokenizer.from_pretrained(tokenizer)


def ensure_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer pad with its end of text, if it has no token for padding.

    Args:
        tokenizer: It is changed.

    Raises:
        ValueError: If it has neither.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a padding nor an end-of-text token; set tokenizer.pad_token")
        tokenizer.pad_token = tokenizer.eos_token


def load_vision_encoder(
    vision_encoder: str | Path | FlamingoVisionConfig | nn.Module,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    keep_prefix_tokens: bool = False,
    final_norm: bool = True,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[VisionEncoder, FlamingoVisionConfig]:
    """Load a vision encoder, or make one of the given model.

    Args:
        vision_encoder: A timm model: its name, with pretrained weights; the path of a local copy (`config.json` and
            weights, as timm saves for the hub); a model, which is not copied; or a configuration, for random weights.
        image_size: Height and width of the images. None: what the backbone was made for.
        channels: Of the images. None: 3, or those of the given encoder or configuration.
        keep_prefix_tokens: As for `VisionEncoder`; a given encoder or configuration says so itself.
        final_norm: As for `VisionEncoder`; a given encoder or configuration says so itself.
        dtype: None: as it is.
        revision: Of weights on the hub: a commit, tag or branch. None: the newest.

    Returns:
        The vision encoder, and a configuration that tells where it came from and how timm makes it again.

    Raises:
        ValueError: If it is no backbone, or is not for such images.
        OSError: If the name or path cannot be loaded.
    """
    model_args: dict[str, Any] | None = None
    name = ""
    encoder: VisionEncoder
    if isinstance(vision_encoder, VisionEncoder | FlamingoVisionConfig):
        _check_agreement("channels", channels, vision_encoder.channels)
        _check_agreement("image_size", image_size, vision_encoder.image_size)
    channels = 3 if channels is None else channels
    options: dict[str, Any] = {"channels": channels, "keep_prefix_tokens": keep_prefix_tokens, "final_norm": final_norm}
    if isinstance(vision_encoder, VisionEncoder):
        encoder = vision_encoder
    elif isinstance(vision_encoder, FlamingoVisionConfig):
        model_args = vision_encoder.model_args
        asked = copy.deepcopy(vision_encoder)
        if image_size is not None:
            asked.image_size = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
        encoder = make_vision_encoder(asked)
    elif isinstance(vision_encoder, str | Path):
        architecture, weights = name, _ = str(vision_encoder), dict[str, Any]()
        if Path(name).is_dir():
            architecture, model_args, weights = _read_backbone(Path(name))
            made_for = model_args.pop("img_size", None)
            image_size = image_size or ((made_for[0], made_for[1]) if isinstance(made_for, list) else made_for)
        elif revision is not None:
            architecture, weights = _at_revision(name, revision)
        with loading("vision_encoder", vision_encoder):
            if not Path(name).is_dir() and (isinstance(vision_encoder, Path) or name.startswith(("/", ".", "~"))):
                raise FileNotFoundError("no such directory")
            encoder = VisionEncoder.from_timm(
                architecture,
                pretrained=True,
                image_size=image_size,
                model_args={**(model_args or {}), **weights},
                **options,
            )
    elif isinstance(vision_encoder, nn.Module):
        encoder = VisionEncoder(vision_encoder, image_size=image_size, **options)
    else:
        raise ValueError(
            "vision_encoder must be a name of timm, a path, a FlamingoVisionConfig or a timm model, got "
            f"{type(vision_encoder).__name__}"
        )
    config = _describe(encoder, model_args)
    config.name_or_path = name
    config.revision = _commit_of_backbone(encoder.backbone) if name and not Path(name).is_dir() else None
    return encoder.to(dtype=dtype), config


def _check_agreement(name: str, asked: Any, found: Any) -> None:
    if asked is None or found is None:
        return
    if name == "image_size":
        asked = [asked, asked] if isinstance(asked, int) else list(asked)
        found = list(found)
    if asked != found:
        raise ValueError(f"{name}={asked} was asked for, but the given vision_encoder has {found}; give it only once")


def _read_backbone(path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Read what timm wrote for the hub: name, arguments, and how to load the weights."""
    weights, config = path / "model.safetensors", path / "config.json"
    missing = [file.name for file in (weights, config) if not file.exists()]
    if missing:
        raise OSError(
            f"vision_encoder={str(path)!r} has no {' and no '.join(missing)}; a local copy of a backbone is written by "
            "timm.models.save_for_hf(model, path, safe_serialization=True)"
        )
    content = json.loads(config.read_text())
    overlay = content.get("pretrained_cfg", {}) | {"file": str(weights)}
    model_args = {k: v for k, v in content.get("model_args", {}).items() if k not in ("num_classes", "in_chans")}
    return content["architecture"], model_args, {"pretrained_cfg_overlay": overlay}


def _at_revision(name: str, revision: str) -> tuple[str, dict[str, Any]]:
    """Tell timm which revision of its weights to load: the name, and arguments for it."""
    import timm

    if name.startswith(("hf-hub:", "hf_hub:")):
        return f"{name.partition('@')[0]}@{revision}", {}
    found = timm.get_pretrained_cfg(name)
    if found is None or not found.hf_hub_id:
        return name, {}  # its weights are on no hub that knows revisions
    overlay = {"hf_hub_id": f"{found.hf_hub_id}@{revision}", "custom_load": found.custom_load}
    return name, {"pretrained_cfg_overlay": overlay}


def _commit(repo: str, files: Sequence[str], revision: str | None) -> str | None:
    """Find out which commit of a repository on the hub was loaded: one of these files is in the cache."""
    for file in files if not Path(repo).is_dir() else ():
        path = try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(path, str):  # .../snapshots/<commit>/config.json
            return Path(path).parents[file.count("/")].name
    return None


def _commit_of_backbone(backbone: Any) -> str | None:
    """The same for what timm has loaded."""
    found = getattr(backbone, "pretrained_cfg", None) or {}
    repo, _, revision = (found.get("hf_hub_id") or "").partition("@")
    files = [found.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors"]
    return _commit(repo, [file for file in files if file], revision or None) if repo else None


def _describe(encoder: VisionEncoder, model_args: dict[str, Any] | None) -> FlamingoVisionConfig:
    """Write down how timm makes this backbone again; nothing, if it would make another one."""
    architecture = (getattr(encoder.backbone, "pretrained_cfg", None) or {}).get("architecture")
    config = FlamingoVisionConfig(
        architecture=architecture,
        model_args=model_args,
        image_size=list(encoder.image_size),
        channels=encoder.channels,
        keep_prefix_tokens=encoder.keep_prefix_tokens,
        final_norm=encoder.final_norm,
        output_dtype=None if encoder.output_dtype is None else dtype_name(encoder.output_dtype),
    )
    if architecture is not None:
        if classes := getattr(encoder.backbone, "num_classes", 0):  # it has kept its classifier
            config.model_args = {**(model_args or {}), "num_classes": classes}
        try:
            with torch.device("meta"):
                again = make_vision_encoder(config)
        except Exception:  # whatever timm says: it cannot make this one by name
            again = None
        if again is None or _shapes(again.backbone) != _shapes(encoder.backbone):
            config.architecture = None
    return config


def _shapes(module: nn.Module) -> tuple[str, dict[str, torch.Size]]:
    """Parameters tell widths and depths; the printed tree tells strides and activations."""
    return repr(module), {name: tensor.shape for name, tensor in module.state_dict().items()}


def make_vision_encoder(vision: Any) -> VisionEncoder:
    """Make the vision encoder that a `FlamingoVisionConfig` describes, with random weights.

    Raises:
        ValueError: If it names no architecture.
    """
    if vision.architecture is None:
        raise ValueError(
            "this Flamingo was built around a vision encoder that timm cannot make by name; make one yourself and pass "
            "it as vision_encoder=VisionEncoder(backbone, image_size=...), also to from_pretrained"
        )
    return VisionEncoder.from_timm(
        vision.architecture,
        image_size=None if vision.image_size is None else (vision.image_size[0], vision.image_size[1]),
        channels=vision.channels,
        keep_prefix_tokens=vision.keep_prefix_tokens,
        final_norm=vision.final_norm,
        output_dtype=None if vision.output_dtype is None else getattr(torch, vision.output_dtype),
        model_args=vision.model_args,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as a configuration does, e.g. `bfloat16`."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def loading(argument: str, name: str | Path) -> Iterator[None]:
    """Say what to do where something cannot be loaded.

    Args:
        argument: What it is for.
        name: The id or path.

    Raises:
        OSError: In place of whatever is raised inside, unless that tells by itself.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError | TypeError) and not isinstance(error, OSError):
            raise
        raise OSError(
            f"{argument}={str(name)!r} could not be loaded. There is no directory of that name here, and the hub "
            "has no such model or cannot be reached. Without network, give the path of a local copy (a directory "
            "written by save_pretrained, or for a backbone by timm's save_for_hf), or the model itself. "
            f"The reason was: {type(error).__name__}: {error}"
        ) from error
