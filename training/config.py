"""A run's configuration, and which of its fields must not change when the run is resumed."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

from pipeline.augment import DrawConfig
from pipeline.canvas import CanvasConfig
from pipeline.loader import LoaderConfig
from shard_tools.errors import InputError
from shard_tools.storage.base import StoreConfig
from training.model import ModelConfig

Preset = Literal["demo", "seed", "full", "fine"]
Tracker = Literal["wandb", "tensorboard", "none"]
_NEEDLES = 0.5  # share of the backgrounds that get a needle


@dataclass(frozen=True)
class TrainConfig:
    """Train a model on one fold of one or several data sets of shards."""

    shards: tuple[str, ...]
    """Folder or URL (s3://, gs://, https://, file://) with manifest.json, as `python -m shard_tools pack` writes it.
    Several are read as one data set: their shapes and numbers of folds must be equal, and every key unique."""
    run_dir: Path
    """Folder for everything that the run writes."""
    backgrounds: tuple[str, ...] = ()
    """Folders or URLs like those of --shards, with cadences without needles, labelled or not. All of both splits are
    trained on, with signals added as --needles says; --shards then only serves for validation. Give an observation to
    both options: a fold of its snippets is kept back for validation, and needles are added to these once."""
    preset: Preset = "full"
    """Defaults of the other options. demo: trains in minutes on a CPU. seed: the recipe of the project that
    Needlestream is based on, with its faults corrected. full: for the Kaggle data on a GPU. fine: for snippets that
    `ingest` cut from a fine-resolution product, with --backgrounds."""
    fold: int | Literal["all"] = 0
    """Fold to validate on; the others train. all: every fold in turn, each a run of its own in run-dir/fold0,
    run-dir/fold1, ...; then oof.csv and cv.json put their scores together."""
    epochs: int = 5
    """Passes over the training folds, or over the backgrounds; each pass adds other signals."""
    batch_size: int = 32
    """Cadences of one rank in one forward pass."""
    accumulate: int = 1
    """Forward passes summed into one step."""
    eval_batch_size: int = 64
    """Cadences of one rank in one forward pass of validation."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    resume: bool = False
    """Go on from the last checkpoint in the run folder, if there is one."""
    override: tuple[str, ...] = ()
    """With resume, the fields of config.json that may differ from those the run was started with."""
    sampling: Literal["uniform", "weighted"] = "uniform"
    """uniform: every training cadence once an epoch. weighted: as many draws with replacement, by class weights."""
    class_weights: tuple[float, float] | None = None
    """With weighted sampling, the weights of a cadence without and of one with a needle; unset: both classes are drawn
    equally often."""
    optimiser: Literal["adamw", "adam"] = "adamw"
    """AdamW applies weight decay directly to the weights; Adam adds it to the gradient."""
    learning_rate: float = 1e-4
    """Highest learning rate."""
    min_learning_rate: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 0.0
    """Epochs in which the learning rate rises from min-learning-rate; may be a fraction."""
    cosine_epochs: float = 0.0
    """Epoch at which the cosine ends; 0: the end of the training."""
    weight_decay: float = 0.05
    """Weight decay of all weights except biases, norms and those the model exempts (such as Swin's relative position
    tables); with adam, of all weights."""
    clip: float = 1.0
    """Largest norm of the gradient of a step; 0 clips nothing."""
    ema: float = 0.0
    """Decay per step of a moving average of the weights, which is validated and saved; 0: no average."""
    precision: Literal["auto", "bf16", "fp16", "float32"] = "auto"
    """Precision of the forward pass. auto: bf16 if the hardware has it, else fp16 on a GPU, else float32."""
    compile: bool = False
    """Compile the model with torch.compile: takes two minutes, then a Swin-Small trains 3 times as fast on an H100."""
    tracker: tuple[Tracker, ...] = ("wandb",)
    """Where figures, pictures and the best candidates go besides the run folder; one name or several. wandb: Weights &
    Biases, online if you are logged in and the server answers within WANDB_INIT_TIMEOUT seconds (6), else as files in
    the run folder. tensorboard: event files in run-dir/tensorboard. none: nowhere."""
    report: bool = True
    """Write report.html at the end: one page of curves, scores and pictures, made in a few seconds."""
    checkpoint_every: int = 0
    """Steps between checkpoints within an epoch; 0: none by number of steps. Each epoch ends with one in any case."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints within an epoch; 0: none by time."""
    model: tyro.conf.OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    canvas: tyro.conf.OmitArgPrefixes[CanvasConfig] = field(default_factory=CanvasConfig)
    draws: tyro.conf.OmitArgPrefixes[DrawConfig] = field(default_factory=DrawConfig)
    loader: tyro.conf.OmitArgPrefixes[LoaderConfig] = field(default_factory=LoaderConfig)
    store: tyro.conf.OmitArgPrefixes[StoreConfig] = field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", listed(self.shards))
        object.__setattr__(self, "backgrounds", listed(self.backgrounds))
        object.__setattr__(self, "tracker", listed(self.tracker))
        self._check_trackers()
        self._settle_needles()
        for name in ("epochs", "batch_size", "accumulate", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        if self.fold != "all" and self.fold < 0:
            raise InputError(f"--fold {self.fold}: expected at least 0, or all")
        at_least_zero = ("seed", "warmup_epochs", "cosine_epochs", "weight_decay", "clip")
        for name in (*at_least_zero, "checkpoint_every", "checkpoint_minutes"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 0")
        if not self.learning_rate > 0 or not 0 <= self.min_learning_rate <= self.learning_rate:
            raise InputError(
                f"--learning-rate {self.learning_rate} --min-learning-rate {self.min_learning_rate}: "
                "expected 0 <= min-learning-rate <= learning-rate, and above 0"
            )
        if self.draws.flip_time and not self.model.sees_time_reversed:
            raise InputError(
                f"--flip-time {self.draws.flip_time}: expected 0 with --stem {self.model.stem}, which follows time"
            )
        if not 0 <= self.ema < 1:
            raise InputError(f"--ema {self.ema}: expected 0 to below 1")

    def _check_trackers(self) -> None:
        names = self.tracker
        wrong = set(names) - set(get_args(Tracker)) or len(set(names)) < max(len(names), 1)
        if wrong or ("none" in names and len(names) > 1):
            raise InputError(
                f"--tracker {' '.join(names)}: expected none alone, or each of wandb and tensorboard at most once"
            )

    def _settle_needles(self) -> None:
        """Check the options that go with --backgrounds, and set the default of --needles."""
        needles = self.draws.needles
        if not self.backgrounds:
            if needles is not None:
                raise InputError(f"--needles {needles}: needs --backgrounds; use --inject with labelled cadences")
            return
        if self.sampling != "uniform":
            raise InputError(f"--sampling {self.sampling}: expected uniform with --backgrounds, which have no classes")
        if needles is None:
            object.__setattr__(self, "draws", dataclasses.replace(self.draws, needles=_NEEDLES))
        elif not 0 < needles < 1:
            raise InputError(f"--needles {needles}: expected more than 0 and less than 1 with --backgrounds")

    @property
    def held_out(self) -> int:
        """The fold to validate on, of a run of one fold."""
        if self.fold == "all":
            raise ValueError("fold is 'all': cross_validation.plan_folds makes one configuration for each fold")
        return self.fold


# These may change when a run is resumed: they set where and how fast it runs, not what it computes. Batch size,
# accumulation and ranks may change as long as their product, the global batch, stays the same.
_FREE_FIELDS = (
    "run_dir", "shards", "backgrounds", "resume", "override", "tracker", "report", "loader", "store",
    "checkpoint_every", "checkpoint_minutes", "eval_batch_size", "compile", "batch_size", "accumulate",
)  # fmt: skip


_OF_BACKGROUNDS = ("needles", "signal_snr_min", "signal_snr_max", "permute_panels")


def listed(value: Any) -> Any:
    """One folder, URL or name as a tuple of one; anything else unchanged."""
    return (str(value),) if isinstance(value, str | Path) else value


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """A configuration as plain JSON values; a single data set or tracker is a string, as in older runs."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    for name in ("shards", "tracker"):
        plain[name] = plain[name][0] if len(plain[name]) == 1 else plain[name]
    if not config.backgrounds:
        # Runs from before --backgrounds existed lack these, and can still be resumed.
        del plain["backgrounds"]
        unset = json.loads(json.dumps(dataclasses.asdict(DrawConfig())))
        for name in _OF_BACKGROUNDS:
            if plain["draws"][name] == unset[name]:
                del plain["draws"][name]
    return plain


def run_identity(
    config: TrainConfig, shards_identity: str, world_size: int, backgrounds_identity: str | None = None
) -> dict[str, Any]:
    """What config.json holds: the configuration, and other values that must not change when a run is resumed."""
    global_batch = config.batch_size * config.accumulate * world_size
    identity = {**to_dict(config), "global_batch": global_batch, "shards_identity": shards_identity}
    return identity if backgrounds_identity is None else {**identity, "backgrounds_identity": backgrounds_identity}


def check_same_run(old: dict[str, Any], new: dict[str, Any], run_dir: Path, override: Sequence[str]) -> None:
    """Refuse to go on with a run under another configuration, except for the fields in `override`.

    Raises InputError naming the differences.
    """
    unknown = sorted(set(override) - new.keys())
    if unknown:
        raise InputError(f"--override {' '.join(unknown)}: expected names of config.json, like learning_rate or draws")
    differences = {
        name: f"{name}: {old.get(name)!r} then, {new.get(name)!r} now"
        for name in sorted(old.keys() | new.keys())
        if name not in (*_FREE_FIELDS, *override) and old.get(name) != new.get(name)
    }
    if differences:
        raise InputError(
            f"{run_dir}: holds a run of another configuration ({'; '.join(differences.values())}); choose another "
            f"--run-dir, delete this one, or allow the change with --override {' '.join(differences)}"
        )
