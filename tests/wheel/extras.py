"""Run where the wheel is installed with all extras that users ask for: import every module, start every command."""

import importlib
import pkgutil
import subprocess
import sys

import flamingo_blocks

for module in pkgutil.walk_packages(flamingo_blocks.__path__, "flamingo_blocks."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in ("accelerate", "av", "lm_eval", "matplotlib", "pyarrow", "selectolax", "sklearn"):
    importlib.import_module(name)
for command in ("flamingo_blocks.convert", "flamingo_blocks.evaluation"):
    subprocess.run([sys.executable, "-I", "-m", command, "--help"], stdout=subprocess.DEVNULL, check=True)
