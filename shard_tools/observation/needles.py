"""Add needles to a telescope's files while these are cut.

Axes: T spectrum, F channel of the file.
"""

import itertools

import numpy as np

from shard_tools.observation.cut_plan import CutPlan
from shard_tools.observation.filterbank import Float32s
from shard_tools.observation.flatten import block_count, block_medians, to_bandpass
from shard_tools.observation.lines import Grid, Line, add_line


def add_needles(plan: CutPlan, panel: int, values: Float32s, first: int, stop: int) -> None:
    """Add the plan's needles to one panel's coarse channels `first` to `stop`, (T, F) of the file's power, in place.

    A needle's power follows from its SNR and the noise of its coarse channel, and has the bandpass of the sky.
    """
    cadence, header = plan.cadence, plan.cadence.first
    start_s = cadence.panel_starts_s[panel]
    samples = header.channel_width_hz * header.bin_length_s * plan.time_bins
    step_mhz = abs(header.foff_mhz)
    offset = int(plan.borders[first])
    for low, high in itertools.pairwise(plan.borders[first : stop + 1].tolist()):
        part = values[:, (low - offset) * plan.channel_bin : (high - offset) * plan.channel_bin]
        grid = Grid(header.lowest_mhz + low * plan.channel_bin * step_mhz, step_mhz, start_s, header.bin_length_s)
        needles = [line for line in plan.needles if panel in line.panels and _crosses(line, grid, part.shape)]
        if needles:
            bandpass = np.nan_to_num(to_bandpass(block_medians(part, block_count(*part.shape)), part.shape[1]))
            for line in needles:
                add_line(part, grid, line, bandpass * np.float32(line.snr / np.sqrt(samples)))


def _crosses(line: Line, grid: Grid, shape: tuple[int, ...]) -> bool:
    """Whether a line is in any of the channels at any time of the panel."""
    length_s = shape[0] * grid.bin_length_s
    places = [(line.mhz_at(grid.start_s + s) - grid.first_mhz) / grid.step_mhz for s in (0.0, length_s)]
    return max(places) > -1 and min(places) < shape[1]
