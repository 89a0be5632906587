"""What the injector needs to know of a Hugging Face language model: its decoder layers and its width.

Both are found by structure, not by a table of names, so that a language model that did not exist when this was written
works too.
"""

from typing import Any

from torch import nn

# Where architectures write down how many decoder layers they have.
_DEPTH_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


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
    if getattr(lm.config, "is_encoder_decoder", False):
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
                "name the right one by its path"
            )
        if best:
            return best[0], candidates[best[0]]
    seen = ", ".join(f"{name} ({len(layers)})" for name, layers in lists.items()) or "none"
    raise ValueError(
        f"no list of decoder layers found in {type(lm).__name__}, whose config speaks of {sorted(depths) or 'no'} "
        f"layers; its module lists, with their lengths: {seen}. Name the right one by its path"
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
