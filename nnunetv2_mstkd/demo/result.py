"""The result of the demo: the comparison of its models, a picture, and the next commands."""

from __future__ import annotations

import shlex
from importlib.util import find_spec

from nnunetv2_mstkd.demo.pipeline import DISCLAIMER, RECOMMENDED, Demo, Model
from nnunetv2_mstkd.demo.steps import FOLDERS
from nnunetv2_mstkd.inference.evaluation_files import COMPARISON, REPORT
from nnunetv2_mstkd.reporting import figures
from nnunetv2_mstkd.reporting.compare import compare, models_by_subset

APP = "    # first: pip install 'nnunetv2_mstkd[app]'"


def write_result(demo: Demo) -> str:
    """Compare the evaluated models, write the comparison and a heat map, and return the text to print."""
    output = demo.folder / "comparison"
    models = {model.title: demo.evaluation(model) for model in demo.models}
    comparison = compare(models, baseline=demo.models[0].title, hours=demo.hours(), output=output)
    figure = figures.heat_map(comparison.results)
    figure.supxlabel(DISCLAIMER, fontsize=8, color="0.4")
    figures.save_figure(figure, output / "heat_map.png", dpi=110)
    files = {"open in a browser": output / COMPARISON}
    files |= {f"report of {model.trainer}": demo.evaluation(model) / REPORT for model in demo.models}
    width = max(map(len, files)) + 2
    return "\n".join(
        [
            models_by_subset(comparison, "dice"),
            f"\n{demo.continued()}\n{DISCLAIMER}",
            f"total computing time: {sum(demo.record['seconds'].values()) / 60:.1f} minutes\n",
            *(f"{what + ':':<{width}}{path}" for what, path in files.items()),
            "\nnext, predict without T1ce, or drop images into a page:\n",
            *next_commands(demo),
        ]
    )


def next_commands(demo: Demo) -> list[str]:
    """Commands to try on the recommended trainer's model."""
    folders = " ".join(f"{name}={shlex.quote(str(demo.folder / sub))}" for name, sub in FOLDERS.items())
    images, output = (shlex.quote(str(path)) for path in (demo.raw / "imagesTs", demo.folder / "without_T1ce"))
    return [
        f"  export {folders}",
        f"  mstkd predict -i {images} -o {output} {demo.words(Model(RECOMMENDED))} --drop T1ce",
        f"  mstkd app --demo --out {shlex.quote(str(demo.folder))}{'' if find_spec('starlette') else APP}",
    ]
