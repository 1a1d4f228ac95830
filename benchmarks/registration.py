"""What the registration adds to each start of Python: starts with and without the start-up file, in turn.

Two environments without packages hold copies of what a start imports; one has ``nnunetv2_mstkd.pth``, the other has
not. A second figure times that file's line alone, inside a fresh interpreter. Needs an installed nnunetv2_mstkd:

    python benchmarks/registration.py [--pairs 200]
"""

from __future__ import annotations

import argparse
import compileall
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import venv
from importlib.metadata import distribution
from pathlib import Path

import nnunetv2_mstkd

PTH = "nnunetv2_mstkd.pth"


def environment(folder: Path, pth: Path | None) -> Path:
    """Make an environment in `folder` with the modules that a start imports, and `pth`; return its interpreter."""
    venv.create(folder, symlinks=os.name != "nt")
    site_packages = next(folder.rglob("site-packages"))
    package = Path(nnunetv2_mstkd.__file__).parent
    for module in ("__init__.py", "nnunet/__init__.py", "nnunet/registration.py"):
        copy = site_packages / package.name / module
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(package / module, copy)
    compileall.compile_dir(site_packages, quiet=1)  # as pip does
    if pth is not None:
        shutil.copy(pth, site_packages)
    return next(path for path in folder.glob("*/python*") if path.stem == "python")


def start(python: Path) -> float:
    """Return the milliseconds from starting an interpreter to its end."""
    begin = time.perf_counter()
    subprocess.run([python, "-c", "pass"], check=True)
    return 1e3 * (time.perf_counter() - begin)


def line_alone(python: Path, line: str) -> float:
    """Return the milliseconds that `line` takes in a fresh interpreter."""
    code = f"from time import perf_counter as t; b = t(); exec({line!r}); print(1e3 * (t() - b))"
    return float(subprocess.run([python, "-I", "-c", code], check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print medians and quartiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200, help="paired starts (default: %(default)s)")
    pairs = parser.parse_args().pairs

    os.environ.pop("MSTKD_AUTOLOAD", None)
    pth = Path(str(distribution("nnunetv2_mstkd").locate_file(PTH)))
    with tempfile.TemporaryDirectory() as scratch:
        with_it = environment(Path(scratch, "with"), pth)
        without = environment(Path(scratch, "without"), None)
        times = [(start(with_it), start(without)) for _ in range(pairs)]
        alone = [line_alone(without, pth.read_text(encoding="utf-8")) for _ in range(pairs)]

    for name, values in (
        ("start with the registration", [a for a, _ in times]),
        ("start without", [b for _, b in times]),
        ("difference within a pair", [a - b for a, b in times]),
        ("its line alone", alone),
    ):
        low, median, high = statistics.quantiles(values, n=4)
        print(f"{name:28s} median {median:7.3f} ms   quartiles {low:7.3f} to {high:7.3f} ms   n = {pairs}")


if __name__ == "__main__":
    main()
