"""Log and picture of the loss terms, beside nnU-Net's own progress.png."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

PREFIX = "mstkd_"


class TermLog:
    """Values by name and epoch, kept in nnU-Net's logger (and with it in checkpoints and Weights & Biases).

    ``progress_terms.png`` is drawn into ``folder``.
    """

    def __init__(self, logger, folder: str) -> None:
        self._logger = logger
        self._folder = folder

    @property
    def _lists(self) -> dict[str, list]:
        return self._logger.local_logger.my_fantastic_logging

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Log one value per name for ``epoch``; a name that appears late is padded with NaN."""
        for name, value in values.items():
            history = self._lists.setdefault(PREFIX + name, [])
            history.extend([math.nan] * (epoch - len(history)))
            self._logger.log(PREFIX + name, float(value), epoch)

    def history(self) -> dict[str, list[float]]:
        """All values so far by name, without the prefix."""
        return {key[len(PREFIX) :]: list(values) for key, values in self._lists.items() if key.startswith(PREFIX)}

    def plot(self, epoch: int) -> None:
        """Draw the picture, up to ``epoch``.

        nnU-Net's own plot stops at the shortest list, so a name without a value for ``epoch`` gets NaN here.
        """
        for key, values in self._lists.items():
            if key.startswith(PREFIX):
                values.extend([math.nan] * (epoch + 1 - len(values)))
        if history := self.history():
            self.draw(history)

    def draw(self, history: Mapping[str, list[float]]) -> None:
        """Draw one small panel per name."""
        columns = min(3, len(history))
        rows = math.ceil(len(history) / columns)
        width, height = 4.2 * columns, 2.8 * rows
        # a figure of its own: pyplot would keep global state, and nnU-Net's seaborn style is for much larger ones
        style = {"font.size": 9, "axes.titlesize": 9, "axes.grid": True, "grid.color": "0.9"}
        with matplotlib.style.context(["default", style]):
            figure = Figure(figsize=(width, height))
            # in inches; tight_layout would draw all twice in every epoch
            margins = {"left": 0.6 / width, "right": 1 - 0.15 / width, "bottom": 0.5 / height, "top": 1 - 0.3 / height}
            axes = [figure.add_subplot(rows, columns, number + 1) for number in range(len(history))]
            figure.subplots_adjust(**margins, wspace=0.22, hspace=0.45)
            for axis, (name, values) in zip(axes, history.items(), strict=True):
                axis.plot(range(len(values)), values, color="tab:blue", marker="." if len(values) < 30 else None)
                axis.set_title(name.replace("_", " "))
                axis.set_xlabel("epoch")
            figure.savefig(Path(self._folder) / "progress_terms.png", dpi=90)
