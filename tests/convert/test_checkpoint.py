"""Files of checkpoints, and configurations."""

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from flamingo_blocks.convert.checkpoint import read_config, read_tensors

TENSORS = {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3), "b": torch.arange(4)}


def check(found: dict[str, Tensor]) -> None:
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("name", ["checkpoint.pt", "pytorch_model.bin", "model.safetensors", "other.pth"])
def test_files_and_directories_that_have_one_are_read(tmp_path: Path, name: str) -> None:
    if name.endswith("safetensors"):
        save_file(TENSORS, tmp_path / name)
    else:
        torch.save(OrderedDict(TENSORS), tmp_path / name)
    check(read_tensors(tmp_path / name))
    check(read_tensors(str(tmp_path)))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read(tmp_path: Path, kind: str) -> None:
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{i + 1}-of-00003.{kind}" for i in range(3)]
    for file, (name, tensor) in zip(names, TENSORS.items(), strict=True):
        if kind == "safetensors":
            save_file({name: tensor}, tmp_path / file)
        else:
            torch.save({name: tensor}, tmp_path / file)
    index = tmp_path / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip(TENSORS, names, strict=True))}))
    check(read_tensors(tmp_path))
    check(read_tensors(index, progress=True))
    (tmp_path / names[1]).unlink()
    with pytest.raises(OSError, match=f"{names[1]}', which the index names, is not there"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("within", ["model_state_dict", "state_dict", "model"])
def test_the_model_is_found_beside_an_optimizer(tmp_path: Path, within: str) -> None:
    content = {within: {f"module.{name}": tensor for name, tensor in TENSORS.items()}, "epoch": 3}
    torch.save(content, tmp_path / "checkpoint.pt")
    check(read_tensors(tmp_path / "checkpoint.pt"))


def test_files_of_old_versions_of_torch_are_read(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "checkpoint.pt", _use_new_zipfile_serialization=False)
    check(read_tensors(tmp_path / "checkpoint.pt"))


class Dangerous:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    torch.save({"a": Dangerous(tmp_path / "done")}, file)
    with pytest.raises(OSError, match="cannot be read as a checkpoint of tensors"):
        read_tensors(file)
    file.write_bytes(pickle.dumps({"a": Dangerous(tmp_path / "done")}))
    with pytest.raises(OSError, match="cannot be read as a checkpoint of tensors"):
        read_tensors(file)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.safetensors"])
def test_what_was_read_does_not_follow_its_file(tmp_path: Path, name: str) -> None:
    save: Any = save_file if name.endswith("safetensors") else torch.save
    save(TENSORS, tmp_path / name)
    found = read_tensors(tmp_path / name)
    with (tmp_path / name).open("r+b") as file:  # in place, as a copy over it does
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(bytes(size))
    check(found)


def test_what_was_read_is_contiguous(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(3, 2).T}, tmp_path / "checkpoint.pt")
    for found in (read_tensors(tmp_path / "checkpoint.pt"), read_tensors({"a": torch.randn(3, 2).T})):
        assert found["a"].is_contiguous()


def test_tensors_without_data_are_refused() -> None:
    with pytest.raises(ValueError, match=r"on the meta device: \['a'\]"):
        read_tensors({"a": torch.ones(2, device="meta")})


def test_a_configuration_is_no_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ValueError, match="is no index of files"):
        read_tensors(tmp_path / "config.json")


def test_given_tensors_are_copied() -> None:
    given = {name: tensor.clone() for name, tensor in TENSORS.items()}
    found = read_tensors(given)
    given["b"].zero_()
    check(found)


@pytest.mark.parametrize("content", [{}, {"a": 3}, {3: torch.ones(1)}])
def test_what_holds_no_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="must hold tensors by name"):
        read_tensors(tmp_path / "checkpoint.pt")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"there is no checkpoint .*nowhere.pt"):
        read_tensors(tmp_path / "nowhere.pt")
    with pytest.raises(OSError, match="none there"):
        read_tensors(tmp_path)
    for name in ("x.pt", "y.pt"):
        torch.save(TENSORS, tmp_path / name)
    with pytest.raises(OSError, match=r"name one of its files: x.pt, y.pt"):
        read_tensors(tmp_path)
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(ValueError, match="must hold tensors by name, got a list"):
        read_tensors(tmp_path / "x.pt")


def test_configurations_of_all_kinds_are_read(tmp_path: Path) -> None:
    content = {"hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(content))
    for config in (content, tmp_path, tmp_path / "config.json", str(tmp_path)):
        assert read_config(config, {}) == content
    assert read_config(None, tmp_path) == content
    assert read_config(None, tmp_path / "model.safetensors") == content
    assert read_config(LlamaConfig(hidden_size=64), {})["hidden_size"] == 64


def test_configurations_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="config must be given with tensors"):
        read_config(None, TENSORS)
    with pytest.raises(OSError, match=r"there is no configuration .*config.json"):
        read_config(None, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match="cannot be read as JSON"):
        read_config(tmp_path, {})
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold an object, got a list"):
        read_config(tmp_path, {})
