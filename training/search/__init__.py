"""The search that a network begins with: it finds the lines on which a cadence's ON panels stand out, without weights.

In the order of the work: `lines` tries every straight line and proposes the best; `panel_paths` finds the best path of
each panel, which may bend; `candidates` shows their surroundings to a network, such as that of `window_network`, and
combines its answers into one logit. `aiming` sets a search to the panel times of an observation. The classical search
that every network has to beat is in `dedoppler`, with its loops in `dedoppler_kernels`.
"""
