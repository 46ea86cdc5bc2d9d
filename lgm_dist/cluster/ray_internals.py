"""The private names of Ray that this package uses, to start fewer helper actors. Training works without any of them.

No other module uses private names of Ray. If Ray drops or renames one of these, it starts the helper actors again.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer

try:
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
except ImportError:
    FixedScalingPolicy = object  # type: ignore[assignment, misc]


class LeanTrainer(TorchTrainer):
    """A TorchTrainer that does not start the actors that a run has no use for.

    That is the actor for Ray Data. If the run is `alone` in a local Ray, which ends with it, these are also the actor that
    cleans up after a dead controller and the one that asks an autoscaler for nodes.
    """

    def __init__(self, *arguments: Any, alone: bool, **settings: Any) -> None:
        self._alone = alone
        super().__init__(*arguments, **settings)

    def _create_default_callbacks(self) -> list[Any]:
        """Leave out unused callbacks. Without it two more actors run, one of which logs a line a second."""
        unused = {"DatasetsCallback", *(("PlacementGroupCleanerCallback",) if self._alone else ())}
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]  # Ray's types show the old class
        return [callback for callback in callbacks if type(callback).__name__ not in unused]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        """Replace the scaling policy. Without it each start waits for the actor that asks the autoscaler."""
        if self._alone and type(settings.get("scaling_policy")) is FixedScalingPolicy and _hooks_exist():
            settings["scaling_policy"] = _NoAutoscaler(self.scaling_config)  # type: ignore[arg-type]  # as above
        return super()._initialize_and_run_controller(**settings)  # type: ignore[misc]  # as above


class _NoAutoscaler(FixedScalingPolicy):
    """A FixedScalingPolicy that does not ask an autoscaler for nodes, which a local Ray does not have."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


def _hooks_exist() -> bool:
    """Return True if Ray's policy still has the methods that `_NoAutoscaler` overrides."""
    return all(hasattr(FixedScalingPolicy, name) for name in vars(_NoAutoscaler) if not name.startswith("__"))
