"""Draw docs/assets/media_ranges.svg: which media a token sees, under each rule. Run from the project's root."""

from pathlib import Path
from typing import get_args

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap

from flamingo_blocks import media_ranges
from flamingo_blocks.blocks import Attend, dense_media_mask

TOKENS = ["<bos>", "<image>", "a", "cat", "<image>", "two", "dogs", "<image>", "a", "fish"]


def main() -> None:
    is_image = torch.tensor([[token == "<image>" for token in TOKENS]])
    rules = get_args(Attend)
    figure, axes = plt.subplots(len(rules), 1, figsize=(7, 4.2), sharex=True, layout="constrained")
    for axis, rule in zip(axes, rules, strict=True):
        mask = dense_media_mask(media_ranges(is_image, attend=rule), int(is_image.sum()))
        axis.pcolormesh(mask[0].T.flip(0), cmap=ListedColormap(["#f0e8ee", "#d81b60"]), edgecolors="white", linewidth=2)
        axis.set(yticks=[0.5, 1.5, 2.5], yticklabels=["medium 2", "medium 1", "medium 0"])
        axis.set_title(f'attend="{rule}"', loc="left", fontsize=10)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[-1].set(xticks=[i + 0.5 for i in range(len(TOKENS))], xticklabels=TOKENS)
    plt.rcParams["svg.hashsalt"] = "flamingo-blocks"
    figure.savefig(Path("docs/assets/media_ranges.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
