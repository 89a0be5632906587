"""Write docs/assets/ablations: what examples/ablations.py finds with five seeds.

make ablations

It takes about two hours on two cores and can be stopped: it goes on where it was. Everything is kept in runs/ablations.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNS, ASSETS = ROOT / "runs" / "ablations", ROOT / "docs" / "assets" / "ablations"


def main() -> None:
    """Run what is missing and copy what the documentation shows."""
    script = ROOT / "examples" / "ablations.py"
    subprocess.run([sys.executable, str(script), "--time", "--out", str(RUNS)], check=True)
    ASSETS.mkdir(exist_ok=True)
    for kind in ("*.md", "*.png"):
        for path in RUNS.glob(kind):
            shutil.copy(path, ASSETS / path.name)
    results = [json.loads(line) for line in (RUNS / "results.jsonl").read_text().splitlines()]
    # The gates at the end are enough here; their history is in the picture.
    lines = [json.dumps({**result, "gates": result["gates"][-1:]}) for result in results]
    (ASSETS / "results.jsonl").write_text("\n".join(sorted(lines)) + "\n")


if __name__ == "__main__":
    main()
