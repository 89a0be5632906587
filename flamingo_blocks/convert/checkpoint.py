"""Read released checkpoints: tensors by name, from files of several kinds, and configurations.

Nothing in a file can run code: safetensors cannot hold any, and pickles are read with torch's `weights_only=True`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig

Checkpoint = str | Path | Mapping[str, Tensor]
Config = Mapping[str, Any] | PreTrainedConfig | str | Path

# As transformers writes them: an index names the file of each tensor.
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FILES = ("model.safetensors", "pytorch_model.bin", "checkpoint.pt")
# Under which training scripts put the model's tensors, beside those of their optimizer.
_WITHIN = ("model_state_dict", "state_dict", "model")


def read_tensors(checkpoint: Checkpoint, *, progress: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint.

    Args:
        checkpoint: A file (`.safetensors`, or one of torch: `.pt`, `.pth`, `.bin`), an index of several
            (`.index.json`), a directory that has such a file or index under one of its usual names, or the tensors
            themselves, which are copied.
        progress: Show a bar for files that are read tensor by tensor.

    Returns:
        Tensors by name, on the CPU, contiguous, and independent of the files. A prefix `module.`, which distributed
        training puts before all names, is taken off.

    Raises:
        OSError: If there is no such file, or it is damaged.
        ValueError: If it holds something else than tensors.
    """
    if isinstance(checkpoint, Mapping):
        tensors = {name: _own(value) for name, value in checkpoint.items()}
    else:
        path = _find_file(Path(checkpoint).expanduser())
        files = _read_index(path) if path.suffix == ".json" else [path.name]
        tensors = {}
        for file in files:
            tensors |= _read_file(path.parent / file, progress=progress)
    wrong = [str(name) for name, value in tensors.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if wrong or not tensors:
        raise ValueError(
            f"a checkpoint must hold tensors by name, got something else: {', '.join(wrong[:5]) or 'nothing'}"
        )
    if on_meta := [name for name, value in tensors.items() if value.is_meta]:
        raise ValueError(f"a checkpoint must hold data, but these tensors are on the meta device: {on_meta[:5]}")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def read_config(config: Config | None, checkpoint: Checkpoint) -> dict[str, Any]:
    """Read a configuration in the family's own form.

    Args:
        config: A mapping, a configuration of transformers, the path of its JSON, or of the directory where it is
            `config.json`. None: the directory of the checkpoint.
        checkpoint: Where the tensors come from.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is no configuration, or must be given.
    """
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, PreTrainedConfig):
        return dict(config.to_dict())
    path = Path(directory_of(checkpoint, "config") if config is None else config).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise OSError(f"there is no configuration {str(path)!r}; give config, a mapping or the path of a JSON file")
    return _read_json(path)


def directory_of(checkpoint: Checkpoint, argument: str) -> Path:
    """Give the directory of a checkpoint, where other files lie beside it.

    Args:
        checkpoint: A file or directory.
        argument: What to give otherwise.

    Raises:
        ValueError: If the checkpoint is tensors, which lie nowhere.
    """
    if isinstance(checkpoint, Mapping):
        raise ValueError(f"{argument} must be given with tensors, which have no directory where it could be found")
    path = Path(checkpoint).expanduser()
    return path if path.is_dir() else path.parent


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise OSError(f"there is no checkpoint {str(path)!r}; download it first, for instance with huggingface_hub")
    for name in (*_INDICES, *_FILES):
        if (path / name).is_file():
            return path / name
    others = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".pt", ".pth", ".bin"))
    if len(others) == 1:
        return path / others[0]
    raise OSError(
        f"{str(path)!r} has no {', '.join(_FILES)}; name one of its files: {', '.join(others) or 'none there'}"
    )


def _read_file(path: Path, *, progress: bool) -> dict[Any, Any]:
    if not path.is_file():
        raise OSError(f"{str(path)!r}, which the index names, is not there; download all files of the checkpoint")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = tqdm(file.keys(), desc=path.name, disable=not progress)
                return {name: _own(file.get_tensor(name)) for name in names}
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:
        raise OSError(f"{str(path)!r} cannot be read as a checkpoint of tensors: {error}") from error
    for name in _WITHIN:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} must hold tensors by name, got a {type(content).__name__}")
    return {name: _own(value) for name, value in content.items()}


def _own(value: Any) -> Any:
    """Copy a tensor: one that is mapped from a file would follow it, and crash where it is written again."""
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return value.detach().clone(memory_format=torch.contiguous_format)


def _read_index(path: Path) -> list[str]:
    files = _read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{str(path)!r} is no index of files: it has no weight_map; name the checkpoint itself")
    return sorted(set(files.values()))


def _is_zip(path: Path) -> bool:
    """Files of torch before 1.6 are no zip archives, and cannot be mapped into memory."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OSError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold an object, got a {type(content).__name__}")
    return content
