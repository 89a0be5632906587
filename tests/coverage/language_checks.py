"""The laws that every causal language model of transformers goes through, with a Flamingo built around it."""

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flamingo_blocks import FlamingoForConditionalGeneration, build_flamingo
from flamingo_blocks.configuration_flamingo import FlamingoVisionConfig
from flamingo_blocks.language import find_decoder_layers
from tests.coverage.sweep import Result
from tests.coverage.tiny_configs import VOCAB, make_lm
from tests.strategies import randomize
from tests.tiny_flamingo import SIZES, VISION, make_tokenizer

# Where the tokenizer has `<image>`, unless it is new.
IMAGE = 3
# What build_flamingo must be told.
OPTIONS: dict[str, dict[str, Any]] = {
    "MllamaForCausalLM": {"layers": [0, 1, 2]},  # layer 3 is its own cross-attention, which text alone skips
}


class Inputs:
    """Two rows of text with two media and one; `<image>` and `<EOC>` are tokens that the language model has."""

    def __init__(self, image: int = IMAGE) -> None:
        generator = torch.Generator().manual_seed(0)
        self.input_ids = torch.randint(60, 90, (2, 9), generator=generator)
        self.input_ids[0, 2] = self.input_ids[0, 5] = self.input_ids[1, 4] = image
        self.pixel_values = torch.randn(2, 2, 1, 3, 32, 32, generator=generator)
        self.num_frames = torch.tensor([[1, 1], [1, 0]])
        self.media: dict[str, Any] = {"pixel_values": self.pixel_values, "num_frames": self.num_frames}

    def __call__(self, model: Any, **arguments: Any) -> Any:
        return model(**{"input_ids": self.input_ids, "use_cache": False} | self.media | arguments)


def make_flamingo(
    architecture: str, *, gate: float = 0.0, new_tokens: bool = False, lm: Any = None, **arguments: Any
) -> FlamingoForConditionalGeneration:
    """Build a Flamingo around a tiny model; where gates are open, everything that is trained is random."""
    lm = make_lm(architecture, **arguments) if lm is None else lm
    specials = () if new_tokens else ("<image>", "<EOC>")
    torch.manual_seed(0)
    model, _ = build_flamingo(
        lm,
        FlamingoVisionConfig(**VISION["vit"]),
        tokenizer=make_tokenizer(size=VOCAB if new_tokens else VOCAB - 2, specials=specials),
        **SIZES | OPTIONS.get(architecture, {}),
    )
    if gate:
        for part in (model.resampler, model.injector, model.new_tokens):
            if part is not None:
                randomize(part, 0)
    return model


def outputs(model: Any, inputs: Inputs, **arguments: Any) -> tuple[Tensor, ...]:
    return logits_and_hidden_states(inputs(model, output_hidden_states=True, **arguments))


def base_outputs(lm: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    return logits_and_hidden_states(lm(input_ids=inputs.input_ids, use_cache=False, output_hidden_states=True))


def logits_and_hidden_states(output: Any) -> tuple[Tensor, ...]:
    return output.logits, *[h for h in output.get("hidden_states") or () if isinstance(h, Tensor)]


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def difference(first: Tensor, second: Tensor) -> float:
    """Largest difference, relative to the spread of the logits."""
    return float((first - second).abs().max() / second.std())


# What a law says where the model is right, but without the language model's cache.
UNCACHED = "uncached"


class BrokenLawError(Exception):
    """A law does not hold; the message says how."""


def require(holds: bool, how: str) -> None:
    if not holds:
        raise BrokenLawError(how)


# ---------------------------------------------------------------- the laws


@torch.no_grad()
def gate_zero(architecture: str, dtype: torch.dtype = torch.float32) -> None:
    """Logits and all hidden states are the base LM's, bit for bit."""
    model = make_flamingo(architecture, dtype=dtype)
    inputs = Inputs()
    injected = outputs(model, inputs)
    lm = model.eject()
    base = base_outputs(lm, inputs)
    require(same(base, base_outputs(lm, inputs)), "the base differs from itself when run again")
    require(same(injected, base), "differs from the base")


def gate_zero_bfloat16(architecture: str) -> None:
    """The same with a bfloat16 LM and float32 blocks."""
    gate_zero(architecture, torch.bfloat16)


@torch.no_grad()
def generation(architecture: str) -> str:
    """At gate zero, cached greedy generation gives the base LM's ids."""
    model = make_flamingo(architecture)
    inputs = Inputs()
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "attention_mask": torch.ones_like(inputs.input_ids),
    }
    stop = {
        name: getattr(model.generation_config, name) for name in ("eos_token_id", "suppress_tokens", "pad_token_id")
    }
    ids = model.generate(inputs.input_ids, **inputs.media, **settings)
    stop["use_cache"] = model.config.decoding == "cached"
    tells_positions = model.config.decoding_position_ids
    lm = model.eject()
    if tells_positions:
        base = lm.generate(inputs.input_ids, **settings, **stop)
    else:  # its own generate counts positions otherwise than its forward
        base = inputs.input_ids
        for _ in range(settings["max_new_tokens"]):
            logits = lm(input_ids=base, use_cache=False).logits[:, -1]
            logits[:, stop["suppress_tokens"]] = -torch.inf
            base = torch.cat([base, logits.argmax(-1, keepdim=True)], dim=1)
    require(torch.equal(ids, base), "other ids than the base")
    return "" if model.config.decoding == "cached" else UNCACHED


@torch.no_grad()
def open_gates(architecture: str) -> None:
    """With open gates the output changes."""
    model = make_flamingo(architecture, gate=1.0)
    inputs = Inputs()
    with_media = inputs(model).logits
    base = model.eject()(input_ids=inputs.input_ids, use_cache=False).logits
    require(difference(with_media, base) > 1e-3, "the output does not change")


@torch.no_grad()
def cached(architecture: str) -> str:
    """With open gates, cached decoding gives the logits of the full forward."""
    model = make_flamingo(architecture, gate=1.0)
    inputs = Inputs()
    how = ""
    if model.config.decoding == "uncached":
        how = UNCACHED
        try:
            inputs(model, use_cache=True)
        except ValueError as error:
            require("gives other logits with its cache" in str(error), f"refused with {error}")
        else:
            raise BrokenLawError("its cache is wrong, but was used")
    found = model.generate(
        inputs.input_ids,
        attention_mask=torch.ones_like(inputs.input_ids),
        max_new_tokens=4,
        do_sample=False,
        use_cache=True,  # where the cache is wrong, generate does without
        return_dict_in_generate=True,
        output_logits=True,
        **inputs.media,
    )
    full = inputs(model, input_ids=found.sequences).logits[:, inputs.input_ids.shape[1] - 1 : -1]
    wrong = difference(torch.stack(found.logits, dim=1), full)
    require(wrong < 1e-3, f"off by {wrong:.1g}")
    return how


@torch.no_grad()
def causal(architecture: str) -> None:
    """No token depends on a later medium, none on another row's."""
    model = make_flamingo(architecture, gate=1.0)
    inputs = Inputs()
    before = inputs(model).logits
    for row, medium, seen_from in ((0, 0, 2), (0, 1, 5), (1, 0, 4)):
        other = inputs.pixel_values.clone()
        other[row, medium] = torch.randn(other[row, medium].shape, generator=torch.Generator().manual_seed(9))
        after = inputs(model, pixel_values=other).logits
        require(difference(after[row, seen_from:], before[row, seen_from:]) > 1e-4, "a medium changes nothing")
        wrong = max(
            difference(after[row, :seen_from], before[row, :seen_from]), difference(after[1 - row], before[1 - row])
        )
        if wrong > 1e-4:
            lm = model.eject()
            base = lm(input_ids=inputs.input_ids, use_cache=False).logits
            ids = inputs.input_ids.clone()
            ids[row, seen_from:] = 59
            changed = lm(input_ids=ids, use_cache=False).logits
            own = max(
                difference(changed[row, :seen_from], base[row, :seen_from]),
                difference(changed[1 - row], base[1 - row]),
            )
            raise BrokenLawError(f"off by {wrong:.1g}; the base, when later tokens change, by {own:.1g}")


def gradients(architecture: str) -> None:
    """The gradient of all that is trained is the slope of the loss along it."""
    model = make_flamingo(architecture, gate=1.0)
    inputs = Inputs()
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn(2, 9, VOCAB, generator=torch.Generator().manual_seed(3))

    def loss() -> Tensor:
        return (inputs(model).logits.double() * weights).sum()

    found = torch.autograd.grad(loss(), trained, allow_unused=True)
    require(all(g is not None for g in found), "some trained parameters get none")
    norm = torch.stack([g.double().norm() for g in found]).norm()
    require(bool(norm > 0) and bool(norm.isfinite()), f"its norm is {norm}")
    slopes = []
    for step in (1e-3, 1e-4):  # some losses are very curved, others' last digits are noise
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                move = {"alpha": sign * step / float(norm)}
                for parameter, gradient in zip(trained, found, strict=True):
                    parameter.add_(gradient, **move)
                values.append(loss().item())
                for parameter, gradient in zip(trained, found, strict=True):
                    parameter.sub_(gradient, **move)
        slopes.append((values[0] - values[1]) / (2 * step))
    wrong = min(abs(slope / float(norm) - 1) for slope in slopes)
    require(wrong < 0.05, f"it is {float(norm):.3g}, the slope {slopes}")


def checkpointing(architecture: str) -> None:
    """Gradient checkpointing gives the gradients of none, with two forwards before one backward."""
    found = []
    for is_checkpointed in (False, True):
        model = make_flamingo(architecture, gate=1.0).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        inputs = Inputs()
        first = inputs(model).logits
        second = inputs(model, pixel_values=inputs.pixel_values.flip(0), num_frames=inputs.num_frames).logits
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(first.square().mean() + second.square().mean(), trained, allow_unused=True))
    scale = max(float(g.abs().max()) for g in found[0] if g is not None)
    for plain, again in zip(*found, strict=True):
        require((plain is None) == (again is None), "some gradients are missing")
        if plain is not None:
            require(bool((plain - again).abs().max() <= 1e-5 * scale), "other gradients")


@torch.no_grad()
def untouched(architecture: str) -> None:
    """The base LM keeps its keys; it is itself again after eject; it can be saved while blocks are in it."""
    lm = make_lm(architecture).requires_grad_(False)  # as eject leaves it; some take another way when they are frozen
    inputs = Inputs()
    # First: some choose their attention when they run, and transformers adds hooks when hidden states are asked for.
    lm(input_ids=inputs.input_ids)
    base_outputs(lm, inputs)
    expected, keys, before = base_outputs(lm, inputs), list(lm.state_dict()), identity(lm)
    model = make_flamingo(architecture, gate=1.0, lm=lm)
    require(list(lm.state_dict()) == keys, "other state_dict keys")
    with tempfile.TemporaryDirectory() as path:
        lm.save_pretrained(path)
        again = type(lm).from_pretrained(path).eval()
    logits = base_outputs(again, inputs)[0]
    require(difference(logits, expected[0]) < 1e-5, "saved while injected, it comes back different")
    outputs(model, inputs)
    model.eject()
    require(list(lm.state_dict()) == keys, "other state_dict keys after eject")
    require(identity(lm) == before, "other hooks or classes after eject")
    require(same(base_outputs(lm, inputs), expected), "other outputs after eject")


def identity(lm: nn.Module) -> list[object]:
    """Give the classes of all modules, and how many hooks of which class each has."""
    return [
        (type(module), {k: [type(h) for h in v.values()] for k, v in vars(module).items() if k.endswith("_hooks")})
        for module in lm.modules()
    ]


@torch.no_grad()
def copies(architecture: str) -> None:
    """Copies by deepcopy and pickle give the same, and are separate."""
    model = make_flamingo(architecture, gate=1.0)
    inputs = Inputs()
    expected = inputs(model).logits
    file = io.BytesIO()
    pickle.dump(model, file)
    file.seek(0)
    for another in (copy.deepcopy(model), pickle.load(file)):
        randomize(model.injector, 1)
        require(difference(inputs(another).logits, expected) < 1e-5, "a copy differs")


@torch.no_grad()
def saved(architecture: str) -> None:
    """What is saved whole, or as an adapter beside the base LM, is loaded bit for bit, and frozen again."""
    model = make_flamingo(architecture, gate=1.0)
    inputs = Inputs()
    expected = outputs(model, inputs)
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with tempfile.TemporaryDirectory() as path:
        model.save_pretrained(path)
        model.save_adapter(f"{path}/adapter")
        whole = FlamingoForConditionalGeneration.from_pretrained(path)
        adapter = FlamingoForConditionalGeneration.from_adapter(
            f"{path}/adapter",
            language_model=make_lm(architecture),
            vision_encoder=copy.deepcopy(model.vision_encoder),
        )
    for name, loaded in (("checkpoint", whole), ("adapter", adapter)):
        require({n: p.requires_grad for n, p in loaded.named_parameters()} == frozen, f"{name}: another frozen set")
        for (key, tensor), other in zip(all_tensors(model).items(), all_tensors(loaded).values(), strict=True):
            require(torch.equal(tensor, other), f"{name}: other {key}")
        # Tensors that lie otherwise in memory may give other last bits.
        for output, other in zip(outputs(loaded, inputs), expected, strict=True):
            require(difference(output, other) < 1e-5, f"{name}: other outputs")


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, also those that no file holds."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def new_tokens(architecture: str) -> None:
    """New `<image>` and `<EOC>` leave the logits of old tokens as they were, bit for bit; a cached step knows them."""
    model = make_flamingo(architecture, new_tokens=True)
    inputs = Inputs(VOCAB)
    text = inputs.input_ids.where(inputs.input_ids < VOCAB, 70)
    logits = model(text, use_cache=False).logits
    require(logits.shape[-1] == VOCAB + 2, f"logits of {logits.shape[-1]} tokens")
    with_media = inputs(model).logits
    require(not torch.equal(with_media, logits), "new tokens change nothing")
    if model.config.decoding != "none":
        model.generate(inputs.input_ids, **inputs.media, max_new_tokens=2, do_sample=False)
    base = model.eject()(input_ids=text, use_cache=False).logits
    require(torch.equal(logits[..., :VOCAB], base), "other logits of old tokens")


LAWS: dict[str, tuple[str, Callable[[str], str | None]]] = {
    "gate zero": ("logits and all hidden states are the base LM's, bit for bit", gate_zero),
    "bf16": ("the same with a bfloat16 LM and float32 blocks", gate_zero_bfloat16),
    "generation": ("at gate zero, cached greedy generation gives the base LM's ids", generation),
    "open": ("with open gates, the output changes", open_gates),
    "cached": ("with open gates, cached decoding gives the logits of the full forward", cached),
    "causal": ("no token depends on a later medium, nor on another row's", causal),
    "gradient": ("the gradient of all that is trained is the slope of the loss", gradients),
    "checkpointing": (
        "gradient checkpointing changes no gradient, with two forwards before one backward",
        checkpointing,
    ),
    "untouched": ("the base LM's keys stay, it can be saved while injected, and eject restores it", untouched),
    "copies": ("deepcopy and pickle", copies),
    "saved": ("a saved checkpoint and an adapter are loaded bit for bit, and frozen again", saved),
    "new tokens": ("new `<image>` and `<EOC>` leave the logits of old tokens as they were, bit for bit", new_tokens),
}


def check(architecture: str) -> Result:
    """Try every law; say where the blocks stand, and how a law fails."""
    torch.manual_seed(0)
    try:
        make_lm(architecture)(input_ids=torch.full((1, 3), 60), use_cache=False)
    except Exception as error:
        return {"alone": _first_line(error)}
    try:
        model = make_flamingo(architecture)
    except ValueError as error:
        return {"refused": _first_line(error)}
    result: Result = {
        "layers": find_decoder_layers(model.language_model)[0],
        "stream": model.config.residual_stream,
        "laws": {},
    }
    for name, (_, law) in LAWS.items():
        try:
            how = law(architecture)
            result["laws"][name] = how or ""
        except BrokenLawError as error:
            result["laws"][name] = str(error)
        except Exception as error:
            result["laws"][name] = f"{type(error).__name__}: {_first_line(error)}"
    return result


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
