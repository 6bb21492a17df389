"""The recipes of the needle benchmark: command lines of train.py that anyone can repeat."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

Form = Literal["cpu", "gpu"]
"""Two CPU cores, or a GPU."""
OURS, UNTRAINED, CLASSICAL, TRIVIAL = "ours", "ours, untrained", "de-Doppler", "trivial"


@dataclass(frozen=True)
class Recipe:
    """What follows `python train.py --shards ... --run-dir ... --epochs ...`."""

    name: str
    words: str
    epochs: int = 0
    """A fixed number; 0: as many as fit into the time."""
    is_default: bool = True
    """Whether it is trained unless --rows names others."""
    uses_backgrounds: bool = False
    """Whether it is trained on backgrounds, with signals that the plan adds, and not on the labelled cadences."""

    def command(self, epochs: int) -> str:
        """Its words, with what depends on the number of epochs filled in."""
        return self.words.format(most_epochs=max(1, round(0.8 * epochs)))


# What the best public solutions of the competition have in common, as they describe it: the ON panels below each other,
# mixup with the larger of both targets for 80 % of the epochs, flips, and every cadence once an epoch. They use neither
# the OFF panels nor our other augmentations.
_COMPETITION = (
    "--stem none --canvas on --subtract none --normalise --compress none --mixup 1.0 --mixup-epochs {most_epochs} "
    "--mix-target or --cutmix 0 --erase 0 --roll-frequency 0 --shift-time 0 --gain 0 --offset 0 --flip-time 0.5"
)
_NANO = "--model swin_nano --pretrained none"
# The seed's cosine schedule ends with the training, whatever the number of epochs.
_SEED = "--preset seed --cosine-epochs 0"
# Swin-Small at 224 x 224 pixels is too slow for two cores. There the same recipes train a small network from scratch,
# with that network's learning rate.
RECIPES: dict[Form, tuple[Recipe, ...]] = {
    "cpu": (
        # In minutes on two cores these two learn nothing, which says nothing about the recipes. Trained only if named.
        Recipe("seed, nano", f"{_SEED} {_NANO} --height 112 --learning-rate 5e-4", is_default=False),
        Recipe(
            "competition, nano",
            f"--preset demo {_NANO} --learning-rate 5e-4 --height 56 --width 224 --sum-time-bins 13 {_COMPETITION}",
            is_default=False,
        ),
        Recipe(OURS, "--preset demo", epochs=8, uses_backgrounds=True),
        Recipe("ours, labelled", "--preset demo", is_default=False),
        # Shows what training adds: at this learning rate nothing is learnt.
        Recipe(UNTRAINED, "--preset demo --learning-rate 1e-12 --min-learning-rate 0", epochs=1),
    ),
    "gpu": (
        Recipe("seed", _SEED),
        Recipe("competition", f"--preset full {_COMPETITION}"),
        Recipe(OURS, "--preset full"),
        # The best recipe of the CPU form, in batches for a GPU.
        Recipe("ours, candidates", "--preset demo --batch-size 64"),
    ),
}


def quick(recipes: tuple[Recipe, ...]) -> tuple[Recipe, ...]:
    """The recipes with small canvases and batches, which train in seconds."""
    small = "--sum-time-bins 13 --height 28 --width 56 --batch-size 8"
    return tuple(dataclasses.replace(recipe, words=f"{recipe.words} {small}") for recipe in recipes)
