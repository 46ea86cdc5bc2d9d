"""Few-shot learning with LGM-Net, which reads a few labelled images and generates the weights of their classifier.

    from lgm_dist import Config, evaluate, fit, load, open_bank

    run = fit(Config.of(data="glyphs", epochs=1, steps_per_epoch=300, workers=0))  # trains; the folder of the run
    learner = load(run)  # the checkpoint that was best on val
    bank = open_bank("data/glyphs/glyphs.json", "test")  # images of classes that it has never seen
    print(evaluate(learner.model, bank, learner.config, "test", episodes=600).score)

    classifier = learner.adapt("photos/")  # a folder of class folders, with any number of photos a class
    print(classifier.report(), classifier.predict(["new.jpg"])[0].label)

A name is imported when it is first used, so that `import lgm_dist` loads no other library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lgm_dist.adapt.classifier import Classifier
    from lgm_dist.adapt.learner import Learner, learners, load
    from lgm_dist.cluster.fit import fit
    from lgm_dist.config import Config
    from lgm_dist.data import open_bank, sample_episodes
    from lgm_dist.model import LGMNet
    from lgm_dist.training.evaluation import evaluate

__version__ = "0.1.0"
__all__ = [
    "Classifier",
    "Config",
    "LGMNet",
    "Learner",
    "__version__",
    "evaluate",
    "fit",
    "learners",
    "load",
    "open_bank",
    "sample_episodes",
]

_MODULES = {
    "Classifier": "lgm_dist.adapt.classifier",
    "Config": "lgm_dist.config",
    "LGMNet": "lgm_dist.model",
    "Learner": "lgm_dist.adapt.learner",
    "evaluate": "lgm_dist.training.evaluation",
    "fit": "lgm_dist.cluster.fit",
    "learners": "lgm_dist.adapt.learner",
    "load": "lgm_dist.adapt.learner",
    "open_bank": "lgm_dist.data",
    "sample_episodes": "lgm_dist.data",
}
"""Public names and the modules that define them."""


def __getattr__(name: str) -> Any:
    """Import a public name at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'lgm_dist' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    """The public names, for tab completion."""
    return sorted(__all__)
