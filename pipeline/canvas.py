"""The canvas: how the six panels of a cadence become the image that the model sees.

Axes: N planes (the panels that the canvas shows), T time bins after summing, F frequency channels;
C, H, W channels, height and width of the canvas.
"""

from dataclasses import dataclass
from typing import Literal

from shard_tools.cadence import OFF_POSITIONS, ON_POSITIONS, PANELS, check_time_bins
from shard_tools.errors import InputError

Layout = Literal["stack6", "on", "on_off", "panels"]
NORMALISE_EPSILON = 1e-6  # added to the variance, so that a constant panel becomes 0
TTA_VIEWS = ("identity", "flip_frequency", "flip_time", "flip_both")


@dataclass(frozen=True)
class CanvasConfig:
    """How a snippet becomes an image."""

    canvas: Layout = "on_off"
    """stack6: all six panels below each other, one channel. on: the ON panels below each other, one channel.
    on_off: the ON stack and the OFF stack as two channels. panels: six channels, the ON panels first."""
    height: int = 224
    """Height of the image (time), in pixels."""
    width: int = 224
    """Width of the image (frequency), in pixels."""
    sum_time_bins: int = 1
    """Number of neighbouring time bins to sum before all other steps. The sum is divided by the square root of this
    number, so that white noise keeps its standard deviation. Must divide the snippet's time bins."""
    subtract: Literal["none", "lines", "lines_bursts"] = "none"
    """Background to subtract. lines: each channel's mean over all six panels (bandpass, persistent lines).
    lines_bursts: then also each time bin's mean over the channels (broadband bursts)."""
    normalise: bool = True
    """Bring each panel to mean 0 and standard deviation 1."""
    compress: Literal["none", "asinh"] = "none"
    """asinh compresses bright pixels: linear up to about 1 standard deviation, logarithmic above."""

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise InputError(f"--height {self.height} --width {self.width}: expected at least 1 pixel each")
        if self.canvas == "on" and self.subtract != "none":
            raise InputError(
                f"--subtract {self.subtract}: with --canvas on a channel's mean is over ON panels alone, so that "
                "subtracting it would remove needles; use --subtract none or another canvas"
            )

    @property
    def layout(self) -> Layout:
        """Which panels the canvas shows, and how. The command line, run files and weight files call it `canvas`."""
        return self.canvas

    @property
    def channels(self) -> int:
        """C."""
        return {"stack6": 1, "on": 1, "on_off": 2, "panels": PANELS}[self.canvas]

    @property
    def positions(self) -> tuple[int, ...]:
        """The position in the cadence that each of the N planes shows."""
        if self.canvas == "stack6":
            return tuple(range(PANELS))
        return ON_POSITIONS if self.canvas == "on" else (*ON_POSITIONS, *OFF_POSITIONS)

    @property
    def planes(self) -> int:
        """N."""
        return len(self.positions)

    @property
    def flips_time(self) -> bool:
        """Whether time may be reversed. On stack6 that would move ON panels into OFF slots."""
        return self.canvas != "stack6"

    @property
    def stacks(self) -> int:
        """Number of stacks that the planes form: two if ON and OFF are apart, else one.

        Reversing time reverses each stack as a whole, its panels and their order, so that ON stays ON.
        """
        return 2 if self.canvas in ("on_off", "panels") else 1

    @property
    def views(self) -> tuple[str, ...]:
        """The TTA views that leave ON panels ON and OFF panels OFF."""
        return TTA_VIEWS if self.flips_time else TTA_VIEWS[:2]

    def plane_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(N, T, F) for a snippet of `shape`. Raises InputError if `sum_time_bins` does not divide its time bins."""
        check_time_bins(shape[1], self.sum_time_bins, "--sum-time-bins")
        return self.planes, shape[1] // self.sum_time_bins, shape[2]
