"""One module per sub-command of ``mstkd``, with ``add_arguments(parser)`` and ``run(args) -> int | None``.

:mod:`nnunetv2_mstkd.cli` imports only the module that was asked for.
"""
