import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# Tests of laws draw tensors from a seed: how long an example takes says nothing about it.
settings.register_profile("default", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.register_profile("long", settings.get_profile("default"), max_examples=2000)
# For a bug a second: few examples, always the same ones, and none is made smaller.
settings.register_profile(
    "mutation",
    settings.get_profile("ci"),
    max_examples=20,
    database=None,
    phases=(Phase.explicit, Phase.generate),
)
# The models are tiny: one thread is faster than several, and does not wait for cores that others use.
torch.set_num_threads(1)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "default"))


LONG_PAGES = (
    "evaluation.md",
    "fine_tuning.md",
    "lora_and_quantised.md",
    "other_modalities.md",
    "training.md",
    "whole_model.md",
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the tests out that need other implementations, unless they are asked for: `make parity` installs them."""
    if collection_path != Path(__file__).parent / "parity":
        return None
    asked_for = [Path(argument.partition("::")[0]).absolute() for argument in config.args]
    return None if any(path.is_relative_to(collection_path) for path in asked_for) else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Try the longest pages with the slow tests: each of their pieces of code runs all pieces before it again."""
    for item in items:
        if item.path.name in LONG_PAGES:
            item.add_marker(pytest.mark.slow)
