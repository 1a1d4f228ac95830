"""Missing-modality segmentation for nnU-Net v2.

The Python API is loaded when it is first used: this module is imported at every interpreter start of an environment
that has the package installed (see :mod:`nnunetv2_mstkd.nnunet.registration`), so it must import nothing expensive.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing's own would import typing
if TYPE_CHECKING:
    from nnunetv2_mstkd.inference.predictor import Prediction, Predictor
    from nnunetv2_mstkd.reporting.compare import compare
    from nnunetv2_mstkd.reporting.evaluate import evaluate

_API = {
    "Predictor": "nnunetv2_mstkd.inference.predictor",
    "Prediction": "nnunetv2_mstkd.inference.predictor",
    "evaluate": "nnunetv2_mstkd.reporting.evaluate",
    "compare": "nnunetv2_mstkd.reporting.compare",
}
"""Name -> the module that defines it."""

__all__ = ["Prediction", "Predictor", "__version__", "compare", "evaluate"]


def __getattr__(name: str) -> object:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_API[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
