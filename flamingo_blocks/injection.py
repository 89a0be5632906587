"""LMLayerInjector: put blocks before the decoder layers of a language model, and take them out again.

The language model keeps its module tree, its classes and its state_dict keys: blocks run in forward pre-hooks.
Nothing here knows any model library; a decoder layer is a module that is called with hidden states.
"""

import inspect
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from flamingo_blocks.blocks.attention import KeyValues
from flamingo_blocks.blocks.media_mask import MediaRuns
from flamingo_blocks.residual_stream import LAYOUTS, StreamLayout, update_stream
from flamingo_blocks.scopes import Opened, Scopes, is_in_backward


def select_layers(
    num_layers: int, *, every: int = 1, layers: Sequence[int] | Literal["middle"] | None = None
) -> tuple[int, ...]:
    """Choose the decoder layers that get a block before them.

    Args:
        num_layers: Number of decoder layers.
        every: A block before layers 0, `every`, 2 * `every`, ...
        layers: Instead: the indices themselves, or `"middle"` for one block before layer `num_layers` // 2.

    Returns:
        Indices in ascending order.

    Raises:
        ValueError: If `every` is not in 1..num_layers or is given beside `layers`, or an index is not there or comes
            twice.

    Source: Alayrac et al. 2022, table 1 (every layer of 24, every 4th of 40, every 7th of 80) and table 3 (v).
    """
    if layers is not None and every != 1:
        raise ValueError(f"give either every or layers, got every={every} and layers={layers!r}")
    if layers is None:
        if not 1 <= every <= num_layers:
            raise ValueError(f"every must be in 1..{num_layers}, the number of decoder layers, got {every}")
        return tuple(range(0, num_layers, every))
    if isinstance(layers, str):
        if layers != "middle":
            raise ValueError(f'layers must be a sequence of indices or "middle", got {layers!r}')
        return (num_layers // 2,)
    _check_indices(layers, num_layers)
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers must not name a layer twice, got {list(layers)}")
    return tuple(sorted(layers))


def _check_indices(indices: Sequence[int], num_layers: int) -> None:
    if not indices:
        raise ValueError("at least one decoder layer must get a block, got none")
    absent = [index for index in indices if not 0 <= index < num_layers]
    if absent:
        raise ValueError(f"there are decoder layers 0..{num_layers - 1}, got {absent}")


@dataclass(frozen=True, eq=False)
class MediaScope:
    """What the blocks read during one forward of the language model.

    Attributes:
        media: Latents for all blocks, or each block's own keys and values by its layer's index.
        runs: What each token sees.
        rows_per_media: How many neighbouring rows of text share the media of one row.
    """

    media: Float[Tensor, "batch media latents media_dim"] | Mapping[int, KeyValues]
    runs: MediaRuns
    rows_per_media: int = 1


class LMLayerInjector(nn.Module):
    """Run a block on the hidden states that enter chosen decoder layers.

    The injector owns the blocks; the language model does not know of them. Outside of a scope, the language model
    computes what it did before. Inside, its layers read the media from the scope of the calling thread.

    Args:
        blocks: For each decoder layer by its index, the block that runs before it. Most often a
            `GatedCrossAttentionBlock`; any module with `forward(hidden_states, media, runs)` will do, and with an
            attribute `dim` where the stream is not plain.
        stream: How hidden states are laid out between the decoder layers, see `flamingo_blocks.residual_stream`. Almost
            all language models have `"batch text dim"`; `flamingo_blocks.language.find_residual_stream` tells.

    Attributes:
        blocks: The blocks, in the order of the layers, under their indices as strings.
        gradient_checkpointing: Recompute each block in backward instead of keeping its activations. transformers sets
            it too, with checkpointing of a whole `PreTrainedModel` that has the injector as a submodule.

    Example:
        ```python
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from flamingo_blocks import GatedCrossAttentionBlock, LMLayerInjector, MediaRuns, media_ranges

        lm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
            )
        )
        blocks = {i: GatedCrossAttentionBlock(dim=64, media_dim=32, heads=4) for i in (0, 2)}
        injector = LMLayerInjector(blocks).inject(lm.model.layers)

        input_ids, media = torch.randint(99, (1, 10)), torch.randn(1, 2, 8, 32)
        is_image = torch.zeros(1, 10, dtype=torch.bool).index_fill(1, torch.tensor([0, 5]), True)
        with injector.scope(media, MediaRuns.from_ranges(media_ranges(is_image))):
            logits = lm(input_ids).logits
        injector.eject()
        ```

    Raises:
        ValueError: If `blocks` is empty, or `stream` is no layout known.

    Source: Alayrac et al. 2022, section 2.2 (new layers between frozen ones). Blocks stand in pre-hooks because
    wrapping layers would rename the language model's parameters.
    """

    def __init__(self, blocks: Mapping[int, nn.Module], *, stream: StreamLayout = "batch text dim") -> None:
        super().__init__()
        if not blocks:
            raise ValueError("blocks must hold at least one block, got none")
        if stream not in LAYOUTS:
            raise ValueError(f"stream must be one of {', '.join(map(repr, LAYOUTS))}, got {stream!r}")
        self.stream = stream
        self.blocks = nn.ModuleDict({str(index): blocks[index] for index in sorted(blocks)})
        self.gradient_checkpointing = False
        self._scopes = Scopes()
        self._handles: list[RemovableHandle] = []
        self._with_own_forward: list[weakref.ref[nn.Module]] = []

    @property
    def layer_indices(self) -> tuple[int, ...]:
        """Indices of the decoder layers that have a block before them."""
        return tuple(int(index) for index in self.blocks)

    @property
    def is_injected(self) -> bool:
        """Whether the blocks are in place. A copy of the injector without its language model is in place nowhere."""
        return any(handle.id in (handle.hooks_dict_ref() or ()) for handle in self._handles)

    def inject(self, layers: nn.ModuleList | Sequence[nn.Module]) -> "LMLayerInjector":
        """Put the blocks in place.

        Code that torch.compile has made of other language models of the class, or of this one before, is not run.

        Args:
            layers: All decoder layers of the language model, e.g. `lm.model.layers`, or what
                `flamingo_blocks.language.find_decoder_layers` found.

        Returns:
            This injector.

        Raises:
            ValueError: If a block's index is not among the layers, this injector is in place already, another one's
                blocks are, or a layer is shared between places.
        """
        if self.is_injected:
            raise ValueError("this injector is already in place; call eject() first")
        _check_indices(self.layer_indices, len(layers))
        check_has_no_blocks(layers)
        for index in self.layer_indices:
            if sum(layer is layers[index] for layer in layers) > 1:
                raise ValueError(
                    f"decoder layer {index} stands in the list more than once; shared layers cannot differ"
                )
        hooks = {index: _BlockHook(self, index, *hidden_states_argument(layers[index])) for index in self.layer_indices}
        self._handles = [
            layers[index].register_forward_pre_hook(hook, with_kwargs=True) for index, hook in hooks.items()
        ]
        # torch.compile shares code between modules of a class and does not look at their hooks. That a layer has a
        # forward of its own, be it the same, it does see.
        own = [layers[index] for index in self.layer_indices if "forward" not in vars(layers[index])]
        for layer in own:
            layer.forward = layer.forward
        self._with_own_forward = [weakref.ref(layer) for layer in own]
        return self

    def eject(self) -> None:
        """Take the blocks out: the language model is as it was. The blocks and their weights stay here.

        Raises:
            ValueError: If the blocks are not in place.
        """
        if not self.is_injected:
            raise ValueError("this injector is not in place; call inject() first")
        for handle in self._handles:
            handle.remove()
        for layer in (reference() for reference in self._with_own_forward):
            if layer is not None:
                del layer.forward
        self._handles, self._with_own_forward = [], []

    def __getstate__(self) -> dict[str, Any]:
        # A copy knows its blocks, but not the layers around which the original stands.
        return {**vars(self), "_with_own_forward": []}

    def project_media(self, media: Float[Tensor, "batch media latents media_dim"]) -> dict[int, KeyValues]:
        """Project media for all blocks at once, for a `scope` that is entered again and again.

        Args:
            media: The media's latents.

        Returns:
            Each block's keys and values by its layer's index.
        """
        blocks: Any = self.blocks
        return {index: blocks[str(index)].project_media(media) for index in self.layer_indices}

    def scope(
        self,
        media: Float[Tensor, "batch media latents media_dim"] | Mapping[int, KeyValues],
        runs: MediaRuns,
        *,
        rows_per_media: int = 1,
    ) -> AbstractContextManager[None]:
        """Let the language model's calls in this thread see media, until the end of the `with` block.

        Scopes nest; the inner one counts. Threads do not see each other's scopes. Within a thread, a scope must not be
        held over an `await` or a `yield`: it would be open for whatever runs meanwhile.

        Args:
            media: The media's latents, or what `project_media` made of them.
            runs: What each token sees.
            rows_per_media: How many neighbouring rows of text share the media of one row, as the beams of a search do,
                without a copy. `runs` are then those of (batch, rows_per_media * text) tokens.

        Raises:
            ValueError: If `media` are projected, but not for every block.
            RuntimeError: At the end, if scopes were not closed in the reverse order of their opening.
        """
        if not isinstance(media, Tensor):
            missing = [index for index in self.layer_indices if index not in media]
            if missing:
                raise ValueError(f"media must be projected for every block by project_media, not so for {missing}")
        return Opened(self._scopes, MediaScope(media, runs, rows_per_media))

    def checkpoint_context(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Carry the scope into recomputation, for those who checkpoint decoder layers, hooks included, by themselves.

        Backward runs after the scope has ended, so a recomputed layer would not find it. Pass this method as
        `context_fn` to `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`,
        to torch's `checkpoint_wrapper`, or in transformers' `gradient_checkpointing_kwargs`. (transformers 5.23
        checkpoints layers without their hooks and does not need it; older ones do.) A recomputation that lacks it is an
        error, never a wrong gradient.
        """
        return nullcontext(), Opened(self._scopes, self._scopes.current.value)

    def _run_block(self, index: int, hidden_states: Tensor) -> Tensor:
        scope, opened_in_backward = self._scopes.current
        if is_in_backward() and not opened_in_backward:
            raise RuntimeError(
                "a decoder layer is being recomputed in backward, where its media scope has ended; pass "
                "context_fn=injector.checkpoint_context and use_reentrant=False to its checkpoint"
            )
        if scope is None:
            return hidden_states
        block: Any = self.blocks[str(index)]
        media = scope.media if isinstance(scope.media, Tensor) else scope.media[index]
        rows, positions, _ = scope.runs.ranges.shape

        def update(hidden_states: Tensor) -> Tensor:
            shape = hidden_states.shape
            if scope.rows_per_media > 1:
                # Rows that share media are one longer text to a block, which knows no positions.
                hidden_states = hidden_states.reshape(-1, scope.rows_per_media * shape[1], *shape[2:])
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = checkpoint(block, hidden_states, media, scope.runs, use_reentrant=False)
            else:
                hidden_states = block(hidden_states, media, scope.runs)
            return hidden_states.view(shape)

        return update_stream(
            update,
            hidden_states,
            self.stream,
            batch=rows * scope.rows_per_media,
            text=positions // scope.rows_per_media,
            dim=getattr(block, "dim", 0),  # a plain stream needs none
        )


def check_has_no_blocks(layers: Iterable[nn.Module]) -> None:
    """Refuse decoder layers before which there are blocks.

    Args:
        layers: All decoder layers of a language model.

    Raises:
        ValueError: If there are some.
    """
    if any(isinstance(hook, _BlockHook) for layer in layers for hook in layer._forward_pre_hooks.values()):
        raise ValueError(
            "this language model already has blocks injected; call eject() on the injector that holds them"
        )


class _BlockHook:
    """Forward pre-hook of a decoder layer: an object, not a closure, so that deepcopy and pickle can follow it."""

    def __init__(self, injector: LMLayerInjector, index: int, position: int, name: str) -> None:
        self.injector = injector
        self.index = index
        self.position = position
        self.name = name

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.name in kwargs:
            return args, {**kwargs, self.name: self.injector._run_block(self.index, kwargs[self.name])}
        if len(args) <= self.position:
            raise ValueError(f"decoder layer {self.index} must be called with {self.name}, got no such argument")
        hidden_states = self.injector._run_block(self.index, args[self.position])
        return (*args[: self.position], hidden_states, *args[self.position + 1 :]), kwargs


def hidden_states_argument(layer: nn.Module) -> tuple[int, str]:
    """Find the position and name of the argument that holds the hidden states: by name, else the first one."""
    parameters = inspect.signature(layer.forward).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)] or ["hidden_states"]
    name = "hidden_states" if "hidden_states" in names else names[0]
    return names.index(name), name
