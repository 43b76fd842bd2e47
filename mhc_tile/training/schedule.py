"""The learning rate over training: linear warm-up, then two steps down."""

DECAYS = ((0.8, 0.316), (0.9, 0.1))
"""(fraction of training, factor on the peak) as in arXiv 2512.24880, Table 5."""


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int) -> float:
    """Learning rate of a step from 1 to `steps`.

    `peak * step / warmup_steps` up to warmup_steps, then peak, then 0.316 * peak after 80 % of the
    steps and 0.1 * peak after 90 %.

    Example:
        >>> [learning_rate(s, peak=1.0, warmup_steps=2, steps=10) for s in (1, 2, 8, 9, 10)]
        [0.5, 1.0, 1.0, 0.316, 0.1]
    """
    warmup = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    decay = 1.0
    for fraction, factor in DECAYS:
        if step > fraction * steps:
            decay = factor
    return peak * warmup * decay
