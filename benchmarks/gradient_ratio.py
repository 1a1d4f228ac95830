"""How strongly each weighted term pulls at the student: its gradient norm over that of the segmentation loss.

    python benchmarks/gradient_ratio.py 226 3d_fullres 0 -tr MSTKDTrainer -device cpu

Loads the weights that `measured_training.py --keep` left at 5 and 50 % of a training, and the final ones, and
differentiates the trainer's own loss on a few fixed batches, in float32. A ratio below 1e-3 is dead: the term costs
time and changes nothing. Result in `gradients.json` of the fold; the weights on the way are then removed.

For MST-KDNet the terms in their other form, relative or published, at that form's weights are measured on the same
weights and batches too, and printed beside them (`gradients_forms.json`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

DEAD = 1e-3
GRADIENTS = "gradients.json"
FORMS = "gradients_forms.json"
SEGMENTATION = "segmentation"
SEED = 2026


def gradient_norms(
    step: Any, parameters: Iterable[Any], weights: Mapping[str, float] | None = None
) -> dict[str, tuple[float, float]]:
    """Weight in the total and norm of the unweighted gradient, by term; ``segmentation`` is one of them.

    Parameters
    ----------
    step:
        ``total`` and ``terms`` (scalars by name), as a trainer's ``compute_losses`` returns them.
    parameters:
        of the student.
    weights:
        by term, where the total was not computed from these very scalars; else they are its derivatives.
    """
    import torch

    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    # a term may be a constant, for example a logit term where the teacher is nowhere better
    alive = [name for name in step.terms if step.terms[name].requires_grad]
    found = torch.autograd.grad(step.total, [step.terms[name] for name in alive], retain_graph=True, allow_unused=True)
    derivatives = dict(zip(alive, found, strict=True))
    norms = {}
    for name, term in step.terms.items():
        norm, derivative = 0.0, derivatives.get(name)
        if name in derivatives:
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
            norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        given = 1.0 if name == SEGMENTATION else (weights or {}).get(name, 0.0)
        norms[name] = (given if derivative is None and name in derivatives else float(derivative or 0.0), norm)
    return norms


def ratios(
    batches: Iterable[Mapping[str, tuple[float, float]]], full_weights: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Ratios by term, norms added over the batches.

    Parameters
    ----------
    batches:
        from :func:`gradient_norms`.
    full_weights:
        weights without ramp and fade; a term that is not named has none.

    Returns
    -------
    Per term ``ratio`` (as weighted at this moment), ``full`` (with its full weight) and ``weight``.
    """
    batches = list(batches)
    base = sum(norms[SEGMENTATION][0] * norms[SEGMENTATION][1] for norms in batches)
    result = {}
    for name in batches[0]:
        if name == SEGMENTATION:
            continue
        weight = max(norms[name][0] for norms in batches)  # 0 where the term was a constant
        norm = sum(norms[name][1] for norms in batches)
        full = full_weights.get(name, weight)
        result[name] = {"ratio": weight * norm / base, "full": full * norm / base, "weight": weight}
    return result


def judgement(ratio: float, full: float) -> str:
    """What a reader should make of a term's ratios: empty, ``dead``, or that its weight has fallen to nothing."""
    if ratio >= DEAD:
        return ""
    if full == 0:
        return "no gradient at this moment"
    return "dead" if full < DEAD else "weight ramped or faded to nothing"


def measure(args: argparse.Namespace) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder of the fold, ratios by percent of the training, and by form of the terms and percent."""
    import numpy as np
    import torch
    from measured_training import FRACTIONS, kept_name
    from nnunetv2.run.run_training import get_trainer_from_args

    from nnunetv2_mstkd.nnunet.registration import register
    from nnunetv2_mstkd.training.step import active_terms

    register()
    device = torch.device(args.device)
    trainer = get_trainer_from_args(args.dataset, args.configuration, args.fold, args.tr, device=device)
    trainer.initialize()
    folder = Path(trainer.output_folder)
    files = {round(100 * fraction): folder / kept_name(fraction) for fraction in FRACTIONS}
    files[100] = folder / "checkpoint_final.pth"
    trainer.load_checkpoint(str(files[100]))
    trainer.current_epoch = 0  # of a finished training no teacher would be loaded
    trainer.prepare_training()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    every = forms(trainer)
    by_form: dict[str, Any] = {name: {} for name in every}
    for percent, file in files.items():
        if not file.is_file():
            continue
        # also sets the number of finished epochs, which decides the size of the patch, ramp and fade
        trainer.load_checkpoint(str(file))
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
        batches = [next(trainer.dataloader_train) for _ in range(args.batches)]
        trainer.finish_loaders()
        for form, settings in every.items():
            trainer.settings, own = settings, trainer.settings
            if len(every) > 1:
                trainer.terms = active_terms(*trainer.make_terms(), *trainer.common_terms())
            full = full_weights(trainer)
            trainer.network.train()
            trainer._subset_generator = torch.Generator().manual_seed(SEED)  # the same subsets each time
            norms = []
            for batch in batches:
                data, target = batch["data"].to(device), batch["target"]
                target = [level.to(device) for level in target] if isinstance(target, list) else target.to(device)
                step = trainer.compute_losses(data, target)
                norms.append(gradient_norms(step, trainer.network.parameters(), full))
                del step  # its graph, before there is the next one
            by_form[form][str(percent)] = ratios(norms, full)
            trainer.settings = own
    return folder, next(iter(by_form.values())), by_form


def forms(trainer: Any) -> dict[str, Any]:
    """The trainer's settings and, of MST-KDNet, those with its terms in the other form, by the form's name."""
    from nnunetv2_mstkd.methods.mstkd.settings import TERMS, MSTKDSettings

    settings = trainer.settings
    if MSTKDSettings not in settings:
        return {"": settings}
    names = {"relative": "default", "published": "paper"}
    own = settings[MSTKDSettings].form
    other = "published" if own == "relative" else "relative"
    section = {**MSTKDSettings().to_dict(), **MSTKDSettings.PRESETS.get(names[other], {}).get("mstkd", {})}
    changed = {name: section[name] for name in (*TERMS, "content", "tau")}
    if not settings[MSTKDSettings].adversarial:
        changed["adversarial"] = 0.0  # it has no discriminator
    return {own: settings, other: settings.replace(MSTKDSettings, **changed, form=other)}


def full_weights(trainer: Any) -> dict[str, float]:
    """Weights of a trainer's terms without ramp and fade, where they cannot be read off its total."""
    from nnunetv2_mstkd.methods.smml.trainer import SMMLTrainer

    if trainer.terms:
        return {term.name: term.weight for term in trainer.terms}
    if isinstance(trainer, SMMLTrainer):  # its terms are means over the two students
        smml = trainer.smml
        return {"pixel": smml.pixel, "feature": smml.feature, "guidance": smml.guidance, "refinement": 1.0}
    return {}


def remove_kept(folder: Path) -> None:
    """Remove the weights on the way, which nothing else reads."""
    from measured_training import FRACTIONS, kept_name

    for fraction in FRACTIONS:
        (folder / kept_name(fraction)).unlink(missing_ok=True)


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("configuration")
    parser.add_argument("fold", type=int)
    parser.add_argument("-tr", required=True)
    parser.add_argument("-device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--batches", type=int, default=4)
    args = parser.parse_args()
    # nnU-Net reads them when it is imported: no workers, so that the batches are fixed, and no compiled variants
    os.environ.update(nnUNet_n_proc_DA="0", nnUNet_compile="f")
    folder, found, by_form = measure(args)
    (folder / GRADIENTS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if len(by_form) > 1:
        (folder / FORMS).write_text(json.dumps(by_form, indent=1) + "\n", encoding="utf-8")
    remove_kept(folder)
    for percent, terms in found.items():
        for name, entry in terms.items():
            print(f"{percent:>4} %  {name:14s}{entry['ratio']:10.2e}  {judgement(entry['ratio'], entry['full'])}")
    for name in dict.fromkeys(term for form in by_form.values() for term in form["100"]) if len(by_form) > 1 else ():
        cells = [f"{form} {by_form[form]['100'][name]['full']:.2e}" for form in by_form if name in by_form[form]["100"]]
        print(f"full weight, end: {name:14s}{', '.join(cells)}")


if __name__ == "__main__":
    main()
