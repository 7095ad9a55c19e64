"""Why a run failed, as far as that can be found out afterwards, in the words of its record."""

import traceback

import numpy as np
import torch

from ..common.errors import UserError
from ..data.loader import BatchSource
from ..engine.callbacks import StageRunner
from ..engine.config import RunConfig
from ..engine.loop import TrainState, make_batch, train_step
from ..engine.tasks import NotFinite
from ..methods.base import MethodConfig, Regularizer


def explain(
    error: Exception, config: RunConfig, runner: StageRunner, loader: BatchSource, indices: np.ndarray
) -> tuple[str | None, str]:
    """The kind of failure (diverged, input, out of memory, program) and what to tell a person.

    None instead of a kind if nothing is wrong with the run: the same command may go on with it. The runner's state
    cannot be used afterwards.
    """
    state = runner.state if isinstance(runner.state, TrainState) else None  # None before the first stage has one
    try:
        if isinstance(error, NotFinite) and state is not None:
            kind, why = _cause(error, config, state, loader, indices)
            return kind, f"{error} {why}"
        if isinstance(error, torch.OutOfMemoryError):
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            return _what_would_fit(config, state, runner.method, loader, indices)
    except Exception as again:
        return "program", f"{error} (and looking for the cause: {type(again).__name__}: {again})"
    if isinstance(error, torch.AcceleratorError):
        why = str(error).splitlines()[0]
        return None, f"The GPU failed ({why}). The same command goes on from the last checkpoint."
    if isinstance(error, UserError):
        return "input", str(error)
    if config.deterministic and "deterministic implementation" in str(error):
        return "input", f"deterministic=true is not possible here: {str(error).splitlines()[0]}"
    return "program", f"{type(error).__name__}: {error}".strip()


def _cause(
    error: NotFinite, config: RunConfig, state: TrainState, loader: BatchSource, indices: np.ndarray
) -> tuple[str, str]:
    """The kind: "input" if the input of the step was not in order, else the training diverged."""
    images, _ = loader.train_batch(indices, error.iteration)  # the same batch again
    if not images.isfinite().all():
        return "input", "The images of that batch are not finite either: look at backbone.mean and backbone.std."
    outputs = state.forward_source(images) or {}
    if not all(feature_map.isfinite().all() for feature_map in outputs.values()):
        return "input", "The frozen network's feature maps of that batch are not finite either: look at its weights."
    if error.steps == 0:
        return "input", "No step had been taken: look at the source weights and the images, not at the learning rate."
    keys = ["schedule.lr", *strengths(config.reg)]
    return "diverged", f"Images and source network are in order. Usually {' or '.join(keys)} is too large."


def strengths(reg: MethodConfig, key: str = "reg") -> list[str]:
    """The keys of a method's strengths; for a sum, those of its terms."""
    own = [f"{key}.{name}" for name in vars(reg) if name.endswith("alpha")]
    terms: dict[str, MethodConfig] = getattr(reg, "terms", {})
    return own + [found for name, term in terms.items() for found in strengths(term, f"{key}.terms.{name}")]


def _what_would_fit(
    config: RunConfig, state: TrainState | None, method: Regularizer, loader: BatchSource, indices: np.ndarray
) -> tuple[str | None, str]:
    """Tries a step of a failed run with more and more micro-batches. Returns what `explain` does."""
    schedule, kind = config.schedule, "out of memory"
    if state is None:
        bounded = [part for part in method.parts_to_fit() if part.memory_option]
        keys = [f"{f'reg.terms.{part.term}' if part.term else 'reg'}.{part.memory_option}" for part in bounded]
        fewer = f"set {keys[0]} to a small number, or " if keys else ""
        return kind, f"Out of memory while making networks and method: {fewer}reduce backbone.image_size."
    batch = schedule.batch_size
    for accumulate in range(schedule.accumulate, batch // 2 + 1):  # BatchNorm needs two images
        if batch % accumulate:
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        state.accumulate = method.loss_scale = accumulate
        try:
            train_step(state, method, make_batch(method, loader, indices, 0))
        except Exception as again:  # out of memory, or what a library makes of that
            traceback.clear_frames(again.__traceback__)
            state.optimizer.zero_grad(set_to_none=True)
            continue
        if accumulate == schedule.accumulate:
            return None, (
                "Out of memory, but a training step fits (tried just now): does another program use the same GPU? "
                "The same command goes on from the last checkpoint."
            )
        return kind, (
            f"Out of memory with {batch // schedule.accumulate} images at a time. A step with {batch // accumulate} "
            f"fits (tried just now): schedule.accumulate={accumulate} keeps the batch of {batch}, apart from "
            "BatchNorm's statistics; or reduce schedule.batch_size or backbone.image_size."
        )
    return (
        kind,
        "Out of memory even with two images at a time: reduce backbone.image_size, or take a smaller backbone.",
    )
