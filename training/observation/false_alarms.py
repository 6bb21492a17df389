"""False alarm rates, estimated by the same search with ON and OFF exchanged.

Target-decoy estimation, of mass spectrometry: Elias & Gygi 2007, Nature Methods 4:207; the monotone form (q-values) is
that of Käll et al. 2008, J. Proteome Res. 7:29. The + 1, without which the estimate is too low where controls are few,
is that of He et al. 2015, arXiv:1501.00537, and Barber & Candès 2015, Annals of Statistics 43:2055.
"""

import numpy as np
import numpy.typing as npt

Float64s = npt.NDArray[np.float64]


def false_alarm_rates(scores: Float64s, control_scores: Float64s) -> Float64s:
    """For each score s, (#(control scores >= s) + 1) / #(scores >= s), at most 1, and no lower for a lower score.

    It assumes that the sky of the OFF panels is like that of the ON panels: that noise and interference give as many
    lines in A and not in B, C, D as the other way around. Real signals of B, C or D count as false alarms. The rate is
    never 0: n events without a control get 1 / n, as n events cannot show that it is lower.
    """
    falling = np.sort(scores)[::-1]
    events = np.arange(1, len(falling) + 1)
    controls = len(control_scores) - np.searchsorted(np.sort(control_scores), falling, "left")
    rate = np.minimum((controls + 1) / events, 1.0)
    # The lowest rate at this or a lower score: accepting that score accepts this one too. Of equal scores all count.
    monotone = np.minimum.accumulate(rate[::-1])[::-1]
    order = np.argsort(-scores, kind="stable")
    found = np.empty(len(scores))
    found[order] = monotone
    return found
