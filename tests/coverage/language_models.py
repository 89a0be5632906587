"""Prove the promise of any decoder: every causal language model of transformers, tiny, through every law.

    make coverage

Writes docs/coverage/language_models.md. Some by name: `python -m tests.coverage.language_models LlamaForCausalLM`.
"""

import sys

from tests.coverage.language_checks import LAWS, OPTIONS, UNCACHED, check
from tests.coverage.sweep import DOCS, ROOT, Result, sweep, table, versions, write_page
from tests.coverage.tiny_configs import architectures

# Why a law does not hold. Everything else that fails is a defect, and ends the sweep with an error.
CAUSES: dict[tuple[str, str], str] = {
    ("InklingForCausalLM", "new tokens"): "it cuts its logits to its tokenizer's vocabulary; build_flamingo says so",
    ("MusicgenForCausalLM", "generation"): "it generates by its own generate(); ours says so",
    ("MusicgenMelodyForCausalLM", "generation"): "it generates by its own generate(); ours says so",
    ("MusicgenForCausalLM", "cached"): "it generates by its own generate(); ours says so",
    ("MusicgenMelodyForCausalLM", "cached"): "it generates by its own generate(); ours says so",
    ("MusicgenForCausalLM", "new tokens"): "it has a head for each audio codebook; build_flamingo says so",
    ("MusicgenMelodyForCausalLM", "new tokens"): "it has a head for each audio codebook; build_flamingo says so",
    ("ProphetNetForCausalLM", "causal"): "its own masks let later tokens through a little",
    ("ProphetNetForCausalLM", "generation"): "later tokens change its logits by 1%, as above; generate says so",
    ("ProphetNetForCausalLM", "cached"): "later tokens change its logits by 1%, as above; generate says so",
    ("XLMWithLMHeadModel", "generation"): "its generate predicts a mask token, its forward the next; ours says so",
    ("XLMWithLMHeadModel", "cached"): "its generate predicts a mask token, its forward the next; ours says so",
    ("ReformerModelWithLMHead", "gradient"): "its own reversible backward gives blocks no gradient; backward says so",
    ("ReformerModelWithLMHead", "checkpointing"): "as for the gradient",
}


def page(results: dict[str, Result]) -> str:
    """Write up what came out."""
    joined = {name: result for name, result in results.items() if "laws" in result}
    counts = []
    for law, (meaning, _) in LAWS.items():
        held = sum(result["laws"][law] == "" for result in joined.values())
        uncached = sum(result["laws"][law] == UNCACHED for result in joined.values())
        note = f", {uncached} without the cache" if uncached else ""
        counts.append(f"- **{law}**: {meaning}. {held} of {len(joined)}{note}.")
    refused = [(f"`{name}`", result["refused"]) for name, result in results.items() if "refused" in result]
    alone = [(f"`{name}`", result["alone"]) for name, result in results.items() if "alone" in result]
    exceptions = [
        (f"`{name}`", law, how, CAUSES.get((name, law), ""))
        for name, result in joined.items()
        for law, how in result["laws"].items()
        if how not in ("", UNCACHED)
    ]
    exceptions += [(f"`{name}`", "all", result["error"], "") for name, result in results.items() if "error" in result]
    uncached = [f"`{name}`" for name, result in joined.items() if UNCACHED in result["laws"].values()]
    rows = [
        (f"`{name}`", f"`{result['layers']}`", *(_cell(how) for how in result["laws"].values()))
        for name, result in joined.items()
    ]
    streams = [
        (f"`{name}`", f"`{result['stream']}`")
        for name, result in joined.items()
        if result["stream"] != "batch text dim"
    ]
    options = [(f"`{name}`", f"`{options}`") for name, options in OPTIONS.items()]
    return (
        "\n\n".join(
            [
                "# Language models",
                f"`build_flamingo` tried on all {len(results)} classes of causal language models in transformers, by "
                f"`make coverage`, which wrote this page with {', '.join(f'{k} {v}' for k, v in versions().items())}. "
                "Each is tiny and has random weights: the laws are about structure. Look up the class of your model, "
                "`type(AutoModelForCausalLM.from_pretrained(...))`.",
                f"A Flamingo is built around **{len(joined)}** of them; [{len(refused)} are refused](#refused), and "
                f"{len(alone)} cannot run by themselves. What is checked:",
                "\n".join(counts),
                "## All classes",
                "\u2713: the law holds. off: the class's own cache gives other logits than the whole text, so "
                "`build_flamingo` notices, text is generated without a cache, and asking for one is an error. no: see "
                "[the exceptions](#exceptions).",
                table(("class", "decoder layers", *LAWS), rows),
                "## Exceptions",
                table(("class", "law", "what happens", "cause"), exceptions),
                f"Generated without a cache: {', '.join(uncached)}.",
                "## Refused",
                table(("class", "what `build_flamingo` says"), refused),
                "Drafters for other models, which do not run on text alone:",
                table(("class", "what it says"), alone),
                "## Residual streams",
                "Where hidden states are not (batch, text, dim). A block reads the mean of the streams, and "
                "what it adds is added to each:",
                table(("class", "layout"), streams),
                "What these need to be told, because text alone skips some of their layers:",
                table(("class", "options of `build_flamingo`"), options),
            ]
        )
        + "\n"
    )


def _cell(how: str) -> str:
    return {"": "\u2713", UNCACHED: "off"}.get(how, "no")


def main() -> None:
    """Check all architectures and write the page, or check only those named."""
    if names := sys.argv[1:]:
        for name in names:
            print(name, check(name))
        return
    library = [path for path in (ROOT / "flamingo_blocks").rglob("*.py") if path.name != "vision.py"]
    laws = [ROOT / "tests" / "coverage" / name for name in ("language_checks.py", "tiny_configs.py")]
    results = sweep(check, architectures(), store="language_models", sources=[*library, *laws])
    write_page(DOCS / "language_models.md", page(results))
    unknown = [
        f"{name}, {law}: {how}"
        for name, result in results.items()
        for law, how in (result.get("laws") or {"check": result.get("error", "")}).items()
        if how not in ("", UNCACHED) and (name, law) not in CAUSES
    ]
    if unknown:
        sys.exit("\n".join(["without a known cause:", *unknown]))


if __name__ == "__main__":
    main()
