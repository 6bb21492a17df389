"""From the six files of a telescope's cadence to shards: read, check, cut.

Axes: P panel (one file each), T spectrum or time bin, F frequency channel. Frequencies ascend in all arrays of this
package, whatever the sign of `foff` in the file.
"""
