"""The settings of the task `generator`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from lgm_dist import checks
from lgm_dist.settings.mark import setting

Variants = Literal["none", "rotations", "channels", "all"]


@dataclass(frozen=True)
class GeneratorConfig:
    """Episodes over the stored features of a frozen backbone. Its flags begin with `generator.`."""

    prefix: ClassVar[str] = "generator."

    copies: int = setting(4, most=1000)
    """Augmented copies of each training image whose features are stored; an episode draws one of them for each image.
    Without augmentation there is one, the image itself."""
    variants: Variants = setting("none")
    """Made-up classes: each training class also turned by 90, 180 and 270 degrees (rotations), with its colour channels
    exchanged in turn (channels), or both (all). Each variant of a class is a class."""
    alternate_shot: int = setting(0, most=65_536)
    """Support images of each class at every second step (0: shot at all steps)."""

    def __post_init__(self) -> None:
        checks.positive(self, "copies")
        checks.not_negative(self, "alternate_shot")
        checks.choice(self, "variants", get_args(Variants))
