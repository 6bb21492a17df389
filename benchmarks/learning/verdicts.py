"""What the learning check expects of a training, and the table of what it found."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.intervals import auc_statistic, interval
from benchmarks.learning.runs import Learning, mean_losses
from training.metrics import Floats, Ints
from training.part_norms import Norms, gradient_norm, update_share

MEMORISED = 0.05  # mean loss of a pass: that of a score of 0.95 for the true class
# Allowed above the entropy of the classes. timm's new heads give logits 0.4 to 0.7 away from 0, which costs up to 0.06.
# Heads with a tenth of these weights cost nothing, but with them a Swin trained from scratch at 1e-3 without warm-up
# stays at a loss of 0.69 (2 of 2 seeds); with timm's heads it reaches 0.003 (2 of 2).
START_MARGIN = 0.1
# Limits of an update's norm over that of the weights. The presets have 2e-7 (a scalar weight of 4, at the learning rate
# of 1e-6 that begins a warm-up) to 3e-2.
UPDATE_SHARES = (1e-7, 1e-1)
GRADIENT_SPREAD = 1e4  # the largest part's gradient over the smallest's


@dataclass(frozen=True)
class Verdict:
    """One line of the table."""

    check: str
    preset: str
    precision: str
    found: str
    expected: str
    passed: bool


def judge_memory(preset: str, precision: str, learning: Learning, steps: int) -> Verdict:
    """Whether the loss of a whole pass fell below MEMORISED within `steps` steps."""
    losses = learning.pass_losses[: steps // learning.pass_steps]
    expected = f"<{MEMORISED} in {steps} steps"
    if learning.failed and len(learning.losses) < steps:
        return Verdict("memorises", preset, precision, f"step {len(learning.losses)}: not finite", expected, False)
    best = int(np.argmin(losses))
    below = np.flatnonzero(losses < MEMORISED)
    first = int(below[0]) if len(below) else best
    found = f"{losses[first]:.3f} in step {(first + 1) * learning.pass_steps}"
    return Verdict("memorises", preset, precision, found, expected, bool(len(below)))


def judge_start(preset: str, precision: str, target: Ints, logit: Floats) -> Verdict:
    """Whether the loss before the first step is about that of a guess, with both classes weighted equally."""
    loss, limit = float(np.mean(mean_losses(target, logit))), math.log(2) + START_MARGIN
    return Verdict("loss at start", preset, precision, f"{loss:.3f}", f"up to {limit:.3f}", loss <= limit)


def judge_norms(preset: str, precision: str, learning: Learning) -> list[Verdict]:
    """Whether all parts have gradients and updates of sound sizes, at each step that was recorded.

    Once everything is memorised there is nothing left to learn, and updates may be of any small size.
    """
    below = np.flatnonzero(learning.pass_losses < MEMORISED)
    memorised = (int(below[0]) + 1) * learning.pass_steps if len(below) else math.inf
    steps = sorted({int(norms["step"]) for norms in learning.norms})
    verdicts = []
    for step in steps:
        own = [norms for norms in learning.norms if norms["step"] == step]
        shares = (UPDATE_SHARES[0] if step <= memorised else 0.0, UPDATE_SHARES[1])
        verdicts.append(_judge_gradients(preset, precision, step, own))
        verdicts.append(_judge_updates(preset, precision, step, own, shares))
    return verdicts


def _judge_gradients(preset: str, precision: str, step: int, norms: Sequence[Norms]) -> Verdict:
    values = {each["part"]: gradient_norm(each) for each in norms}
    bad = [part for part, value in values.items() if not value > 0]
    spread = math.inf if bad else max(values.values()) / min(values.values())
    least = min(values, key=lambda part: values[part])
    found = f"none: {bad[0]}" if bad else f"{spread:.0f}, least {least}"
    expected = f"up to {GRADIENT_SPREAD:.0e} apart"
    return Verdict(f"gradients, {step}", preset, precision, found, expected, spread <= GRADIENT_SPREAD)


def _judge_updates(
    preset: str, precision: str, step: int, norms: Sequence[Norms], limits: tuple[float, float]
) -> Verdict:
    # Leave out parts whose weights are all 0, as those of a new bias may be.
    shares = {each["part"]: update_share(each) for each in norms if each["weight"] != 0}
    low, high = limits
    bad = [part for part, share in shares.items() if not low <= share <= high]
    found = f"{shares[bad[0]]:.0e}: {bad[0]}" if bad else f"{min(shares.values()):.0e} to {max(shares.values()):.0e}"
    return Verdict(f"updates, {step}", preset, precision, found, f"{low:.0e} to {high:.0e}", not bad)


def judge_doubling(
    preset: str, precision: str, target: Ints, few: Sequence[Floats], twice: Sequence[Floats]
) -> Verdict:
    """Whether twice the cadences give an AUC that is not lower beyond chance, by each run's logits of one test set."""
    positive, negative = target == 1, target == 0
    counts = (int(positive.sum()), int(negative.sum()))
    runs = [[auc_statistic(logit[positive], logit[negative]) for logit in logits] for logits in (twice, few)]
    gain = interval(counts, *runs)
    found = f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
    return Verdict("twice the data", preset, precision, found, "AUC: not below 0", gain.high >= 0)


def table(verdicts: Iterable[Verdict]) -> str:
    """The verdicts, in 80 columns."""
    rows = [("check", "preset", "", "found", "expected", "")]
    rows += [
        (each.check, each.preset, each.precision, each.found, each.expected, "" if each.passed else "FAIL")
        for each in verdicts
    ]
    return "\n".join(f"{a:<15} {b:<6} {c:<7} {d:<25} {e:<18} {f}".rstrip() for a, b, c, d, e, f in rows)
