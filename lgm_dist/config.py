"""Configuration of a run: frozen groups of settings, checked at construction. Standard library only.

A `Config` holds one group per topic: `data`, `episodes`, `pretraining`, `generator`, `model`, `optim` and `run`. Each setting
also has a flag name, which the command line, sweeps and Weights & Biases use: `ways` for `config.episodes.ways`, `model.norm`
for `config.model.norm`.
`Config.of` and `Config.replace` take settings by flag name.

A wrong value raises ValueError with the setting, the value and the fix, before Ray starts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lgm_dist import checks
from lgm_dist.settings import (
    SPLITS,
    DataConfig,
    EpisodesConfig,
    EpisodeShape,
    GeneratorConfig,
    ModelConfig,
    OptimConfig,
    PretrainingConfig,
    Protocol,
    RunConfig,
    Split,
)

__all__ = [
    "GROUPS",
    "PRESETS",
    "SETTINGS",
    "SPLITS",
    "Config",
    "DataConfig",
    "EpisodeShape",
    "EpisodesConfig",
    "GeneratorConfig",
    "ModelConfig",
    "OptimConfig",
    "PretrainingConfig",
    "Protocol",
    "RunConfig",
    "Setting",
    "Split",
    "differing",
    "find_setting",
    "marked",
]


@dataclass(frozen=True)
class Config:
    """One training run."""

    data: DataConfig = field(default_factory=DataConfig)
    episodes: EpisodesConfig = field(default_factory=EpisodesConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.run.stages != ("pretraining",):
            self._check_workers("meta_batch", self.episodes.meta_batch)
        if "pretraining" in self.run.stages:
            self._check_workers("pretraining.batch", self.pretraining.batch)

    def _check_workers(self, name: str, size: int) -> None:
        """Raise ValueError unless the workers can share a step's `size` items; `name` is the setting of this number."""
        workers, most = self.run.workers, self.run.max_workers
        if most and not 0 < workers <= most <= size:
            raise ValueError(
                f"max_workers ({most}) must lie between workers ({workers}), which is at least 1, and "
                f"{name} ({size}); give --workers MIN:MAX"
            )
        if workers and not most and size % workers:
            below = size // workers * workers
            fix = " or ".join(str(m) for m in (below, below + workers) if m)
            raise ValueError(f"{name} ({size}) must be divisible by workers ({workers}); use {fix}")

    @classmethod
    def of(cls, **settings: Any) -> Config:
        """A configuration from settings by flag name, such as `Config.of(data="fc100", ways=5, workers=2)`.

        A whole group is accepted too: `Config.of(ways=5, model=ModelConfig(filters=32))`. Raises ValueError as `replace`.
        """
        return cls().replace(**settings)

    def replace(self, **settings: Any) -> Config:
        """A copy with other settings, by flag name; write `**{"model.norm": "group"}` for a name with a dot.

        Raises ValueError for an unknown name or a wrong value.
        """
        changed: dict[str, dict[str, Any]] = {}
        groups: dict[str, Any] = {}
        for name, value in settings.items():
            if isinstance(value, GROUPS.get(name, ())):
                groups[name] = value
            else:
                place = find_setting(name)
                changed.setdefault(place.group, {})[place.field.name] = value
        for group, values in changed.items():
            groups[group] = dataclasses.replace(groups.get(group, getattr(self, group)), **values)
        return dataclasses.replace(self, **groups)

    def episode(self, split: Split) -> EpisodeShape:
        """Ways, shots and queries of an episode of this split."""
        return self.episodes.shape(split)

    @property
    def run_name(self) -> str:
        """`run.name`, or a name made from the settings that people compare."""
        if self.run.name:
            return self.run.name
        data, e = self.data.name.rsplit("/", 1)[-1].removesuffix(".json"), self.episodes
        return f"{data}-{e.ways}w{e.shot}s-{e.protocol}-seed{self.run.seed}"

    def flat(self) -> dict[str, Any]:
        """Every setting by its flag name."""
        return {name: getattr(getattr(self, place.group), place.field.name) for name, place in SETTINGS.items()}

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of plain values by group. `from_dict` reads it back, also after JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The configuration that `to_dict` wrote, or one from a version without groups, which wrote flag names.

        Missing settings take their defaults. Raises ValueError for an unknown setting or a value of another type.
        """
        flat: dict[str, Any] = {}
        for key, value in values.items():
            if key in GROUPS and isinstance(value, dict):
                flat |= {_flag_of(key, name): entry for name, entry in value.items()}
            elif key in GROUPS and key not in SETTINGS:
                raise ValueError(f"{key} ({value!r}) must be a dictionary of settings")
            else:
                flat[key] = value
        return cls.of(**{name: checks.typed(name, value, find_setting(name).default) for name, value in flat.items()})


class Setting(NamedTuple):
    """Where a setting lies."""

    group: str
    field: dataclasses.Field[Any]

    @property
    def default(self) -> Any:
        """Its default value."""
        return self.field.default


GROUPS: dict[str, type[Any]] = {
    "data": DataConfig,
    "episodes": EpisodesConfig,
    "pretraining": PretrainingConfig,
    "generator": GeneratorConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "run": RunConfig,
}


def _flag_of(group: str, name: str) -> str:
    """The flag name of a field of a group; an unknown field keeps its dotted name."""
    known = {f.name: f for f in dataclasses.fields(GROUPS[group])}
    if group in ("model", "pretraining", "generator") or name not in known:
        return f"{group}.{name}"
    return known[name].metadata["flag"] or name


SETTINGS: dict[str, Setting] = {
    _flag_of(group, f.name): Setting(group, f) for group, cls in GROUPS.items() for f in dataclasses.fields(cls)
}
"""Every setting by its flag name."""


def find_setting(name: str) -> Setting:
    """The setting with this flag name. Raises ValueError for an unknown name, with the most similar one."""
    if name not in SETTINGS:
        raise ValueError(f"{name} is no setting; {checks.did_you_mean(name, SETTINGS)}")
    return SETTINGS[name]


def marked(mark: str) -> set[str]:
    """Flag names of the settings with this mark, such as `resumable` (see `setting`)."""
    return {name for name, place in SETTINGS.items() if place.field.metadata[mark]}


def differing(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The differing settings in words, such as "shot 1, not 5, lr 0.1, not 0.2"; empty if there are none."""
    return ", ".join(f"{name} {theirs[name]!r}, not {ours[name]!r}" for name in ours if theirs[name] != ours[name])


_PRETRAINED = ModelConfig(
    generator="none", head="class_means", rotations=4, blocks=2, pool=3, power=0.5, centre=True, shrinkage=0.65
)
_STRONG = Config.of(
    data="fc100",
    stages=("pretraining",),
    name="strong",
    model=dataclasses.replace(_PRETRAINED, generator="base_directions"),
    eval_copies=5,
    eval_flips=True,
    **{"pretraining.steps": 10_000, "pretraining.eval_every": 2500},
)
PRESETS: dict[str, Config] = {
    "paper": Config(),
    "strong": _STRONG,
    "quick": _STRONG.replace(name="quick", **{"pretraining.steps": 1800, "pretraining.eval_every": 1800}),
    "demo": Config.of(
        data="glyphs",
        stages=("pretraining",),
        name="demo",
        model=_PRETRAINED,
        **{
            "pretraining.batch": 64,
            "pretraining.steps": 400,
            "pretraining.eval_every": 200,
            "pretraining.augmentations": ("crop",),
        },
    ),
}
"""Named starting points of `lgm-dist train --preset`; single flags override them."""
