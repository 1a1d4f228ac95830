"""Running nnU-Net's own commands with a log file and a progress bar, each finished step once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.images.atomic import scratch_file
from nnunetv2_mstkd.processes import command_path

BAR = "{desc:<26}{percentage:3.0f}%|{bar:30}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"


class State:
    """``demo.json`` in the output folder: the options of this demo, and which steps are done.

    Parameters
    ----------
    folder:
        output folder, created here.
    options:
        everything that the result depends on.

    Raises
    ------
    ValueError
        if the folder holds a demo with other options.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self.file = folder / "demo.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.content: dict[str, Any] = {"options": dict(options), "seconds": {}}
        if self.file.is_file():
            stored = json.loads(self.file.read_text())
            different = [key for key in options if stored["options"].get(key) != options[key]]
            if different:
                listed = ", ".join(f"{key} {stored['options'].get(key)} (now {options[key]})" for key in different)
                raise InputError(
                    f"{folder} holds a demo with other options: {listed}. Repeat those options to continue it, or "
                    f"choose another folder with --out"
                )
            self.content = stored
        elif any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no demo; choose another folder with --out")
        self.save()

    def save(self) -> None:
        with scratch_file(self.file) as scratch:
            scratch.write_text(json.dumps(self.content, indent=2))

    def done(self, step: str) -> bool:
        return step in self.content["seconds"]

    def finish(self, step: str, seconds: float) -> None:
        self.content["seconds"][step] = round(seconds, 1)
        self.save()


def environment(folder: Path, *, threads_for_preprocessing: bool, data_workers: int | None) -> dict[str, str]:
    """Environment of nnU-Net's commands: all paths inside ``folder``, our trainers found, a small machine."""
    from nnunetv2_mstkd.nnunet.registration import EXTERNAL_TRAINERS, TRAINER_PATH

    variables = dict(os.environ)
    for name, sub in (("nnUNet_raw", "raw"), ("nnUNet_preprocessed", "preprocessed"), ("nnUNet_results", "results")):
        variables[name] = str(folder / sub)
        (folder / sub).mkdir(exist_ok=True)
    variables[EXTERNAL_TRAINERS] = TRAINER_PATH
    # one thread each for planning and training; at prediction the same variable would limit torch
    variables.pop("nnUNet_def_n_proc", None)
    variables.pop("nnUNet_n_proc_DA", None)
    if threads_for_preprocessing:
        variables["nnUNet_def_n_proc"] = "1"
    if data_workers is not None:
        variables["nnUNet_n_proc_DA"] = str(data_workers)
    # waiting threads sleep instead of spinning: on a machine that does something else too, several times faster
    variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    variables["PYTHONUNBUFFERED"] = "1"
    variables["TQDM_DISABLE"] = "1"
    return variables


def run(
    arguments: Sequence[str],
    *,
    log: Path,
    variables: Mapping[str, str],
    title: str,
    total: int,
    tick: str,
    first: int = 0,
) -> None:
    """Run a command; its output goes to ``log``, each line that matches ``tick`` moves the bar by one.

    Raises
    ------
    ValueError
        if the command fails; the message holds its last line and where the log is.
    """
    log.parent.mkdir(exist_ok=True)
    pattern = re.compile(tick)
    last = ""
    with (
        log.open("a", encoding="utf-8") as file,
        tqdm(total=total, initial=first, desc=title, bar_format=BAR, file=sys.stderr) as bar,
        subprocess.Popen(
            [command_path(arguments[0]), *arguments[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=dict(variables),
        ) as process,
    ):
        file.write("$ " + " ".join(arguments) + "\n")
        try:
            for line in process.stdout or ():
                file.write(line)
                last = line.strip() or last
                if pattern.search(line) and bar.n < total:
                    bar.update(1)
        except BaseException:
            process.terminate()
            raise
        code = process.wait()
        if code == 0:
            bar.update(total - bar.n)
    if code != 0:
        raise InputError(f"{arguments[0]} stopped with exit code {code}: {last} (whole output in {log})")


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start
