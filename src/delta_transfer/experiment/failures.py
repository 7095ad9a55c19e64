"""Why a run failed, as far as that can be found out when it has."""

import traceback

import numpy as np
import torch

from ..common.errors import UserError
from ..config import RunConfig
from ..data.loader import Loader
from ..engine.loop import NotFinite, TrainState, batch_for
from ..methods import Regularizer


def explain(
    error: Exception,
    config: RunConfig,
    learner: TrainState | None,
    regularizer: Regularizer,
    loader: Loader,
    train_indices: np.ndarray,
) -> tuple[str | None, str]:
    """The kind of failure (diverged, input, out of memory, program) and what to tell a person.

    None instead of a kind where nothing is wrong with the run: the same command may go on with it.
    `learner`: None if the run got no further than what comes before training. It is of no use afterwards.
    """
    try:
        if isinstance(error, NotFinite):
            kind, why = _cause(error, config, learner, loader, train_indices)
            return kind, f"{error} {why}"
        if isinstance(error, torch.OutOfMemoryError):
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            return _what_would_fit(config, learner, regularizer, loader, train_indices)
    except Exception as again:
        return "program", f"{error} (and looking for the cause: {type(again).__name__}: {again})"
    if isinstance(error, torch.AcceleratorError):
        why = str(error).splitlines()[0]
        return None, f"The GPU failed ({why}). The same command goes on from the last checkpoint."
    if isinstance(error, UserError):
        return "input", str(error)
    if config.deterministic and "deterministic implementation" in str(error):
        return "input", f"deterministic=true cannot be had here: {str(error).splitlines()[0]}"
    return "program", f"{type(error).__name__}: {error}".strip()


def _cause(
    error: NotFinite, config: RunConfig, learner: TrainState, loader: Loader, train_indices: np.ndarray
) -> tuple[str, str]:
    """Whether what went into the step was in order: then it is the training that diverged."""
    images, _ = loader.train_batch(train_indices, error.iteration)  # the same batch again
    if not images.isfinite().all():
        return "input", "The images of that batch are not finite either: look at backbone.mean and backbone.std."
    if learner.source is not None and not all(m.isfinite().all() for m in learner.forward_source(images).values()):
        return "input", "Nor are the frozen network's feature maps of that batch: look at its weights, not at the rate."
    if error.steps == 0:
        return "input", "No step had been taken: look at the source weights and the images, not at the learning rate."
    keys = ["schedule.lr", *strengths(config.reg)]
    return "diverged", f"Images and source network are in order. Usual causes: {' or '.join(keys)} is too large."


def strengths(reg, key: str = "reg") -> list[str]:
    """The keys of a method's weights, of a sum those of its terms."""
    own = [f"{key}.{name}" for name in vars(reg) if name.endswith("alpha")]
    terms = getattr(reg, "terms", {})
    return own + [found for name, term in terms.items() for found in strengths(term, f"{key}.terms.{name}")]


def _what_would_fit(
    config: RunConfig, learner: TrainState | None, regularizer: Regularizer, loader: Loader, train_indices: np.ndarray
) -> tuple[str | None, str]:
    """Tries a step in ever more parts, in what is left of a failed run. Kind and message as `explain`."""
    schedule, kind = config.schedule, "out of memory"
    if learner is None:
        attention = [method.fit_key for method in regularizer.to_fit() if method.fitted_name == "attention"]
        fewer = f"set {attention[0]}.attention.forward_images to a small number, or " if attention else ""
        return kind, f"Out of memory while networks and method are made: {fewer}reduce backbone.image_size."
    batch = schedule.batch_size
    for accumulate in range(schedule.accumulate, batch // 2 + 1):  # BatchNorm needs two images
        if batch % accumulate:
            continue
        _empty_cache()
        learner.accumulate = regularizer.parts = accumulate
        try:
            regularizer.update(learner, *batch_for(regularizer, loader, train_indices, 0))
        except Exception as again:  # out of memory, or what a library makes of that
            traceback.clear_frames(again.__traceback__)
            learner.optimizer.zero_grad(set_to_none=True)
            continue
        if accumulate == schedule.accumulate:
            return None, (
                "Out of memory, but a training step fits (tried just now): does another program use the same GPU? "
                "The same command goes on from the last checkpoint."
            )
        return kind, (
            f"Out of memory with {batch // schedule.accumulate} images at a time. With {batch // accumulate} a step "
            f"fits (tried just now): schedule.accumulate={accumulate} keeps the batch of {batch}, apart "
            "from BatchNorm's statistics; or reduce schedule.batch_size or backbone.image_size."
        )
    return kind, (
        "Out of memory, with two images at a time as well: reduce backbone.image_size, or take a smaller backbone."
    )


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
