"""Does a trained network read its transformer? Evaluates a model as it is and with the transformer's maps cut out.

    python benchmarks/transformer_use.py MODEL_FOLDER --images imagesTs --labels labelsTs --out FOLDER -device cpu

The second model is a copy whose projections read nothing of the multi-scale maps: what the decoder gets of them is zero
in every position. Result in `transformer_use.json` of the folder: mean Dice by number of modalities, and per case.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROJECTIONS = "transformer.projections."
OUTPUT = "transformer_use.json"


def without_transformer(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of MST-KDNet's network, in either placement, of which nothing reads the multi-scale maps any more.

    Raises
    ------
    ValueError
        if there is no transformer in them.
    """
    if not any(name.startswith(PROJECTIONS) for name in weights):
        raise ValueError("the weights have no transformer; name a model of MSTKDTrainer or MSTKDTeacherTrainer")
    changed = {name: value.clone() for name, value in weights.items()}
    for name, value in changed.items():
        if name.startswith(PROJECTIONS) and name.endswith(".weight"):
            width, joined = value.shape[:2]
            if joined == 2 * width:  # of the skip connection and of the map
                value[:, width:] = 0
            else:
                value.zero_()
                changed[name.replace(".weight", ".bias")].zero_()
    return changed


def cut(model: Path, fold: str, target: Path) -> Path:
    """Copy one fold of a model without its transformer."""
    from nnunetv2_mstkd.nnunet import checkpoints
    from nnunetv2_mstkd.nnunet.folders import FINAL

    folder = target / model.name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / f"fold_{fold}").mkdir(parents=True)
    for file in model.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    content = checkpoints.read(model / f"fold_{fold}" / FINAL)
    content["network_weights"] = without_transformer(content["network_weights"])
    checkpoints.write(content, folder / f"fold_{fold}" / FINAL)
    return folder


def means(results: Any) -> dict[str, float]:
    """Mean Dice in percent over cases, regions and subsets, by number of modalities and of all."""
    dice = results[results["metric"] == "dice"]
    by_size = dice.groupby("modalities")["value"].mean()
    return {**{str(size): 100 * float(value) for size, value in by_size.items()}, "all": 100 * dice["value"].mean()}


def main() -> None:
    """Cut, evaluate both, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-f", "--fold", default="0")
    parser.add_argument("--images", required=True)
    parser.add_argument("--labels", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args()
    from nnunetv2_mstkd.evaluation.results import read_results

    found: dict[str, Any] = {"model": args.model.name}
    for name, model in (("whole", args.model), ("cut", cut(args.model, args.fold, args.out / "model"))):
        folder = args.out / name
        command = ["mstkd", "evaluate", "-m", str(model), "-f", args.fold, "-i", args.images, "-l", args.labels]
        command += ["-o", str(folder), "-device", args.device, "--disable_tta", "--disable_progress_bar"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        results = read_results(folder / "results.csv")
        dice = results[results["metric"] == "dice"]
        cases = {case: round(float(value), 6) for case, value in dice.groupby("case")["value"].mean().items()}
        found[name] = {"dice": means(results), "cases": cases}
        print(f"{name:6s}" + "  ".join(f"{key}: {value:.2f}" for key, value in found[name]["dice"].items()))
    (args.out / OUTPUT).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
