"""Statistics of real programs against what their definitions give by loops and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crdtmerge.errors import MismatchError, NeedsError
from tests.programs.conftest import Loaded, normal

LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1, 0])


def probabilities(loaded: Loaded, x: torch.Tensor) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    w, b = (loaded.state[f"linear.{part}"].double().numpy() for part in ("weight", "bias"))
    z = x.double().numpy() @ w.T + b
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p: np.ndarray[tuple[int, int], np.dtype[np.float64]] = e / e.sum(axis=1, keepdims=True)
    return p


def test_fisher_of_logistic_regression_is_its_closed_form(classifier: Loaded) -> None:
    """E_y (1[y = c] - p_c)^2 = p_c (1 - p_c), times x_j^2."""
    x = normal(5, 10, 4)
    p = probabilities(classifier, x)
    found = classifier.run("fisher", {"inputs": x}, {"model": classifier.state}).tensors
    spread = p * (1 - p)
    assert np.allclose(found["linear.bias"], spread.mean(axis=0), rtol=1e-5, atol=0)
    wanted = (spread[:, :, None] * x.double().numpy()[:, None, :] ** 2).mean(axis=0)
    assert np.allclose(found["linear.weight"], wanted, rtol=1e-5, atol=0)
    assert all(f.dtype == torch.float32 for f in found.values())


def test_fisher_squares_gradients_one_by_one(classifier: Loaded) -> None:
    """Of x and -x the mean gradient of a weight vanishes where p is the same; its Fisher information does not."""
    state = {"linear.weight": torch.zeros(3, 4), "linear.bias": torch.zeros(3)}
    one = normal(6, 1, 4)
    found = classifier.run("fisher", {"inputs": torch.cat([one, -one])}, {"model": state}).tensors["linear.weight"]
    assert torch.allclose(found, (2 / 9) * (one**2).expand(3, 4), rtol=1e-5)


def test_fisher_of_many_classes_is_drawn_and_near_the_exact_one(many_classes: Loaded) -> None:
    x = normal(7, 1, 2).expand(40, 2).contiguous()
    p = probabilities(many_classes, x)
    found = many_classes.run("fisher", {"inputs": x}, {"model": many_classes.state}, {"samples": 25}).tensors
    wanted = (p * (1 - p)).mean(axis=0)
    error = np.abs(found["linear.bias"].numpy() - wanted)
    deviation = np.sqrt(p[0] * (1 - p[0]) * (1 - 2 * p[0]) ** 2 / 1000)  # of (1[y = c] - p_c)^2, of 1000 labels
    assert (error < 5 * deviation + 1e-6).all()
    assert error.max() > 0
    again = many_classes.run("fisher", {"inputs": x}, {"model": many_classes.state}, {"samples": 25}).tensors
    assert torch.equal(again["linear.bias"], found["linear.bias"])


def test_gram_is_the_mean_product_of_inputs(deep: Loaded) -> None:
    x = normal(8, 130, 3, dtype=torch.float64)
    found = deep.run("gram", {"inputs": x}, {"model": deep.state}).tensors
    hidden = torch.tanh(x @ deep.state["0.weight"].T + deep.state["0.bias"])
    assert set(found) == {"0.weight", "2.weight"}
    assert torch.allclose(found["0.weight"].double(), x.T @ x / 130, rtol=1e-6, atol=1e-7)
    assert torch.allclose(found["2.weight"].double(), hidden.T @ hidden / 130, rtol=1e-6, atol=1e-7)
    assert torch.equal(found["2.weight"], found["2.weight"].T)


def test_gram_of_a_convolution_is_that_of_its_patches(network: Loaded) -> None:
    """Patches by loops: 3 x 3 at every other place of an image with a border of zeros, channel first."""
    x = normal(9, 2, 2, 5, 5)
    padded = np.zeros((2, 2, 7, 7))
    padded[:, :, 1:6, 1:6] = x.numpy()
    patches = [
        padded[n, :, i : i + 3, j : j + 3].reshape(-1) for n in range(2) for i in range(0, 5, 2) for j in range(0, 5, 2)
    ]
    wanted = sum(np.outer(patch, patch) for patch in patches) / len(patches)
    ran = network.run("gram", {"inputs": x}, {"model": network.state})
    assert np.allclose(ran.tensors["conv.weight"], wanted, rtol=1e-5, atol=1e-6)
    assert ran.values["rows"]["conv.weight"] == 18


def test_gram_of_a_shared_weight_is_of_all_its_inputs(network: Loaded) -> None:
    ran = network.run("gram", {"inputs": normal(9, 4, 2, 5, 5)}, {"model": network.state})
    shared = [name for name in ("one.weight", "two.weight") if name in ran.tensors]
    assert sum(ran.values["rows"][name] for name in shared) == 8


def test_importance_is_weight_times_summed_gradients(deep: Loaded) -> None:
    x, labels = normal(10, 3, 3, dtype=torch.float64), torch.tensor([0, 3, 1])
    found = deep.run("importance", {"inputs": x, "labels": labels}, {"model": deep.state}).tensors

    def loss(name: str, at: int, step: float, example: int) -> float:
        state = {key: value.clone() for key, value in deep.state.items()}
        state[name].view(-1)[at] += step
        z = torch.tanh(x[example] @ state["0.weight"].T + state["0.bias"]) @ state["2.weight"].T + state["2.bias"]
        return float(torch.logsumexp(z, 0) - z[labels[example]])

    for name, at in (("0.weight", 4), ("0.bias", 1), ("2.weight", 17), ("2.bias", 3)):
        gradients = [(loss(name, at, 1e-6, e) - loss(name, at, -1e-6, e)) / 2e-6 for e in range(3)]
        wanted = abs(float(deep.state[name].view(-1)[at])) * sum(map(abs, gradients))
        assert float(found[name].view(-1)[at]) == pytest.approx(wanted, rel=1e-5)


def test_activations_are_what_linear_layers_give_out(deep: Loaded) -> None:
    x = normal(11, 70, 3, dtype=torch.float64)
    found = deep.run("activations", {"inputs": x}, {"model": deep.state}).tensors
    first = x @ deep.state["0.weight"].T + deep.state["0.bias"]
    assert torch.allclose(found["0.weight"].double(), first, rtol=1e-6, atol=1e-6)
    assert found["2.weight"].shape == (70, 4)


def test_a_program_gives_what_its_module_gives(network: Loaded) -> None:
    x = normal(12, 7, 2, 5, 5)
    with torch.no_grad():
        assert torch.equal(network.program(network.program.fitted(network.state, "it"), [x]), network.module(x))


def test_a_checkpoint_may_hold_a_shared_weight_once(network: Loaded) -> None:
    state = {name: x for name, x in network.state.items() if name != "two.weight"}
    x = normal(12, 7, 2, 5, 5)
    with torch.no_grad():
        assert torch.equal(network.program(network.program.fitted(state, "it"), [x]), network.module(x))


@pytest.mark.parametrize("metric", ["accuracy", "loss", "squared_error", "output"])
def test_fitness_is_its_metric(classifier: Loaded, metric: str) -> None:
    x = normal(13, 10, 4)
    with torch.no_grad():
        z = classifier.module(x).double()
    numbers = normal(14, 10, 3)
    labels = numbers if metric == "squared_error" else LABELS
    wanted = {
        "accuracy": (z.argmax(1) == LABELS).double().mean(),
        "loss": torch.log_softmax(z, 1)[torch.arange(10), LABELS].mean(),
        "squared_error": -((z - numbers.double()) ** 2).mean(),
        "output": z.mean(),
    }[metric]
    data = {"inputs": x, "labels": labels}
    ran = classifier.run("fitness", data, {"model": classifier.state}, {"metric": metric})
    assert float.fromhex(ran.values["score"]) == pytest.approx(float(wanted), rel=1e-6)


def test_fitness_of_several_tasks_is_their_mean(classifier: Loaded) -> None:
    data = {"a.inputs": normal(13, 2, 4), "b.inputs": normal(15, 8, 4)}
    with torch.no_grad():
        wanted = sum(float(classifier.module(x).double().mean()) for x in data.values()) / 2
    ran = classifier.run("fitness", data, {"model": classifier.state}, {"metric": "output"})
    assert float.fromhex(ran.values["score"]) == pytest.approx(wanted, rel=1e-6)


def test_fitness_of_a_model_with_nan_is_nan(classifier: Loaded) -> None:
    state = classifier.state | {"linear.bias": torch.tensor([0.0, float("nan"), 0.0])}
    for metric, wanted in (("loss", "nan"), ("accuracy", "0x0.0p+0")):
        data = {"inputs": normal(13, 10, 4), "labels": LABELS}
        assert classifier.run("fitness", data, {"model": state}, {"metric": metric}).values["score"] == wanted


@pytest.mark.parametrize(
    ("data", "kind", "said"),
    [
        ({"labels": LABELS}, NeedsError, "lacks 'inputs'"),
        ({}, NeedsError, "is empty"),
        ({"inputs": normal(1, 10, 4)}, NeedsError, "needs 'labels'"),
        ({"inputs": normal(1, 10, 4), "labels": LABELS[:3]}, MismatchError, "unequal numbers"),
        ({"inputs": normal(1, 10, 5), "labels": LABELS}, MismatchError, "cannot be run with this data"),
        ({"x": normal(1, 10, 4)}, MismatchError, "are called inputs"),
        ({"a.inputs": normal(1, 3, 4), "b.inputs": normal(1, 3, 4)}, NeedsError, "the tasks a, b"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    classifier: Loaded, data: dict[str, torch.Tensor], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        classifier.run("importance", data, {"model": classifier.state})


def test_a_model_that_does_not_fit_is_refused(classifier: Loaded) -> None:
    x = {"inputs": normal(1, 2, 4)}
    with pytest.raises(MismatchError, match=r"has 'linear\.bias', which the model lacks"):
        classifier.run("fisher", x, {"model": {"linear.weight": torch.zeros(3, 4)}})
    with pytest.raises(MismatchError, match=r"has shape \[3, 4\]"):
        classifier.run("fisher", x, {"model": classifier.state | {"linear.weight": torch.zeros(4, 4)}})
