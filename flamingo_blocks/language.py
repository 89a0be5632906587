"""What the injector needs to know of a Hugging Face language model: its decoder layers and its width.

Both are found by structure, not by a table of names, so that a language model that did not exist when this was written
works too.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from flamingo_blocks.injection import hidden_states_argument
from flamingo_blocks.residual_stream import LAYOUTS, StreamLayout, find_stream_layout

# Where architectures write down how many decoder layers they have.
_DEPTH_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
# By model_type: the list where structure cannot tell.
_PATHS = {
    "blt": "model.local_decoder.layers",  # it has four towers; this one has the bytes' residual stream
    "hrm_text": "model.H_module.layers",  # its config counts passes, not layers; the slow module has the output
    "xlm": "transformer.layer_norm1",  # it has no module for a layer: what enters this norm is the residual stream
}


def find_decoder_layers(lm: nn.Module, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder layers of a language model.

    Candidates are the module lists as long as the config says the decoder is deep. Among several, those made of
    transformers' `GradientCheckpointingLayer` come first, then those made of the classes that the model must not split
    across devices, then those of one class, then the shallowest in the module tree.

    Args:
        lm: A decoder-only language model of transformers; any module if `path` is given.
        path: Dotted name of the list, e.g. `"model.layers"`. It always wins over the search.

    Returns:
        The list's dotted name, and the list.

    Raises:
        ValueError: If the language model is an encoder-decoder, `path` is not a module list, no list is found, or
            several are equally good; the message names the candidates.
    """
    if path is not None:
        return path, _layers_at(lm, path)
    config = _text_config(lm)
    whole: Any = lm.config
    if (known := _PATHS.get(whole.model_type)) is not None:
        return known, _layers_at(lm, known)
    if getattr(whole, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(lm).__name__} is an encoder-decoder; Flamingo's blocks stand in a decoder-only language model. "
            "Load its decoder as a causal language model"
        )
    depths = {depth for name in _DEPTH_NAMES if isinstance(depth := getattr(config, name, None), int)}
    lists = {name: module for name, module in lm.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    candidates = {name: layers for name, layers in lists.items() if len(layers) in depths}
    for root in _roots(lm):
        inside = {id(module) for module in root.modules()}
        found = {name: _rank(lm, name, layers) for name, layers in candidates.items() if id(layers) in inside}
        best = [name for name, rank in found.items() if rank == max(found.values())]
        if len(best) > 1:
            raise ValueError(
                f"{type(lm).__name__} has several lists that may be its decoder layers: {', '.join(best)}; "
                "name the right one by its path, in build_flamingo by decoder_layers="
            )
        if best:
            return best[0], candidates[best[0]]
    seen = ", ".join(f"{name} ({len(layers)})" for name, layers in lists.items()) or "none"
    raise ValueError(
        f"no list of decoder layers found in {type(lm).__name__}, whose config speaks of {sorted(depths) or 'no'} "
        f"layers; its module lists, with their lengths: {seen}. Name the right one by its path, "
        "in build_flamingo by decoder_layers="
    )


def find_hidden_size(lm: nn.Module) -> int:
    """Find the width of the hidden states that enter the decoder layers.

    Args:
        lm: A language model of transformers.

    Raises:
        ValueError: If it has neither `hidden_size` in its config nor an input embedding.
    """
    hidden_size = getattr(_text_config(lm), "hidden_size", None)
    if isinstance(hidden_size, int):
        return hidden_size
    model: Any = lm
    embedding = model.get_input_embeddings() if hasattr(lm, "get_input_embeddings") else None
    if embedding is None:
        raise ValueError(f"{type(lm).__name__} says its width neither in its config nor by an input embedding")
    width: int = embedding.weight.shape[1]
    return width


@torch.no_grad()
def find_residual_stream(lm: nn.Module, layers: Mapping[int, nn.Module]) -> StreamLayout:
    """Find out how hidden states are laid out between decoder layers, by running a few tokens.

    Args:
        lm: A language model of transformers, or any module that is called with `input_ids`.
        layers: Those of its decoder layers that will get a block, by their indices.

    Raises:
        ValueError: If the language model does not run on plain token ids, some layer is not run, or hidden states have
            a layout that is none of those known.
    """
    name, dim, device = type(lm).__name__, find_hidden_size(lm), next(lm.parameters()).device
    found: dict[int, dict[tuple[int, int], tuple[int, ...]]] = {index: {} for index in layers}
    size = (0, 0)

    def record(index: int, layer: nn.Module) -> Any:
        position, argument = hidden_states_argument(layer)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_states = kwargs[argument] if argument in kwargs else args[position]
            found[index][size] = tuple(hidden_states.shape)

        return layer.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [record(index, layer) for index, layer in layers.items()]
    try:
        for size in ((3, 5), (2, 7)):
            lm(input_ids=torch.full(size, ordinary_token(lm), device=device), use_cache=False)
    except Exception as error:
        raise ValueError(f"{name} does not run on plain token ids: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    skipped = [index for index, shapes in found.items() if not shapes]
    if skipped:
        raise ValueError(
            f"{name} does not run its decoder layers {skipped} on text alone; leave them out by layers=, or name "
            "another list by decoder_layers="
        )
    layouts = {find_stream_layout(shapes, dim) for shapes in found.values()}
    (layout,) = layouts if len(layouts) == 1 else (None,)
    if layout is None:
        shapes = sorted({shape for by_size in found.values() for shape in by_size.values()})
        raise ValueError(
            f"{name}'s residual stream has no layout that blocks can stand in: for (batch, text) of (3, 5) and (2, 7) "
            f"and a width of {dim}, hidden states were {shapes}; known are {', '.join(map(repr, LAYOUTS))}"
        )
    return layout


def ordinary_token(lm: Any, besides: Collection[int | None] = ()) -> int:
    """Find a token that means nothing special to a language model: neither padding nor the beginning of anything.

    Args:
        lm: A language model of transformers.
        besides: Tokens that it must not be either.
    """
    special: set[Any] = set(besides)
    for config in (lm.config, _text_config(lm)):
        for name in dir(config):
            if name.endswith(("_token_id", "_token_index", "pad_index", "bos_index", "eos_index", "unk_index")):
                value = getattr(config, name)
                special |= set(value) if isinstance(value, list | tuple) else {value}
    middle = _text_config(lm).vocab_size // 2  # special tokens most often come first or last
    return next(i for i in range(middle, middle + len(special) + 1) if i not in special)


def _text_config(lm: nn.Module) -> Any:
    config: Any = getattr(lm, "config", None)
    if not hasattr(config, "get_text_config"):
        raise ValueError(
            f"{type(lm).__name__} has no transformers config to learn its structure from; name the list of its decoder "
            "layers by its path, and its width yourself"
        )
    return config.get_text_config(decoder=True)


def _layers_at(lm: nn.Module, path: str) -> nn.ModuleList:
    try:
        layers = lm.get_submodule(path)
    except AttributeError:
        layers = None
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        lists = [name for name, module in lm.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
        raise ValueError(
            f"{path!r} is not a list of layers in {type(lm).__name__}; its module lists: {', '.join(lists) or 'none'}"
        )
    return layers


def _roots(lm: nn.Module) -> list[nn.Module]:
    """Where to look, best first: some models have further lists of that length beside their decoder."""
    model: Any = lm
    roots = [model.get_decoder() if hasattr(lm, "get_decoder") else None, getattr(lm, "base_model", None), lm]
    return [root for root in roots if isinstance(root, nn.Module)]


def _rank(lm: nn.Module, name: str, layers: nn.ModuleList) -> tuple[bool, bool, bool, int]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    unsplit = set(getattr(lm, "_no_split_modules", None) or ())
    return (
        all(isinstance(layer, GradientCheckpointingLayer) for layer in layers),
        all(type(layer).__name__ in unsplit for layer in layers),
        len({type(layer) for layer in layers}) == 1,
        -name.count("."),
    )
