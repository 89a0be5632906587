"""Try `VisionEncoder` on every timm model, and write docs/coverage/vision_encoders.md.

    make coverage

Layouts and sizes are found without computation for all of them; the smallest model of each module then encodes images.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm

from flamingo_blocks import vision
from tests.coverage import vision_checks
from tests.coverage.sweep import DOCS, Result, sweep, table, versions, write_page
from tests.coverage.vision_checks import PLACES, SIZE, TRIALS, check_forward, check_layout, module_of

SOURCES = [Path(vision_checks.__file__), Path(vision.__file__)]
# Networks that mix places while their weights are random: why, and what `PREPARATIONS` alters.
EXCEPTIONS = {
    "convmixer": (
        "32 random kernels, 9 cells wide and one after another, spread a change over the image",
        "kernels that decay from their centre",
    ),
    "metaformer": (
        "Averages over fewer neighbours at the border draw changes there, layer after layer",
        "averages that count the padding",
    ),
    "coat": (
        "Convolutions see zeros beyond the border, and tokens there change more than others",
        "convolutions that wrap around",
    ),
}


def main() -> None:
    names = timm.list_models()
    layouts = sweep(check_layout, names, store="vision_layouts", sources=SOURCES)
    modules = defaultdict(list)
    for name in names:
        modules[module_of(name)].append(name)
    found = {name for name in names if "error" not in layouts[name]}
    smallest = {
        module: min(found.intersection(members), key=lambda name: (layouts[name]["parameters"], name))
        for module, members in sorted(modules.items())
        if found.intersection(members)
    }
    forwards = sweep(check_forward, list(smallest.values()), store="vision_forwards", sources=SOURCES)
    write_page(DOCS / "vision_encoders.md", page(layouts, modules, smallest, forwards))


def page(
    layouts: dict[str, Result], modules: dict[str, list[str]], smallest: dict[str, str], forwards: dict[str, Result]
) -> str:
    found = {name: result for name, result in layouts.items() if "error" not in result}
    sizes = Counter(result["at_320"] for result in found.values())
    local = Counter(verdict(result) for result in forwards.values() if "error" not in result)
    frozen = sum(all(result["frozen"].values()) for result in forwards.values() if "error" not in result)
    return f"""# Vision encoders

`VisionEncoder` tried on every model of timm, by `make coverage`, which wrote this page with
{", ".join(f"{name} {version}" for name, version in versions().items())}. Look up the module that your model is in; any
architecture of that module is made by `VisionEncoder.from_timm(name)`.

- **Layout**, all {len(layouts)} models, without computation: where the tokens are in the result. Found for
  **{len(found)}**.
- **{SIZE} x {SIZE}**, all models, without computation: {sizes["as it is"]} take such images as they are,
  {sizes["built for it"]} are built for them, and {sizes["refused"]} refuse them; [below](#sizes) is what these take.
- **Locality**, the smallest model of each of the {len(modules)} modules, with random weights: change {len(PLACES)}
  places of an image, one at a time. The token that changes most must be the one at that place, or its neighbour; where
  one draw of weights leaves that open, the mean of {TRIALS[-1][0]} draws decides. For **{local["exact"]}** it always
  was the very token, for **{local["neighbour"]}** sometimes a neighbour; {local["exception"]}
  [need a word](#exceptions), and {local["no"]} fail.
- **Frozen**, the same models: in training mode no parameter and no buffer moves, no gradient reaches them or the image,
  and tokens have the dtype asked for. True for **{frozen}**.

Random weights do for these checks: they are about shapes and places, not about what a model has learnt.

## Modules

{module_table(layouts, modules, smallest, forwards)}

- *Layouts*: a map has channels first (NCHW) or last (NHWC). Tokens may have class or register tokens in front (prefix),
  or stand behind the channels (NCL). An intermediate map is taken where the result has class tokens alone.
- *{SIZE} x {SIZE}*: as they are / built for it / refused.
- *Patches x dim*: for images of {SIZE} x {SIZE}, unless another size is named. "As at": no more patches than at the
  size that the model was made for. It scales images or maps, or its strides give the same grid for both.
- *Locality*: of {len(PLACES)} places, how often the token itself changed most / its neighbour.

## Exceptions

In some networks a change spreads, or gathers at the border, while the weights are random. One alteration of the network
shows that this is the cause, and that the tokens are where they should be: with it, the token that changes most is the
right one or its neighbour.

{exception_table(smallest, forwards)}

## Sizes

Models that refuse {SIZE} x {SIZE}, and what they take instead: the size they were made for, and the nearest. Where
patches do not fill the image, timm may leave out a border without a word; `VisionEncoder` refuses.

{size_table(found)}

## Failures

{failure_table({**layouts, **{name: result for name, result in forwards.items() if "error" in result}})}
"""


def verdict(result: Result) -> str:
    if max(result["distances"]) <= 1:
        return "neighbour" if any(result["distances"]) else "exact"
    return "exception" if max(result.get("distances_prepared", [2])) <= 1 else "no"


def module_table(
    layouts: dict[str, Result], modules: dict[str, list[str]], smallest: dict[str, str], forwards: dict[str, Result]
) -> str:
    rows = []
    for module, members in sorted(modules.items()):
        found = [layouts[name] for name in members if "error" not in layouts[name]]
        kinds = Counter(describe(result["layout"]) for result in found)
        sizes = Counter(result["at_320"] for result in found)
        name = smallest.get(module, "")
        rows.append(
            (
                module,
                f"{len(found)}/{len(members)}",
                "; ".join(kind for kind, _ in kinds.most_common()),
                " / ".join(str(sizes[how]) for how in ("as it is", "built for it", "refused")),
                name and f"`{name}`",
                *forward_cells(forwards.get(name, {"error": ""}), layouts.get(name, {})),
            )
        )
    header = ("module", "layout found", "layouts", "320 x 320", "smallest model", "patches x dim", "locality", "frozen")
    return table(header, rows)


def forward_cells(result: Result, native: Result) -> tuple[str, str, str]:
    if "error" in result:
        return ("", "failed", "failed")
    height, width = result["image_size"]
    at = "" if (height, width) == (SIZE, SIZE) else f" at {height} x {width}"
    if (height, width) != tuple(native["native"]) and result["patches"] == native["layout"]["patches"]:
        at += f", as at {' x '.join(map(str, native['native']))}"
    near: Counter[int] = Counter(result["distances"])
    locality = {
        "exception": "[exception](#exceptions)",
        "no": f"no: {', '.join(map(str, result['distances']))} tokens off",
    }.get(verdict(result), f"{near[0]} / {near[1]}")
    broken = [promise for promise, holds in result["frozen"].items() if not holds]
    return (f"{result['patches']} x {result['dim']}{at}", locality, f"no: {', '.join(broken)}" if broken else "yes")


def describe(layout: dict[str, Any]) -> str:
    if layout["method"] == "forward_intermediates":
        return "intermediate map"
    if layout["axes"] in ("NCHW", "NHWC"):
        return f"map {layout['axes']}"
    prefix = f", {layout['prefix_tokens']} prefix" if layout["prefix_tokens"] else ""
    return f"tokens{' NCL' if layout['axes'] == 'NCL' else ''}{prefix}"


def exception_table(smallest: dict[str, str], forwards: dict[str, Result]) -> str:
    rows = []
    for module, (cause, remedy) in EXCEPTIONS.items():
        result = forwards.get(smallest.get(module, ""), {})
        if "distances_prepared" in result:
            off = (", ".join(map(str, result[key])) for key in ("distances", "distances_prepared"))
            rows.append((module, *off, cause, remedy))
    return table(("module", "tokens off", "with the alteration", "cause", "alteration"), rows) if rows else "None."


def size_table(found: dict[str, Result]) -> str:
    groups = defaultdict(list)
    for name, result in found.items():
        if result["at_320"] == "refused":
            match = re.fullmatch(
                r"\S+ does not take images of \S+; it takes ([^:]*)(?:: .*)?", result["refusal"], re.DOTALL
            )
            groups[match[1] if match else result["refusal"]].append(name)
    rows = [(taken, len(members), code(members)) for taken, members in sorted(groups.items())]
    return table(("takes", "models", "which"), rows) if rows else "None."


def failure_table(results: dict[str, Result]) -> str:
    rows = [(f"`{name}`", result["error"]) for name, result in results.items() if "error" in result]
    return table(("model", "error"), rows) if rows else "None."


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    main()
