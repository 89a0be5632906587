"""Adapters: what a Flamingo has learnt, without the frozen backbones that it was trained beside.

An adapter is a directory with `config.json`, `generation_config.json`, the trained tensors and a record of the
backbones: where they came from, and a few numbers of each of their tensors, by which they are known again.
"""

import json
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from flamingo_blocks.backbones import dtype_name, load_language_model, load_vision_encoder
from flamingo_blocks.configuration_flamingo import FlamingoConfig, FlamingoVisionConfig
from flamingo_blocks.vision import VisionEncoder

WEIGHTS = "flamingo_adapter.safetensors"
RECORD = "flamingo_adapter.json"
FORMAT = 1
BACKBONES = ("language_model", "vision_encoder")
SAMPLES = 4
SHOWN = 3
_HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")
# What may differ in the configuration of the same language model, also those inside it, which may not be its own.
_NO_MATTER = (
    *("_config", "architectures", "attn", "cache", "drop", "dtype"),
    *("init", "output_", "quant", "return_", "token_id", "version"),
)


@dataclass(frozen=True)
class BackboneRecord:
    """What is known of a backbone that an adapter was trained beside.

    Attributes:
        module: Name of its class.
        name_or_path: Where it came from; empty if it does not tell.
        revision: Its commit on the hub, if it was loaded from there by its id.
        dtype: Of its first parameter.
        layout: How a vision encoder lays out its tokens, and in which dtype; empty for a language model.
        tensors: For each frozen parameter or buffer, its dtype, shape and a few of its numbers, see `fingerprint`.
    """

    module: str
    name_or_path: str
    revision: str | None
    dtype: str
    layout: str
    tensors: dict[str, str]


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read, whole and undamaged.

    Attributes:
        config: Of the Flamingo.
        generation_config: Of the Flamingo.
        tensors: What was trained, by its name in the Flamingo.
        backbones: Records of `"language_model"` and `"vision_encoder"`.
    """

    config: FlamingoConfig
    generation_config: GenerationConfig
    tensors: dict[str, Tensor]
    backbones: dict[str, BackboneRecord]


def trained_tensors(model: Any) -> dict[str, Tensor]:
    """Collect what an adapter holds: all of the parts that are trained, and what else is trained or not frozen.

    Args:
        model: A Flamingo.

    Returns:
        Parameters and persistent buffers by name; tied ones once.
    """
    frozen = tuple(f"{part}." for part in BACKBONES if part in (model.config.freeze or ()))
    return {
        name: tensor for name, tensor in _tensors(model).items() if not name.startswith(frozen) or tensor.requires_grad
    }


def write_adapter(model: Any, directory: str | Path, *, before: Mapping[str, Mapping[str, str]]) -> None:
    """Write an adapter.

    Args:
        model: A Flamingo.
        directory: Made if it is not there. An earlier adapter in it is replaced.
        before: The backbones' fingerprints when the model was made.

    Raises:
        ValueError: If a backbone has changed that is frozen: what it has learnt would get lost.
    """
    directory = Path(directory)
    tensors = trained_tensors(model)
    sources = {
        "language_model": (model.config.text_config.name_or_path, model.config.text_revision),
        "vision_encoder": (model.config.vision_config.name_or_path, model.config.vision_config.revision),
    }
    record: dict[str, Any] = {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("torch", "transformers", "timm")}
        | {"flamingo-blocks": sys.modules["flamingo_blocks"].__version__},  # it may not be installed
    }
    for part, (name_or_path, revision) in sources.items():
        backbone = getattr(model, part)
        described = fingerprint(part, backbone, without=tensors)
        unchanged = {name: before[part][name] for name in described if name in before[part]}
        if part in (model.config.freeze or ()) and (changed := list(_differences(described, unchanged, {}))):
            raise ValueError(
                f"{part} has changed since the model was made, though it is frozen now: {_first(changed)}. An adapter "
                "does not hold what is frozen: let what was trained require gradients, or save everything with "
                "save_pretrained"
            )
        record[part] = {
            "module": type(getattr(backbone, "backbone", backbone)).__name__,
            "name_or_path": name_or_path or "",
            "revision": revision,
            "dtype": dtype_name(next((p.dtype for p in backbone.parameters()), model.dtype)),
            "layout": _layout(backbone),
            "tensors": described,
        }
    directory.mkdir(parents=True, exist_ok=True)
    # An earlier adapter is replaced only when all of the new one is there.
    with tempfile.TemporaryDirectory(dir=directory) as unfinished:
        model.config.save_pretrained(unfinished)
        model.generation_config.save_pretrained(unfinished)
        contents = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contents, Path(unfinished) / WEIGHTS, {"format": "pt"})
        (Path(unfinished) / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        for file in Path(unfinished).iterdir():
            file.replace(directory / file.name)


def read_adapter(name_or_path: str | Path, **hub: Any) -> Adapter:
    """Read an adapter.

    Args:
        name_or_path: A directory, or an id on the hub.
        **hub: As transformers takes them: `revision`, `token`, `cache_dir`, ...

    Raises:
        OSError: If there is no adapter.
        TypeError: If an option is unknown.
        ValueError: If a file is damaged.
    """
    for option in hub:
        if option not in _HUB_OPTIONS:
            nearest = get_close_matches(option, [*BACKBONES, "dtype", *_HUB_OPTIONS], n=1, cutoff=0)[0]
            raise TypeError(f"from_adapter has no option {option!r}; did you mean {nearest!r}?")
    try:
        files = {name: cached_file(str(name_or_path), name, **hub) for name in (RECORD, WEIGHTS, CONFIG_NAME)}
    except Exception as error:
        raise OSError(
            f"{str(name_or_path)!r} holds no adapter: it is no directory that save_adapter wrote, and the hub has no "
            f"such repository or cannot be reached. The reason was: {error}"
        ) from error
    record, weights = str(files[RECORD]), str(files[WEIGHTS])
    if files[CONFIG_NAME] is None:  # the one file that transformers does not ask for by itself
        raise OSError(f"{str(name_or_path)!r} has no {CONFIG_NAME}; copy the adapter again")
    try:
        content = json.loads(Path(record).read_text())
        found = int(content["format"])
        backbones = {part: _read_record(content[part]) for part in BACKBONES} if found == FORMAT else {}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{record} is damaged: {error!r}; copy the adapter again") from error
    if found != FORMAT:
        raise ValueError(f"{record} is of format {found}, this version reads {FORMAT}; install a newer flamingo-blocks")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{weights} is damaged: {error}; copy the adapter again") from error
    return Adapter(
        config=FlamingoConfig.from_pretrained(name_or_path, **hub),
        generation_config=GenerationConfig.from_pretrained(name_or_path, **hub),
        tensors=tensors,
        backbones=backbones,
    )


def _read_record(content: Any) -> BackboneRecord:
    record = BackboneRecord(**content)
    if not isinstance(getattr(torch, record.dtype, None), torch.dtype):
        raise ValueError(f"there is no dtype {record.dtype!r}")
    for text in record.tensors.values() if isinstance(record.tensors, dict) else [None]:
        if not isinstance(text, str) or (text and not _numbers(text)):
            raise TypeError("tensors must be texts by name, with dtype, shape and numbers")
    return record


@contextmanager
def unchanged_if_it_fails(*backbones: Any) -> Iterator[None]:
    """Leave given backbones as they were if what is done inside fails: their modes, and what of them is trained.

    Args:
        *backbones: Models; what is none, such as a path, is of no account.
    """
    given: list[Any] = [backbone for backbone in backbones if isinstance(backbone, nn.Module)]
    modes = [(module, module.training) for backbone in given for module in backbone.modules()]
    trained = [(parameter, parameter.requires_grad) for backbone in given for parameter in backbone.parameters()]
    encoders = [(backbone, backbone.is_frozen) for backbone in given if isinstance(backbone, VisionEncoder)]
    configs = [
        (backbone.config, backbone.config.architectures) for backbone in given if isinstance(backbone, PreTrainedModel)
    ]
    try:
        yield
    except BaseException:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for encoder, is_frozen in encoders:
            encoder.is_frozen = is_frozen
        for config, architectures in configs:
            config.architectures = architectures
        raise


def load_language_model_of(
    adapter: Adapter, given: str | Path | PreTrainedModel | None, dtype: torch.dtype | None
) -> Any:
    """Load the language model that an adapter was trained beside, or see that the given one is that.

    Args:
        adapter: The adapter.
        given: An id, a path or a language model. None: what the adapter names; one that was trained is made anew, for
            its weights are in the adapter.
        dtype: Of one that is loaded here. None: as when the adapter was saved.

    Raises:
        ValueError: If it is another one, or the adapter names none.
        OSError: If it cannot be loaded.
    """
    part = "language_model"
    source, dtype, revision = _source(adapter, part, given, dtype, adapter.config.text_config)
    lm, commit = load_language_model(source, dtype=dtype, revision=revision)
    if given is not None:
        adapter.config.text_revision = commit
    _check_backbone(adapter, part, lm)
    return lm


def load_vision_encoder_of(
    adapter: Adapter, given: str | Path | nn.Module | None, dtype: torch.dtype | None
) -> VisionEncoder:
    """Load the vision encoder that an adapter was trained beside, or see that the given one is that.

    Args:
        adapter: The adapter.
        given: A name, a path, or a model; otherwise as for `load_language_model_of`.
        dtype: As for `load_language_model_of`.

    Raises:
        ValueError: If it is another one, or the adapter names none.
        OSError: If it cannot be loaded.
    """
    part, config = "vision_encoder", cast(FlamingoVisionConfig, adapter.config.vision_config)
    size = cast("list[int] | None", config.image_size)
    source, dtype, revision = _source(adapter, part, given, dtype, config)
    encoder, found = load_vision_encoder(
        source,
        image_size=None if size is None else (size[0], size[1]),
        channels=config.channels,
        keep_prefix_tokens=config.keep_prefix_tokens,
        final_norm=config.final_norm,
        dtype=dtype,
        revision=revision,
    )
    if not isinstance(given, VisionEncoder) and config.output_dtype is not None:
        encoder.output_dtype = getattr(torch, config.output_dtype)
    if given is not None:
        config.name_or_path, config.revision = found.name_or_path, found.revision
    _check_backbone(adapter, part, encoder)
    return encoder


def _source(
    adapter: Adapter, part: str, given: Any, dtype: torch.dtype | None, config: Any
) -> tuple[Any, torch.dtype | None, str | None]:
    """Tell what a backbone is loaded from, in which dtype, and at which revision."""
    record = adapter.backbones[part]
    if isinstance(given, nn.Module):
        return given, None, None
    dtype = dtype or getattr(torch, record.dtype)
    if given is not None:
        return given, dtype, None
    if part not in (adapter.config.freeze or ()):
        return config, dtype, None  # its weights are in the adapter
    if not record.name_or_path:
        raise ValueError(
            f"this adapter does not say where its {part} is, a {record.module} that was given as a model; pass "
            f"{part}=, an id, a path or the model"
        )
    return record.name_or_path, dtype, record.revision


def _check_backbone(adapter: Adapter, part: str, backbone: nn.Module) -> None:
    """Check that a backbone is the adapter's. Its dtype may be another one, and parts of it may be quantised."""
    record = adapter.backbones[part]
    module = type(getattr(backbone, "backbone", backbone)).__name__
    differences = [f"it is a {module}, not a {record.module}"] if module != record.module else []
    if _layout(backbone) != record.layout:
        differences.append(f"it gives {_layout(backbone)}, not {record.layout}")
    if isinstance(backbone, PreTrainedModel):
        recorded: Any = adapter.config.text_config
        differences += _config_differences(backbone.config.to_dict(), recorded.to_dict())
    if not differences and part in (adapter.config.freeze or ()):
        found = fingerprint(part, backbone, without=adapter.tensors)
        differences = list(_differences(found, record.tensors, dict(backbone.named_parameters())))
    if differences:
        source = repr(record.name_or_path) if record.name_or_path else "a model without a name"
        source += f" at revision {record.revision}" if record.revision else ""
        raise ValueError(
            f"{part} is not the one that this adapter was trained beside, {source}: {_first(differences)}. Load that "
            "one; to try the adapter beside another one, build a Flamingo around it, and give the tensors of "
            f"{WEIGHTS} to load_state_dict(strict=False)"
        )


def _layout(backbone: nn.Module) -> str:
    if not isinstance(backbone, VisionEncoder):
        return ""
    dtype = "its own dtype" if backbone.output_dtype is None else dtype_name(backbone.output_dtype)
    return f"{backbone.layout} in {dtype}"


def _config_differences(found: Any, recorded: Any, name: str = "its config's") -> list[str]:
    """Compare what both configurations say; versions of transformers may say more or less."""
    if isinstance(found, dict) and isinstance(recorded, dict):
        shared = [key for key in recorded if key in found and not str(key).startswith("_")]
        shared = [key for key in shared if not any(word in str(key) for word in _NO_MATTER)]
        return [line for key in shared for line in _config_differences(found[key], recorded[key], f"{name} {key}")]
    # JSON knows no tuples.
    same = json.dumps(found, default=str) == json.dumps(recorded, default=str)
    return [] if same else [f"{name} is {found!r}, not {recorded!r}"]


def fingerprint(part: str, backbone: nn.Module, *, without: Collection[str] = ()) -> dict[str, str]:
    """Describe each tensor of a backbone by its dtype, its shape and a few of its numbers, from all over it.

    Numbers of quantised tensors are left out, as are those that are not there (on the meta device, or offloaded).

    Args:
        part: `"language_model"` or `"vision_encoder"`.
        backbone: It.
        without: Tensors that do not count, by their names in the Flamingo.
    """
    return {name: _describe(tensor) for name, tensor in _tensors(backbone).items() if f"{part}.{name}" not in without}


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of an adapter, all of them or none.

    Args:
        model: A Flamingo around the backbones that the adapter was trained beside.
        tensors: Those of the adapter. Those of a backbone are cast to its dtype.

    Raises:
        ValueError: If a tensor is missing, there is one too many, or one has another shape or dtype than it should. The
            model is then as it was.
    """
    expected = trained_tensors(model)
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        target = expected.get(name)
        if target is None:
            wrong.append(f"{name} is nothing that was trained")
        elif target.shape != tensor.shape:
            wrong.append(f"{name} has shape {tuple(tensor.shape)}, should have {tuple(target.shape)}")
        elif target.is_meta or type(target.data) is not Tensor:
            wrong.append(f"{name} cannot be written to, since it is offloaded or quantised")
        elif target.dtype != tensor.dtype and not (
            name.startswith(BACKBONES) and target.is_floating_point() and tensor.is_floating_point()
        ):
            wrong.append(f"{name} is {dtype_name(tensor.dtype)}, should be {dtype_name(target.dtype)}")
    if wrong:
        raise ValueError(
            f"{WEIGHTS} does not fit config.json: {_first(wrong)}; copy the adapter again, if the backbones are those "
            "that it was trained beside"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            expected[name].copy_(tensor)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each once. Not by state_dict(), for which bitsandbytes repacks its weights."""
    owners = dict(module.named_modules())
    buffers = {name: name.rpartition(".") for name, _ in module.named_buffers()}
    persistent = {
        name: module.get_buffer(name)
        for name, (owner, _, own_name) in buffers.items()
        if own_name not in owners[owner]._non_persistent_buffers_set
    }
    return {**dict(module.named_parameters()), **persistent}


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds its own numbers: quantised ones are of a subclass, or of integers."""
    inner = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    return type(inner) is Tensor and inner.is_floating_point() and inner.itemsize > 1 and not inner.is_meta


def _describe(tensor: Tensor) -> str:
    if not _is_plain(tensor):
        return ""
    shape = "x".join(map(str, tensor.shape))
    places = torch.linspace(0, max(0, tensor.numel() - 1), min(SAMPLES, tensor.numel()), dtype=torch.float64).long()
    numbers = tensor.detach().flatten()[places.to(tensor.device)].double().tolist()
    return " ".join([dtype_name(tensor.dtype), shape, *(f"{number:.9g}" for number in numbers)])


def _differences(found: Mapping[str, str], record: Mapping[str, str], parameters: Mapping[str, Any]) -> Iterator[str]:
    for name, text in record.items():
        if name not in found:
            yield f"it has no {name}"
            continue
        if not text or not found[name]:  # quantised, then or now
            continue
        dtype, shape, *_ = text.split(" ")
        dtype_found, shape_found, *_ = found[name].split(" ")
        numbers, numbers_found = _numbers(text), _numbers(found[name])
        if shape != shape_found:
            yield f"{name} has shape {shape_found}, not {shape}"
        elif dtype == dtype_found:
            if str(numbers) != str(numbers_found):
                yield f"{name} holds other numbers"
        elif not all(map(_is_close, numbers, numbers_found)):
            yield f"{name} holds other numbers"
    yield from (f"it has {name}, which that one had not" for name in found if name not in record and name in parameters)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(" ")[2:]]


def _is_close(one: float, other: float) -> bool:
    """Whether two numbers may be one, rounded to half precision in different ways."""
    return str(one) == str(other) or abs(one - other) <= 2**-8 * abs(one) + 1e-6  # infinite, or no numbers


def _first(differences: list[str]) -> str:
    more = len(differences) - SHOWN
    return "; ".join(differences[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
