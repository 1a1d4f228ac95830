"""Opening plans of others: what they name is checked before nnU-Net imports and calls it.

A plans.json is code. nnU-Net looks up a network, its layers, an image reader, a preprocessor, normalisations and
resampling functions by the names in it, in whatever module has an attribute of that name, and calls what it finds with
arguments from the file: ``"nonlin": "logging.basicConfig"`` empties a file.
"""

from __future__ import annotations

import contextlib
import inspect
import pydoc
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dynamic_network_architectures
import nnunetv2
import torch
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.nnunet.folders import check_file_name

NETWORK_PACKAGE = "dynamic_network_architectures.architectures"
LAYER_PACKAGES = ("torch.nn", "dynamic_network_architectures")
"""Where the classes that plans name may be defined."""

RESAMPLING = "nnunetv2.preprocessing.resampling"
RESAMPLING_KEYS = ("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities")
CLASSES: Mapping[str, tuple[str, type]] = {
    "image_reader_writer": ("nnunetv2.imageio", BaseReaderWriter),
    "label_manager": ("nnunetv2.utilities.label_handling", LabelManager),
    "preprocessor_name": ("nnunetv2.preprocessing", DefaultPreprocessor),
    "normalization_schemes": ("nnunetv2.preprocessing.normalization", ImageNormalization),
}
"""Key of the plans -> where nnU-Net looks for the class, and what the class must be."""

PLANS_KEYS = ("dataset_name", "plans_name", "image_reader_writer", "transpose_forward", "transpose_backward")
CONFIGURATION_KEYS = (
    "data_identifier", "preprocessor_name", "batch_size", "patch_size", "spacing", "normalization_schemes",
    "use_mask_for_norm", "architecture", *RESAMPLING_KEYS, *(f"{key}_kwargs" for key in RESAMPLING_KEYS),
)  # fmt: skip
ARCHITECTURE_KEYS = ("network_class_name", "arch_kwargs", "_kw_requires_import")


def open_plans(
    plans: Mapping[str, Any], name: str, source: str, hint: str = ""
) -> tuple[PlansManager, ConfigurationManager]:
    """Open the configuration ``name`` of plans, after checking everything in it that nnU-Net would import or call.

    ``source`` says where the plans were read and ``hint`` what to do about a name that is refused, both for the message
    of the InputError.
    """
    manager, configuration = _complete(plans, name, source)
    check_file_name(manager.dataset_name, f"dataset_name in {source}")
    check_file_name(manager.plans_name, f"plans_name in {source}")
    check_file_name(configuration.data_identifier, f"data_identifier in {source}")
    _check_grid(configuration, source)
    named = [(key, manager.plans[key]) for key in ("image_reader_writer", "label_manager") if key in manager.plans]
    named.append(("preprocessor_name", configuration.preprocessor_name))
    named += [("normalization_schemes", scheme) for scheme in configuration.normalization_schemes]
    for key, value in named:
        find_class(key, value, source, hint)
    for key in RESAMPLING_KEYS:
        name = configuration.configuration[key]
        found = _find(name, RESAMPLING)
        fits = inspect.isfunction(found) and list(inspect.signature(found).parameters)[:2] == ["data", "new_shape"]
        refusal = f"{source} names {name!r} as {key}, expected a resampling function of {RESAMPLING}"
        _accept(found, fits, (RESAMPLING,), refusal, hint)
    check_architecture(configuration, source, hint)
    return manager, configuration


def _complete(plans: Mapping[str, Any], name: str, source: str) -> tuple[PlansManager, ConfigurationManager]:
    """nnU-Net's view of plans that have all the keys it needs."""
    try:
        manager = PlansManager(dict(plans))
        configuration = manager.get_configuration(name)
        content = configuration.configuration
        tables = (
            (manager.plans, PLANS_KEYS), (content, CONFIGURATION_KEYS), (content["architecture"], ARCHITECTURE_KEYS),
        )  # fmt: skip
        for table, keys in tables:
            for key in keys:
                table[key]
    except KeyError as error:
        raise InputError(f"{source} has no {error}, so it holds no complete plans of nnU-Net v2") from error
    except (TypeError, AttributeError, RuntimeError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{source} holds no plans of nnU-Net v2 ({type(error).__name__}: {text})") from error
    return manager, configuration


def find_class(key: str, name: Any, source: str, hint: str = "") -> type:
    """Return the class that nnU-Net finds for a key of :data:`CLASSES`; InputError for anything else of that name."""
    package, base = CLASSES[key]
    found = _find(name, package)
    fits = isinstance(found, type) and issubclass(found, base) and not inspect.isabstract(found)
    refusal = f"{source} names {name!r} as {key}, expected a {base.__name__} of {package}"
    return _accept(found, fits, (package,), refusal, hint)


def check_architecture(configuration: ConfigurationManager, source: str = "plans.json", hint: str = "") -> None:
    """Refuse plans whose network is made of anything but network layers: nnU-Net calls whatever they name."""
    imported, kwargs = configuration.network_arch_init_kwargs_req_import, configuration.network_arch_init_kwargs
    if not isinstance(kwargs, Mapping):
        raise InputError(f"arch_kwargs in {source} is not a mapping")
    if not isinstance(imported, (list, tuple)) or not all(isinstance(key, str) for key in imported):
        raise InputError(f"_kw_requires_import in {source} is {imported!r}, expected a list of names")
    names: list[tuple[str, str, tuple[str, ...]]] = [
        ("network_class_name", configuration.network_arch_class_name, (NETWORK_PACKAGE,))
    ]
    for key in imported:
        if key not in kwargs:
            raise InputError(f"{source} lists {key!r} in _kw_requires_import, but its arch_kwargs have no such key")
        if kwargs[key] is not None:
            names.append((key, kwargs[key], LAYER_PACKAGES))
    for key, name, packages in names:
        found = _locate(name, packages)
        fits = isinstance(found, type) and issubclass(found, torch.nn.Module)
        refusal = f"{source} names {name!r} as {key}, expected a network layer of {' or '.join(packages)}"
        _accept(found, fits, packages, refusal, hint)


def _accept(found: Any, fits: bool, packages: Sequence[str], refusal: str, hint: str) -> Any:
    """Judge what a name leads to, not the name: modules hold what they import, torch.nn leads to os.system."""
    module = str(getattr(found, "__module__", ""))
    if not fits or not any(f"{module}.".startswith(f"{package}.") for package in packages):
        raise InputError(f"{refusal}; nothing was built{hint}")
    return found


def _check_grid(configuration: ConfigurationManager, source: str) -> None:
    for key in ("patch_size", "spacing"):
        values = configuration.configuration[key]
        wrong = not isinstance(values, (list, tuple)) or any(
            isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf")
            for value in values
        )
        if wrong or not 2 <= len(values) <= 3:
            raise InputError(f"{key} in {source} is {values!r}, expected 2 or 3 positive numbers")
    if not isinstance(configuration.normalization_schemes, (list, tuple)):
        raise InputError(f"normalization_schemes in {source} is not a list")


def _find(name: Any, package: str) -> Any:
    """Search by name, as nnU-Net does."""
    if not isinstance(name, str) or not name.isidentifier():
        return None
    folder = Path(nnunetv2.__path__[0], *package.split(".")[1:])
    return recursive_find_python_class(str(folder), name, package)


def _locate(name: Any, packages: Sequence[str]) -> Any:
    """Import by full name, as nnU-Net does, but only from modules of ``packages``."""
    if not isinstance(name, str) or not re.fullmatch(rf"({'|'.join(map(re.escape, packages))})(\.[A-Za-z]\w*)+", name):
        return None
    with contextlib.suppress(pydoc.ErrorDuringImport):
        found = pydoc.locate(name)
        if found is None and NETWORK_PACKAGE in packages:
            # nnU-Net's own second try: older plans name modules that have moved since
            folder = Path(dynamic_network_architectures.__path__[0], "architectures")
            found = recursive_find_python_class(str(folder), name.rsplit(".", 1)[-1], NETWORK_PACKAGE)
        return found
    return None
