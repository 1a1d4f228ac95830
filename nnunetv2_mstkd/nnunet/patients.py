"""Which patient a case belongs to, as the conversion of a data set noted it in its dataset.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from nnunetv2_mstkd.errors import InputError
from nnunetv2_mstkd.nnunet.plans import CONVERSION


def patient_naming(dataset_json: Mapping[str, Any]) -> Callable[[str], str] | None:
    """Return what tells the patient of a case, where ``mstkd convert`` noted it in dataset.json; else None."""
    record = dataset_json.get(CONVERSION)
    expression = record.get("patient") if isinstance(record, Mapping) else None
    return patient_from_name(expression, f"patient in {CONVERSION} of dataset.json") if expression else None


def patient_from_name(expression: Any, what: str) -> Callable[[str], str]:
    """Return a function from a case's name to its patient: the first group of a regular expression in that name.

    Where the expression does not match, the case itself is the patient. InputError, which starts with ``what``, for
    what is no expression with a group.
    """
    try:
        pattern = re.compile(expression) if isinstance(expression, str) else None
    except re.error as error:
        raise InputError(f"{what} is {expression!r}, no regular expression: {error}") from error
    if pattern is None or pattern.groups < 1:
        raise InputError(f"{what} is {expression!r}, expected an expression with a group such as '(.*)-[0-9]+'")

    def patient(case: str) -> str:
        match = pattern.search(case)
        return match[1] if match and match[1] else case

    return patient
