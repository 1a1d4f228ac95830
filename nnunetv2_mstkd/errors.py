"""What the user can mend is one line on stderr, in nnU-Net's own commands too."""

from __future__ import annotations

import dis
import os
import sys
from types import TracebackType

PACKAGE = os.path.dirname(os.path.abspath(__file__))

USER_ERRORS = (ValueError, OSError, NotImplementedError, FloatingPointError)
"""What this package raises for a mistake that the user can mend."""

EXIT_USER_ERROR = 2


def install() -> None:
    """Print this package's own refusals as one line and exit with code 2. Idempotent.

    ``nnUNetv2_train`` and ``nnUNetv2_predict`` let an exception end the process, so the place to change what is printed
    is ``sys.excepthook``. It is replaced by one that touches an exception only if it is of :data:`USER_ERRORS`, has a
    message and was raised by a ``raise`` statement of this package; all others go to the hook that was there before.
    ``MSTKD_DEBUG=1`` keeps every traceback, and so does an interactive interpreter, which must not end. Processes of a
    multi-GPU training report to their parent and never get here.
    """
    previous = sys.excepthook
    if getattr(previous, "_of_mstkd", False):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        message = " ".join(str(error).split())
        if not message or not _is_own(error, traceback) or wants_traceback():
            previous(kind, error, traceback)
            return
        sys.stdout.flush()
        print(f"nnunetv2_mstkd: {message}", file=sys.stderr, flush=True)
        # the interpreter takes its exit code from a SystemExit that leaves the hook
        raise SystemExit(EXIT_USER_ERROR)

    hook._of_mstkd = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _is_own(error: BaseException, traceback: TracebackType | None) -> bool:
    if not isinstance(error, USER_ERRORS) or traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    if not os.path.abspath(code.co_filename).startswith(PACKAGE + os.sep):
        return False
    # a function written in C has no frame: but for this, int("x") in our code, a defect, would look like a refusal
    return dis.opname[code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"


def wants_traceback() -> bool:
    """Whether somebody looks for a defect."""
    interactive = hasattr(sys, "ps1") or bool(sys.flags.interactive)
    return interactive or os.environ.get("MSTKD_DEBUG", "0") not in ("", "0")
