"""The training step against TensorFlow's Adam and a plain network, evaluation against a loop over episodes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.steps import train_step
from helpers.threads import Threads
from reference import EagerLGMNet
from torch import Tensor, nn

from lgm_dist.bench import steps
from lgm_dist.config import Config, ModelConfig, Protocol
from lgm_dist.data import EpisodeBatch, ImageBank, open_bank, sample_episodes
from lgm_dist.data.episodes import draw_noise
from lgm_dist.model import LGMNet
from lgm_dist.training.evaluation import Evaluation, Score, evaluate
from lgm_dist.training.schedule import learning_rate, make_optimizer, set_rates
from lgm_dist.training.worker import Worker

Array = npt.NDArray[np.float64]
Optimizer = torch.optim.Optimizer


def bank_of(config: Config, split: Any) -> ImageBank:
    return open_bank(config.data.name, split)


def build(config: Config, seed: int = 0) -> tuple[LGMNet, Optimizer]:
    torch.manual_seed(seed)
    model = LGMNet(config.model)
    return model, make_optimizer(model, config)


def batch_of(config: Config, step: int) -> EpisodeBatch:
    return sample_episodes(
        bank_of(config, "train"), config, "train", step * config.episodes.meta_batch, config.episodes.meta_batch
    )


# Learning rate and Adam


@pytest.mark.parametrize(
    ("step", "rate"),
    [  # 1e-3 / 1.11111**n with n = step // 1500, by bc
        (0, 1e-3),
        (1499, 1e-3),
        (1500, 9.000009000009e-4),
        (2999, 9.000009000009e-4),
        (3000, 8.100016200024e-4),
        (15_000, 3.4868192690e-4),
        (97_499, 1.1790939174e-6),
        (97_500, 1.0611855869e-6),
        (98_999, 1.0611855869e-6),
        (99_000, 1e-6),
        (119_999, 1e-6),
    ],
)
def test_learning_rate_of_the_paper(step: int, rate: float) -> None:
    assert learning_rate(Config(), step) == pytest.approx(rate, rel=1e-9)


def test_learning_rate_follows_a_division_every_1500_steps() -> None:
    rate, config = 1e-3, Config()
    for step in range(0, 102_000, 500):
        if step and step % 1500 == 0:
            rate = max(rate / 1.11111, 1e-6)
        assert learning_rate(config, step) == pytest.approx(rate, rel=1e-9), step
    constant = config.replace(lr_decay=1.0)
    assert {learning_rate(constant, step) for step in (0, 1500, 10**6)} == {1e-3}


def test_rates_are_set_for_each_step() -> None:
    optimizer = make_optimizer(nn.Linear(2, 2), Config())
    for step, epsilon in ((0, 3.1622776601683795e-7), (1, 1e-8 / math.sqrt(1 - 0.998001)), (100_000, 1e-8)):
        set_rates(optimizer, Config(), step)
        (group,) = optimizer.param_groups
        assert group["eps"] == pytest.approx(epsilon, rel=1e-12)
        assert group["lr"] == learning_rate(Config(), step)


def test_weight_decay_is_the_configurations_also_after_another_trials_checkpoint() -> None:
    theirs = make_optimizer(nn.Linear(2, 2), Config.of(weight_decay=0.5)).state_dict()
    optimizer = make_optimizer(nn.Linear(2, 2), Config.of(weight_decay=0.1))
    optimizer.load_state_dict(theirs)
    set_rates(optimizer, Config.of(weight_decay=0.1), 0)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


def tf_adam(value: Array, gradients: list[Array], rates: list[float], weight_decay: float = 0.0) -> list[Array]:
    """The values after each step, as tensorflow.train.AdamOptimizer has it: epsilon outside the bias correction."""
    m, v, values = np.zeros_like(value), np.zeros_like(value), []
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        value = value * (1 - rate * weight_decay)
        value = value - rate * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-8)
        values.append(value)
    return values


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_tensorflows(weight_decay: float) -> None:
    """Gradients of 1e-9 to 1: at the small end all depends on where epsilon is added."""
    config = Config.of(lr=1e-2, lr_decay=0.5, lr_decay_steps=3, weight_decay=weight_decay)
    random = np.random.default_rng(0)
    start = random.standard_normal(40)
    gradients = [random.standard_normal(40) * np.logspace(-9, 0, 40) for _ in range(8)]
    model = nn.Module()
    model.weight = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer, values = make_optimizer(model, config), []
    for step, gradient in enumerate(gradients):
        set_rates(optimizer, config, step)
        model.weight.grad = torch.from_numpy(gradient)
        optimizer.step()
        values.append(model.weight.detach().numpy().copy())
    rates = [1e-2] * 3 + [5e-3] * 3 + [2.5e-3] * 2
    for ours, theirs in zip(values, tf_adam(start, gradients, rates, weight_decay), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


# The training step


def in_float64(batch: EpisodeBatch) -> EpisodeBatch:
    return replace(batch, images=batch.images.double(), noise=batch.noise.double())


@pytest.mark.parametrize("protocol", ["standard", "paper"])
@pytest.mark.parametrize("noise", ["sample", "mean"])
def test_training_steps_against_a_plain_network_and_tensorflows_adam(
    small: Config, protocol: Protocol, noise: Any
) -> None:
    """Loss, accuracy, norm of the gradient and new weights of three steps in float64."""
    config = small.replace(protocol=protocol, noise=noise, lr_decay_steps=2, lr_decay=0.5)
    model, optimizer = build(config)
    model.double().train()
    plain = copy.deepcopy(model)
    names = [name for name, _ in plain.named_parameters()]
    start = {name: p.detach().numpy().copy() for name, p in plain.named_parameters()}
    history: dict[str, list[Array]] = {name: [] for name in names}
    for step in range(3):
        batch = in_float64(batch_of(config, step))
        ours = train_step(model, optimizer, batch, config, step)

        state = plain.state_dict(keep_vars=True)
        log_p = EagerLGMNet(state)(batch.support, batch.query, 3, batch.noise if noise == "sample" else None)
        picked = [(b, t, int(batch.labels[b, t])) for b, t in np.ndindex(*batch.labels.shape)]
        loss = sum((-log_p[index] for index in picked), torch.zeros(())) / len(picked)
        right = [log_p[b, t].tolist().index(log_p[b, t].max().item()) == label for b, t, label in picked]
        gradients = [g.numpy() for g in torch.autograd.grad(loss, list(plain.parameters()))]
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        np.testing.assert_allclose(ours.numpy(), [loss.item(), sum(right) / len(right), norm], rtol=1e-7)

        for name, gradient, parameter in zip(names, gradients, plain.parameters(), strict=True):
            history[name].append(gradient)
            rates = [1e-2, 1e-2, 5e-3][: step + 1]
            parameter.data.copy_(torch.from_numpy(tf_adam(start[name], history[name], rates)[-1]))
        for name, parameter in model.named_parameters():
            np.testing.assert_allclose(parameter.detach(), state[name].detach(), rtol=1e-6, atol=1e-9, err_msg=name)
        torch.testing.assert_close(model.backbone.norms[0].running_var, state["backbone.norms.0.running_var"])


def test_training_learns(small: Config) -> None:
    model, optimizer = build(small)
    model.train()
    first = torch.stack([train_step(model, optimizer, batch_of(small, s), small, s) for s in range(30)])  # (30, 3)
    assert first[-5:, 0].mean() < first[:5, 0].mean() - 0.02
    assert first[-5:, 1].mean() > first[:5, 1].mean()


def test_two_runs_give_the_same_bits(small: Config) -> None:
    runs = []
    for noise_in_the_global_generator in (0, 1):
        model, optimizer = build(small, seed=7)
        torch.manual_seed(noise_in_the_global_generator)
        np.random.seed(noise_in_the_global_generator)  # noqa: NPY002  the point: training must not read it
        metrics = [train_step(model.train(), optimizer, batch_of(small, s), small, s) for s in range(4)]
        runs.append([torch.stack(metrics), *model.state_dict().values()])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


# Score and Worker


def test_score_by_hand() -> None:
    score = Score.of(np.array([1.0, 0.0, 0.5, 0.5]))  # variance (0.25 + 0 + 0 + 0.25) / 3
    assert score.accuracy == 0.5
    assert score.ci95 == pytest.approx(1.96 * math.sqrt(0.5 / 3) / 2, rel=1e-12)
    assert str(score) == "50.00 ± 40.01 %"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 32, 33, 600])
def test_slices_are_a_partition(world_size: int, count: int) -> None:
    slices = [Worker(rank, world_size).slice_of(100, count) for rank in range(world_size)]
    assert [i for start, n, _ in slices for i in range(start, start + n)] == list(range(100, 100 + count))
    assert max(s.size for s in slices) - min(s.size for s in slices) <= 1


def together(world_size: int, work: Callable[[Worker], Any]) -> list[Any]:
    """`work` of all workers, each in a thread, that sum over one another."""
    return Threads(world_size).run(lambda rank, all_reduce: work(Worker(rank, world_size, all_reduce=all_reduce)))


def test_sums_means_and_gathers() -> None:
    alone = Worker()
    assert alone.sum(torch.tensor([2.0, 3])).tolist() == alone.mean(torch.tensor([2.0, 3])).tolist() == [2, 3]
    assert alone.gather(5.0) == [5.0]
    assert together(3, lambda w: w.sum(torch.tensor([1.0, w.rank])).tolist()) == [[3, 3]] * 3
    assert together(3, lambda w: w.mean(torch.tensor([1.0, w.rank])).tolist()) == [[1, 1]] * 3
    assert together(3, lambda w: w.gather(10.5 * w.rank)) == [[0, 10.5, 21]] * 3


@pytest.mark.parametrize("world_size", [2, 3])
def test_slices_of_unequal_size_give_the_whole_meta_batchs_loss_accuracy_and_gradient(
    small: Config, world_size: int
) -> None:
    """5 episodes over 2 workers and over 3, against one worker with all 5."""
    config = small.replace(meta_batch=5)

    def step(worker: Worker) -> tuple[list[float], list[float], list[Tensor]]:
        """Loss and accuracy, norms of the gradient, and the gradient that data-parallel training makes of them."""
        model, optimizer = models[worker.rank]
        model.reduce_over(worker.all_reduce)
        first, count, weight = worker.slice_of(0, 5)
        batch = in_float64(sample_episodes(bank_of(config, "train"), config, "train", first, count))
        figures = train_step(model.double().train(), optimizer, batch, config, 0, weight)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        return worker.mean(figures[:2]).tolist(), [figures[2].item(), norm], [worker.mean(g) for g in gradients]

    models = [build(config) for _ in range(world_size)]
    expected, _, gradients = step(Worker())
    assert 0 < expected[1] < 1, "or every accuracy would do"
    models = [build(config) for _ in range(world_size)]
    for found, norms, shared in together(world_size, step):
        assert found[0] == pytest.approx(expected[0], rel=1e-12)
        assert found[1] == pytest.approx(expected[1], rel=1e-6), "a quotient in float32"
        assert norms[0] == pytest.approx(norms[1], rel=1e-12), "not times the weight once more"
        for ours, theirs in zip(shared, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# Evaluation


class InFloat64(LGMNet):
    """Takes an evaluation's float32 images: so close calls between two classes are none of rounding. Keeps its answers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.answers: list[Tensor] = []

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return super().embed(images.double())

    def classify(self, features: Tensor, codes: Tensor, ways: int, noise: Any = None) -> Tensor:
        log_p = super().classify(features, codes, ways, None if noise is None else noise.double())
        self.answers.append(log_p.detach())
        return log_p  # (B, T, N)


@pytest.fixture(scope="module")
def trained(small: Config) -> InFloat64:
    """Weights and moving statistics that have left their initial values."""
    model = InFloat64(replace(small.model, norm_decay=0.5)).double()
    optimizer = make_optimizer(model, small)
    for step in range(20):
        train_step(model.train(), optimizer, in_float64(batch_of(small, step)), small, step)
    optimizer.zero_grad()
    return model


def slow(model: LGMNet, bank: ImageBank, config: Config, episodes: int, draws: int) -> tuple[Array, dict[str, Array]]:
    """Probabilities (M, E, T, N), M = 1 with the noise at its mean, and the accuracy of every episode by every method."""
    model = copy.deepcopy(model).eval()
    found: dict[str, list[float]] = {}
    probabilities = []
    for i in range(episodes):
        batch = in_float64(sample_episodes(bank, config, "val", i, 1))
        noises = draw_noise(config, "val", i, 1, draws).double() if draws else [None]
        with torch.no_grad():
            p = [model(batch.support, batch.query, config.episodes.ways, noise)[0].exp().numpy() for noise in noises]
        probabilities.append(np.stack(p))  # (M, T, N)
        labels = batch.labels[0].tolist()
        guesses = [[row.index(max(row)) for row in draw.tolist()] for draw in p]
        decided = {"mean noise" if draws == 0 else "single draw": guesses[-1]}
        if draws > 1:
            decided["vote"] = []
            for t in range(len(labels)):
                votes = [guess[t] for guess in guesses]
                decided["vote"].append(min(way for way in votes if votes.count(way) == max(map(votes.count, votes))))
            decided["mean probability"] = [row.index(max(row)) for row in (sum(p) / draws).tolist()]
        for method, guess in decided.items():
            right = [g == label for g, label in zip(guess, labels, strict=True)]
            found.setdefault(method, []).append(sum(right) / len(labels))
    return np.stack(probabilities, axis=1), {method: np.array(values) for method, values in found.items()}


def closest_call(p: Array) -> float:
    """The smallest distance of the best to the second-best class, of the draws and of their mean: p (M, E, T, N)."""
    ordered = np.sort(np.concatenate([p, p.mean(0, keepdims=True)]))
    return float((ordered[..., -1] - ordered[..., -2]).min())


@pytest.mark.parametrize("protocol", ["standard", "paper"])
@pytest.mark.parametrize("draws", [0, 1, 5])
@pytest.mark.parametrize("images_at_once", [1000, 20, 1])
def test_evaluation_against_a_loop_over_episodes(
    small: Config,
    trained: InFloat64,
    protocol: Protocol,
    draws: int,
    images_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lgm_dist.training.embedding.IMAGES_AT_ONCE", images_at_once)
    config, bank = small.replace(protocol=protocol), bank_of(small, "val")
    trained.answers.clear()
    found = evaluate(trained, bank, config, "val", 12, draws)
    p, expected = slow(trained, bank, config, 12, draws)

    answers, m = trained.answers, max(draws, 1)
    pieces = [torch.stack(answers[i : i + m]) for i in range(0, len(answers), m)]  # each (M, B, T, N)
    np.testing.assert_allclose(torch.cat(pieces, dim=1).exp().numpy(), p, rtol=1e-9)
    assert closest_call(p) > 1e-9, "the accuracies below would depend on rounding"
    assert list(found.accuracies) == list(found.scores) == list(expected)
    for method, values in expected.items():
        np.testing.assert_array_equal(found.accuracies[method], values, err_msg=method)
        assert found.scores[method].accuracy == pytest.approx(sum(values) / 12)
    assert found.score == next(iter(found.scores.values()))
    assert (found.split, found.protocol, found.ways, found.shot) == ("val", protocol, 3, 2)
    assert (found.episodes, found.draws) == (12, draws)


def test_evaluation_draws_noise_as_the_protocol_says(small: Config, trained: InFloat64) -> None:
    bank = bank_of(small, "val")
    protocols: list[tuple[Protocol, int, str]] = [("standard", 0, "mean noise"), ("paper", 1, "single draw")]
    for protocol, draws, method in protocols:
        config = small.replace(protocol=protocol)
        found, asked = evaluate(trained, bank, config, "val", 6), evaluate(trained, bank, config, "val", 6, draws)
        assert (found.draws, list(found.scores)) == (draws, [method])
        np.testing.assert_array_equal(found.accuracies[method], asked.accuracies[method])


def test_evaluation_ignores_what_training_varies(small: Config, trained: InFloat64) -> None:
    """Training seed, queries and augmentation leave the val episodes as they are; the evaluation's seed does not."""
    bank = bank_of(small, "val")
    found = evaluate(trained, bank, small, "val", 10).accuracies["mean noise"]
    same = evaluate(trained, bank, small.replace(seed=9, query=1, augment=False), "val", 10).accuracies["mean noise"]
    other = evaluate(trained, bank, small.replace(eval_seed=1), "val", 10).accuracies["mean noise"]
    np.testing.assert_array_equal(found, same)
    assert (found != other).any()
    more = evaluate(trained, bank, small, "val", 15).accuracies["mean noise"]
    np.testing.assert_array_equal(found, more[:10])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("protocol", ["standard", "paper"])
def test_evaluation_leaves_the_model_as_it_was(
    small: Config, trained: InFloat64, training: bool, protocol: Protocol
) -> None:
    model = copy.deepcopy(trained).train(training)
    evaluate(model, bank_of(small, "val"), small.replace(protocol=protocol), "val", 4, 2)
    assert all(module.training == training for module in model.modules())
    for (name, a), b in zip(model.state_dict().items(), trained.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("protocol", ["standard", "paper"])
@pytest.mark.parametrize("episodes", [7, 2])
def test_workers_evaluate_together_as_one_alone(
    small: Config, trained: InFloat64, protocol: Protocol, episodes: int
) -> None:
    """7 episodes over 3 workers, and 2 over 3, where one has nothing to do."""
    config, bank = small.replace(protocol=protocol), bank_of(small, "val")
    alone = evaluate(trained, bank, config, "val", episodes, 3)

    def work(worker: Worker) -> Evaluation:
        return evaluate(copy.deepcopy(trained), bank, config, "val", episodes, 3, worker)

    for found in together(3, work):
        assert found.scores == alone.scores
        for method, values in alone.accuracies.items():
            np.testing.assert_array_equal(found.accuracies[method], values)


class Scripted(nn.Module):
    """Stands where the network does and gives, draw by draw, the probabilities (T, N) that it is told to."""

    def __init__(self, draws: list[list[list[float]]]) -> None:
        super().__init__()
        self.draws = iter(torch.tensor(draws))  # each (T, N)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(images), 1, 1, 1), torch.zeros(len(images), 2)

    def on_vectors(self) -> None:
        """Its maps are no vectors."""

    def classify(self, features: Tensor, *_: Any) -> Tensor:
        log_p: Tensor = next(self.draws).log()  # (T, N)
        return log_p.expand(len(features), -1, -1)  # (B, T, N)


def test_vote_and_mean_probability_by_hand(small: Config) -> None:
    """Four draws; the queries' labels are 0, 1, 2."""
    first = [[0.1, 0.2, 0.7], [0.1, 0.2, 0.7], [0.01, 0.01, 0.98]]  # takes them for 2, 2, 2
    second = [[0.2, 0.1, 0.7], [0.4, 0.3, 0.3], [0.01, 0.01, 0.98]]  # 2, 0, 2
    third = [[0.4, 0.3, 0.3], [0.3, 0.4, 0.3], [0.6, 0.399, 0.001]]  # 0, 1, 0: the single draw is right twice
    draws = [first, second, third, third]
    # Votes: 2:2 between 0 and 2 -> 0, right; 1 has two of four -> 1, right; 2:2 between 0 and 2 -> 0, wrong.
    # Mean probabilities x 4: (1.1, 0.9, 2.0) -> 2, wrong; (1.1, 1.3, 1.6) -> 2, wrong; (1.22, 0.818, 1.962) -> 2, right
    # (the mean of the logarithms would give 0).
    config = small.replace(shot=1, eval_query=1)
    model: Any = Scripted(draws)
    found = evaluate(model, bank_of(small, "val"), config, "val", 2, 4)
    assert found.accuracies["single draw"].tolist() == [2 / 3] * 2
    assert found.accuracies["vote"].tolist() == [2 / 3] * 2
    assert found.accuracies["mean probability"].tolist() == [1 / 3] * 2


def test_evaluation_of_another_split_is_refused(small: Config, trained: InFloat64, tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"^split \(val\) was asked of the bank of split test of 'tiny'; open val's$"):
        evaluate(trained, open_bank(tiny, "test"), small, "val", 2)
    with pytest.raises(ValueError, match=r"^7 ways need 7 classes, split val of 'tiny' has 6"):
        evaluate(trained, bank_of(small, "val"), small.replace(ways=7), "val", 2)


@pytest.mark.parametrize(
    "model",
    [ModelConfig(), *(ModelConfig(norm_scope=s) for s in ("worker", "episode")), ModelConfig(norm="group")],
    ids=lambda m: f"{m.norm} {m.norm_scope}",
)
@pytest.mark.parametrize("workers", [False, True], ids=["alone", "reduced"])
def test_bf16_steps_stay_near_float32_and_their_weights_are_float32(model: ModelConfig, workers: bool) -> None:
    """bfloat16 rounds to 8 bits, 0.4 %; after three steps of Adam a loss of about 1 may differ by a few of those."""
    losses = {}
    for precision in ("float32", "bf16"):
        config = Config.of(precision=precision, meta_batch=4, model=model)
        torch.manual_seed(0)
        network = LGMNet(model).train()
        network.reduce_over((lambda _: None) if workers else None)  # a worker whose sums are everybody's
        optimizer = make_optimizer(network, config)
        batch = steps.batch_of(steps.StepSetup("ours", meta_batch=4))
        losses[precision] = [float(train_step(network, optimizer, batch, config, s)[0]) for s in range(3)]
        assert {p.dtype for p in [*network.parameters(), *network.buffers()]} == {torch.float32}
        assert {v.dtype for state in optimizer.state.values() for v in state.values()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["float32"], abs=0.03)
    assert losses["bf16"] != losses["float32"]
