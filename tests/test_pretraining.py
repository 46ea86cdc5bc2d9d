"""The task `pretraining`: its loss, optimizers and averages against plain torch; runs of it resume bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stages import bits, history, train
from torch import Tensor, nn
from worker_processes import run_workers

from lgm_dist.cluster.fit import fit
from lgm_dist.config import Config, ModelConfig, PretrainingConfig
from lgm_dist.data import open_bank
from lgm_dist.model import LGMNet, build_model
from lgm_dist.runs import checkpoint
from lgm_dist.runs.checkpoint import TrainState
from lgm_dist.runs.folder import read_result
from lgm_dist.runs.job import make_job
from lgm_dist.runs.load import load_run, start_from
from lgm_dist.runs.metrics import read_metrics
from lgm_dist.training import averaging, schedule
from lgm_dist.training.pretraining_task import Batch, Pretraining
from lgm_dist.training.step import train_step
from lgm_dist.training.worker import Worker

OUTPUTS = 24
"""Six classes in four rotations."""


@pytest.fixture
def config(small: Config, tmp_path: Path) -> Config:
    return small.replace(
        stages=("pretraining",),
        storage=str(tmp_path),
        name="run",
        model=ModelConfig(channels=3, filters=8, noise_size=4, generator="none", head="class_means"),
        **{
            "pretraining.batch": 8,
            "pretraining.steps": 12,
            "pretraining.eval_every": 4,
            "pretraining.augmentations": ("flip_shift",),
        },
    )


def task(config: Config, worker: Worker | None = None, tiny: Path | None = None) -> Pretraining:
    banks = {"train": open_bank(str(tiny or config.data.name), "train")}
    return Pretraining(config, banks, worker or Worker())  # type: ignore[arg-type]


def network(config: Config) -> LGMNet:
    return build_model(config.replace(**{"model.base_outputs": OUTPUTS}).model, 0)


def by_hand(model: LGMNet, images: Tensor) -> Tensor:
    """Logits of a network in training mode, layer by layer, with torch's own batch norm."""
    x = images
    for i, (conv, norm) in enumerate(zip(model.backbone.convs, model.backbone.norms, strict=True)):  # type: ignore[arg-type, attr-defined]
        y = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
        mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), unbiased=False, keepdim=True)
        y = (y - mean) / (var + 1e-3).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        x = nn.functional.max_pool2d(y.relu(), 2, ceil_mode=True) if i < 3 else y.relu()
    assert model.classifier is not None
    return x.mean((2, 3)) @ model.classifier.weight.T + model.classifier.bias


def test_a_step_equals_one_by_hand(config: Config) -> None:
    """Cross-entropy with label smoothing and SGD with Nesterov momentum, in float64, for three steps."""
    config = config.replace(
        **{"pretraining.label_smoothing": 0.1, "model.kernels": "reference", "pretraining.lr": 0.05}
    )
    of, ours, theirs = task(config), network(config).double(), network(config).double()
    module, optimizer = of.module(ours).train(), of.optimizer(ours)
    velocity: dict[str, Tensor] = {}
    for step in range(3):
        images, labels = of.batch(step)[:2]
        images = images.double()
        of.set_rates(optimizer, step)
        optimizer.zero_grad()
        loss, accuracy = of.loss(module, Batch(images, labels, labels, 1.0))
        loss.backward()
        optimizer.step()

        logits = by_hand(theirs, images)
        log_p = logits - logits.logsumexp(1, keepdim=True)
        expected = -(0.9 * log_p.gather(1, labels[:, None])[:, 0] + 0.1 * log_p.mean(1)).mean()
        theirs.zero_grad()
        expected.backward()
        rate = 0.05 * (1 + math.cos(math.pi * step / 12)) / 2
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                if p.grad is not None:
                    grad = p.grad + 5e-4 * p
                    velocity[name] = 0.9 * velocity[name] + grad if name in velocity else grad
                    p -= rate * (grad + 0.9 * velocity[name])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert accuracy.item() == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9), name


def test_mixup_mixes_images_of_the_step_whatever_the_workers(config: Config) -> None:
    config = config.replace(**{"pretraining.mixup": 0.4, "pretraining.rotations": 1})
    plain = task(config.replace(**{"pretraining.mixup": 0.0}))
    shares = []
    for step in range(40):
        whole, pure = task(config).batch(step), plain.batch(step)
        halves = [task(config, Worker(rank, 2)).batch(step) for rank in range(2)]
        assert torch.equal(whole.images, torch.cat([half.images for half in halves]))
        assert torch.equal(whole.others, torch.cat([half.others for half in halves]))
        shift = next(
            s for s in range(1, 8) if torch.equal(whole.others, pure.labels.roll(-s)) and _mixed(whole, pure, s)
        )
        assert 1 <= shift < 8
        shares.append(whole.share)
    # Beta(0.4, 0.4): mean 1/2, variance 1 / (4 * 1.8); 40 draws are within 3 standard errors of both
    assert sum(shares) / 40 == pytest.approx(0.5, abs=3 * (1 / 7.2 / 40) ** 0.5)
    assert all(0 <= share <= 1 for share in shares)


def _mixed(whole: Batch, pure: Batch, shift: int) -> bool:
    expected = whole.share * pure.images + (1 - whole.share) * pure.images.roll(-shift, 0)
    return torch.allclose(whole.images, expected, atol=1e-5)


def test_the_loss_of_mixed_labels(config: Config) -> None:
    of = task(config)
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 3.0]])
    labels, others = torch.tensor([0, 2]), torch.tensor([1, 0])
    log_p = [[x - math.log(sum(math.exp(y) for y in row)) for x in row] for row in logits.tolist()]
    expected = -(0.7 * (log_p[0][0] + log_p[1][2]) + 0.3 * (log_p[0][1] + log_p[1][0])) / 2
    loss, accuracy = of.loss(_Constant(logits), Batch(torch.zeros(2, 3, 16, 16), labels, others, 0.7))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert accuracy.item() == 1


class _Constant(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, _: Tensor) -> Tensor:
        return self.logits


def test_distillation_is_the_divergence_from_the_teacher_at_a_temperature(config: Config) -> None:
    config = config.replace(**{"pretraining.teacher": "some run", "pretraining.distillation": 0.25})
    of, teacher = task(config), network(config).eval()
    of.begin(lambda folder: teacher if folder == "some run" else pytest.fail(folder))
    images, labels, *_ = batch = of.batch(0)
    logits = torch.randn(len(labels), OUTPUTS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert teacher.classifier is not None
        wanted = teacher.classifier(teacher.backbone(images, 1).mean((2, 3)))
    p, q = ((x / 4).double().softmax(1) for x in (wanted, logits))
    divergence = 16 * (p * (p / q).log()).sum(1).mean()
    entropy = nn.functional.cross_entropy(logits.double(), labels)
    loss = of.loss(_Constant(logits), batch)[0]
    assert loss.item() == pytest.approx((0.75 * entropy + 0.25 * divergence).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"steps": 8}, {0: 0.1, 4: 0.05, 7: 0.05 * (1 + math.cos(math.pi * 7 / 8))}),
        ({"steps": 10, "warmup": 2}, {0: 0.05, 1: 0.1, 2: 0.1, 6: 0.05}),
        ({"steps": 10, "schedule": "step"}, {0: 0.1, 5: 0.1, 6: 0.01, 7: 0.01, 8: 0.001, 9: 0.001}),
    ],
)
def test_the_learning_rate(settings: dict[str, Any], rates: dict[int, float]) -> None:
    config = PretrainingConfig(**settings)
    assert {step: schedule.pretraining_rate(config, step) for step in rates} == pytest.approx(rates)


def test_averages_of_weights_against_a_loop_and_the_exchange() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.SGD([weight], 0.5)
    averaging.keep_averages(optimizer, 0.8)
    average = None
    for step in range(4):
        weight.grad = torch.tensor([0.1 * step, 1.0])
        optimizer.step()
        now = weight.detach().clone()
        average = now if average is None else 0.8 * average + 0.2 * now
    averaging.exchange(optimizer)
    assert torch.allclose(weight, average)  # type: ignore[arg-type]
    averaging.exchange(optimizer)
    assert torch.equal(weight, now)


def test_gradients_that_are_not_finite_change_no_weight(config: Config) -> None:
    """torch's fused SGD heeds `found_inf`; the loop relies on it."""
    of, model = task(config), network(config)
    optimizer = of.optimizer(model)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def losses(worker: Worker, config: Config) -> list[float]:
    """The loss of five steps in float64."""
    of = task(config, worker)
    model = network(config).double()
    model.reduce_over(worker.all_reduce)
    optimizer = of.optimizer(model)
    module = of.module(model).train()
    parallel, found = worker.data_parallel(module), []
    for step in range(5):
        batch = of.batch(step)
        batch = batch._replace(images=batch.images.double())
        figures = train_step(of, parallel, optimizer, batch, step, of.slice_of(0).weight)
        found.append(worker.mean(figures)[0].item())
    return found


@pytest.mark.parametrize("batch", [8, 7])
def test_two_workers_take_the_steps_of_one(config: Config, tmp_path: Path, batch: int) -> None:
    """7 images are shared unevenly, as elastic workers do."""
    config = config.replace(**{"pretraining.batch": batch, "pretraining.mixup": 0.3, "pretraining.ema": 0.9})
    alone = run_workers(1, tmp_path / "1", losses, config)[0]
    both = run_workers(2, tmp_path / "2", losses, config)
    assert both[0] == both[1] == pytest.approx(alone, rel=1e-12)


STAGES = {
    "one stage": {"stages": ("pretraining",)},
    "two stages": {"stages": ("pretraining", "episodes"), "epochs": 1, "steps_per_epoch": 6, "eval_every": 3},
    "with averages": {"stages": ("pretraining", "episodes"), "pretraining.ema": 0.7, "steps_per_epoch": 3, "epochs": 1},
}


@pytest.mark.parametrize(
    ("name", "stop_before", "kept"),
    [("one stage", 6, 5), ("two stages", 15, 12), ("with averages", 6, 5), ("with averages", 15, 12)],
)
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(
    config: Config, name: str, stop_before: int, kept: int, tmp_path: Path
) -> None:
    """After 5 steps, and at the end of the first stage. A heartbeat comes before each step and evaluation."""
    config = config.replace(**STAGES[name])
    whole = train(config.replace(storage=str(tmp_path / "whole")))
    config = config.replace(storage=str(tmp_path / "stopped"))
    run = train(config, stop_before)
    assert not (run / "result.json").exists()
    checkpoint.drop_after(run, kept)
    assert checkpoint.newest(run).name == f"step-{kept:08d}"
    train(config)
    assert history(run) == history(whole)
    last = checkpoint.newest(whole).name
    assert bits(run)[last] == bits(whole)[last]
    assert read_result(run)["test/accuracy"] == read_result(whole)["test/accuracy"]


def test_a_run_learns_its_classes_and_is_evaluated_without_generated_weights(config: Config) -> None:
    config = config.replace(**{"pretraining.steps": 60, "pretraining.eval_every": 20, "pretraining.rotations": 1})
    run = fit(config)
    rows = read_metrics(run)
    assert sum(row["train/accuracy"] for row in rows[-5:]) / 5 > 0.5, "chance is 1/6"
    assert [row["step"] for row in rows if "val/accuracy" in row] == [20, 40, 60]
    assert {"speed/images_per_s"} == {key for key in rows[0] if key.startswith("speed/")}
    loaded = load_run(run)
    assert loaded.model.classifier is not None
    assert loaded.model.classifier.out_features == loaded.config.model.base_outputs == 6
    assert (run / "curves.png").exists()

    more = config.replace(name="more", start=str(run), stages=("episodes",), steps_per_epoch=2, lr=1e-30, lr_min=0.0)
    trained = load_run(train(more)).model
    assert torch.equal(trained.backbone.convs[0].weight, loaded.model.backbone.convs[0].weight)  # type: ignore[attr-defined]


def test_a_later_stage_decides_which_checkpoint_is_best(config: Config) -> None:
    run = train(config.replace(**STAGES["two stages"]))
    states = checkpoint.states_of(run)
    assert [state.stage for state in states.values()][-1] == 1
    assert checkpoint.read_state(checkpoint.best(run)).stage == 1
    assert read_result(run)["step"] > 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "nowhere"}, "nowhere has no checkpoint"),
        ({"pretraining.teacher": "nowhere"}, "nowhere has no checkpoint"),
        ({"workers": 3}, r"pretraining.batch \(8\) must be divisible by workers \(3\); use 6 or 9"),
    ],
)
def test_what_does_not_fit_is_refused(config: Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(config.replace(**changes))


def test_a_teacher_of_other_classes_and_a_start_of_another_backbone_are_refused(config: Config) -> None:
    other = config.replace(name="other", **{"pretraining.rotations": 1, "pretraining.steps": 1, "test_episodes": 0})
    run = str(train(other))
    with pytest.raises(ValueError, match="classifies 6 base classes, this run 24"):
        fit(config.replace(**{"pretraining.teacher": run}))
    with pytest.raises(ValueError, match=r"has another backbone .*8 filters.* than this run .*16"):
        fit(config.replace(start=run, **{"model.filters": 16}))


def test_a_run_starts_from_a_backbone_with_or_without_dropping(config: Config) -> None:
    resnet = {"model.backbone": "resnet12", "model.filters": 4, "pretraining.steps": 1, "test_episodes": 0}
    dropping = config.replace(name="drops", **resnet, **{"model.drop_block": 0.1})
    source = train(dropping)
    theirs, model = load_run(source).model, build_model(config.replace(**resnet).model)
    start_from(source, model)
    for name, tensor in model.backbone.state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(tensor, theirs.backbone.state_dict()[name]), name  # type: ignore[attr-defined]
    again = build_model(dropping.model)
    start_from(train(config.replace(name="whole", **resnet)), again)
    calls = [t for name, t in again.backbone.state_dict().items() if name.endswith(".calls")]  # type: ignore[attr-defined]
    assert [int(count) for count in calls] == [0] * len(calls) != []


GENERATING = {"stages": ("generator",), "model.generator": "low_rank"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.generator": "lgm"}, r"model.generator \('lgm'\) is not trained by stage pretraining"),
        ({"model.norm_scope": "episode"}, "does not suit stage pretraining"),
        ({"stages": ("episodes",), "model.pool": 1, "model.centre": True}, "need statistics of a backbone"),
        ({"stages": ("episodes",), "model.generator": "gram"}, "needs to know the base classes"),
        ({"stages": ("episodes",), "pretraining.teacher": "run"}, "needs a stage pretraining"),
        (GENERATING, "needs a trained backbone"),
        (GENERATING | {"start": "run", "model.generator": "none", "model.head": "cosine"}, "has weights to train"),
        (GENERATING | {"start": "run", "generator.alternate_shot": 50}, "lower shot"),
        ({"model.drop_block": 0.1}, "are for resnet12, not for conv4"),
        ({"classes": "held_out"}, "needs classes that pretraining has left out"),
    ],
)
def test_what_does_not_suit_a_stage_is_refused_before_the_run_starts(
    config: Config, changes: dict[str, Any], message: str
) -> None:
    config = config.replace(**changes)
    with pytest.raises(ValueError, match=message):
        make_job(config)
    assert not (Path(config.run.storage) / config.run_name).exists()


def test_the_best_checkpoint_is_an_evaluated_one() -> None:
    states = [
        TrainState(6, 0.4, 0.01, 0),
        TrainState(8, 0.3, 0.01, 1),
        TrainState(9, stage=1),
        TrainState(4, 0.5, 0.01, 0),
    ]
    assert [state.step for state in sorted(states, key=lambda state: state.rank)] == [9, 6, 4, 8]
