"""What checking a data set costs, against reading and against copying the same files.

    python benchmarks/conversion_speed.py                                   # 8 cases of BraTS' size, 1 and 2 workers
    python benchmarks/conversion_speed.py --output benchmarks/results/conversion_speed.json

Two claims are measured. Full verification takes at most 1.3 times as long as SimpleITK takes to read the same files
with the same number of threads. `--verify header` on a finished data set, where it is the default, takes at most 1.5
times as long as `cp -r` of it. A first conversion that copies is measured beside them. Images are synthetic, with the
number of voxels, the type and about the compressed size of real ones. All files are in the page cache. Each round goes
through all ways in turn; medians are printed, of ratios the median over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from nnunetv2_mstkd.dataset_conversion.cases import Case, find_cases
from nnunetv2_mstkd.dataset_conversion.checks import FULL, HEADER, check_case
from nnunetv2_mstkd.dataset_conversion.conversion import convert
from nnunetv2_mstkd.dataset_conversion.job import Options
from nnunetv2_mstkd.dataset_conversion.releases import RELEASES, SRI24

FULL_LIMIT, HEADER_LIMIT = 1.3, 1.5
RELEASES_MEASURED = ("brats2023_gli", "brats2021")
"""Labels as they are, and labels of which value 4 has to be written as 3."""


def write_release(folder: Path, release: str, cases: int) -> None:
    """Write cases of noise in an ellipsoid with a tumor of three classes."""
    row = RELEASES[release]
    shape = SRI24.size[::-1]
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij"))
    radius = np.sqrt((grid[0] / 0.85) ** 2 + (grid[1] / 0.75) ** 2 + (grid[2] / 0.6) ** 2)
    for number in range(cases):
        generator = np.random.default_rng(number)
        name = row.example[: -len("000")] + f"{number:03d}"
        smooth = gaussian_filter(generator.normal(size=shape).astype(np.float32), 3)
        distance = np.sqrt(((grid - generator.uniform(-0.2, 0.2, (3, 1, 1, 1))) ** 2).sum(0)) + smooth * 0.5
        label = np.zeros(shape, np.uint8)
        for limit, part in ((0.3, "ED"), (0.2, "ET"), (0.12, "NCR")):
            label[(distance < limit) & (radius < 0.95)] = row.classes[part]
        (folder / name).mkdir(parents=True)
        for channel, patterns in enumerate(row.modalities.values()):
            noise = generator.normal(0, 25, shape) + 2000 * smooth + 600 + 100 * channel + 50 * label
            image = np.where(radius < 1, noise.clip(1), 0).astype(np.int16)
            _write(image, folder / name / patterns[0].replace("{case}", name).replace(".nii*", ".nii.gz"))
        _write(label, folder / name / row.label_file.replace("{case}", name))


def _write(array: np.ndarray, path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetOrigin(SRI24.origin)
    sitk.WriteImage(image, str(path), useCompression=True)


def processor() -> str:
    """The processor as the system names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


RATIOS = {
    # of time on the processor: what other programs do at the same time changes it less
    "full verification / SimpleITK, processor time": (
        "verification, full, processor time",
        "SimpleITK reads all files, processor time",
    ),
    "full verification / SimpleITK": ("verification, full", "SimpleITK reads all files"),
    "second run, header / cp -r": ("second run, header", "cp -r of the data set"),
    "first run, header / cp -r": ("conversion with copies, header", "cp -r of the release"),
    "first run, full / SimpleITK and cp -r": ("conversion with copies, full", "SimpleITK and cp -r"),
}


def measure(release: str, source: Path, scratch: Path, workers: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round."""
    raw, target = scratch / "raw", scratch / "raw" / "Dataset001_Speed"
    os.environ["nnUNet_raw"] = str(raw)
    description = RELEASES[release].description()
    cases = find_cases(source, description).cases
    files = [path for case in cases for path in case.files]
    seconds: dict[str, list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def clock(way: str):
        begin, used = time.perf_counter(), time.process_time()
        yield
        seconds[way].append(time.perf_counter() - begin)
        seconds[f"{way}, processor time"].append(time.process_time() - used)

    def run(**options) -> None:
        chosen = Options(workers=workers, write_splits=False, progress=False, **options)
        convert(source, description, target.name, chosen)

    def check(case: Case, level: str) -> list[str]:
        return check_case(case, description, level=level).problems

    def copy(folder: Path, way: str) -> None:
        shutil.rmtree(scratch / "copy", ignore_errors=True)
        with clock(way):
            subprocess.run(["cp", "-r", folder, scratch / "copy"], check=True)

    def read(path: Path) -> list[str]:
        sitk.ReadImage(str(path))
        return []

    passes = (
        ("SimpleITK reads all files", read, files),
        ("verification, full", lambda case: check(case, FULL), cases),
        ("verification, header", lambda case: check(case, HEADER), cases),
    )
    for _ in range(rounds):
        for way, work, things in passes:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(work, things[: len(things) // 4]))  # gets the memory that the rest uses again
                with clock(way):
                    problems = [line for lines in pool.map(work, things) for line in lines]
            assert not problems, problems
        copy(source, "cp -r of the release")
        for level in (FULL, HEADER):
            shutil.rmtree(raw, ignore_errors=True)
            raw.mkdir()
            with clock(f"conversion with copies, {level}"):
                run(verify=level)
        copy(target, "cp -r of the data set")
        with clock("second run, header"):
            run()
    both = zip(seconds["SimpleITK reads all files"], seconds["cp -r of the release"], strict=True)
    seconds["SimpleITK and cp -r"] = [read + copied for read, copied in both]
    return dict(seconds)


def main() -> int:
    """Print and write times and ratios; exit code 1 if a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write the files (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="file for the result, .json")
    args = parser.parse_args()

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for release in RELEASES_MEASURED:
            source = Path(folder, release)
            write_release(source, release, args.cases)
            bytes_per_case = sum(path.stat().st_size for path in source.rglob("*.gz")) / args.cases
            for workers in args.workers:
                (scratch := Path(folder, f"{release}_{workers}")).mkdir()
                found = measure(release, source, scratch, workers, args.rounds)
                times = {way: statistics.median(seconds) for way, seconds in found.items()}
                ratios = {
                    name: statistics.median(one / other for one, other in zip(found[way], found[base], strict=True))
                    for name, (way, base) in RATIOS.items()
                }
                rows.append({"release": release, "workers": workers, "seconds": times, "ratios": ratios})
                print(f"{release}, {workers} workers, {args.cases} cases of {bytes_per_case / 2**20:.1f} MiB")
                print("".join(f"  {value:8.3f} s  {way}\n" for way, value in times.items()), end="")
                print("".join(f"  {value:8.2f}    {name}\n" for name, value in ratios.items()), end="", flush=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "processor": f"{processor()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores used",
        "python": platform.python_version(),
        "SimpleITK": sitk.Version.VersionString(),
        "cases": args.cases,
        "voxels": list(SRI24.size),
        "MiB_per_case": round(bytes_per_case / 2**20, 2),
        "rounds": args.rounds,
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    kept = all(
        row["ratios"]["full verification / SimpleITK"] <= FULL_LIMIT
        and row["ratios"]["second run, header / cp -r"] <= HEADER_LIMIT
        for row in rows
    )
    print("limits kept" if kept else "limits not kept")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
