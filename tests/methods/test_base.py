"""What all methods share: steps, logged terms, rates and E-steps; and what is refused of an earlier run's model."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod, require_earlier_model


def test_a_model_with_the_same_number_of_clusters_is_returned():
    model = SimpleNamespace(num_clusters=3)
    assert require_earlier_model(model, 3, use="it starts from", such_as="cc") is model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "it starts from a trained clustering, and start and before are null.*such as cc.*set start=DIR"),
        (SimpleNamespace(num_clusters=4), r"has 4 clusters.*set dataset\.num_clusters=4"),
    ],
)
def test_no_model_and_another_number_of_clusters_are_refused(model, message):
    with pytest.raises(InputError, match=message):
        require_earlier_model(model, 3, use="it starts from", such_as="cc")


class TwoTerms(ClusteringMethod):
    """Its weights are two numbers; the terms are those times the batch."""

    def __init__(self):
        super().__init__(
            backbone=nn.Identity(),
            num_clusters=2,
            optimizer=partial(torch.optim.SGD, lr=0.5),
            schedule=lambda step, steps_per_epoch: 10 * step + steps_per_epoch,
            e_step_every_n_epochs=3,
        )
        self.first, self.second = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        self.logged, self.e_steps = {}, []

    def losses(self, batch):
        return {"first": 2 * self.first * batch.views[0].sum(), "second": self.second * batch.views[0].sum()}

    def parameter_groups(self):
        return [
            {"params": [self.first]},
            {"params": [self.second], "lr_factor": 4.0, "schedule": lambda step, steps_per_epoch: 0.25},
        ]

    def run_e_step(self, epoch):
        self.e_steps.append(epoch)

    def log_dict(self, values):
        self.logged.update({name: float(value) for name, value in values.items()})

    def log(self, name, value, prog_bar):
        self.logged[name] = float(value)


def make_method(**trainer):
    """A method with a stand-in for the trainer: epochs of five batches, two for a step; every third step is logged."""
    method = TwoTerms()
    numbers = {"accumulate_grad_batches": 2, "num_training_batches": 5, "global_step": 0, "log_every_n_steps": 3}
    datamodule = SimpleNamespace(batches_per_epoch=5)
    method._trainer = SimpleNamespace(**{**numbers, "current_epoch": 0, "datamodule": datamodule, **trainer})
    return method


def make_batch(value=1.0):
    views = (torch.tensor([value]),)
    return TrainBatch(views, torch.tensor([0]), Draws(key=(0,), first_row=0, global_batch_size=1))


def test_the_optimiser_steps_after_so_many_batches_and_after_the_last():
    method, steps = make_method(), []
    for number in range(5):
        method.training_step(make_batch(), number)
        steps.append(method.is_optimizer_step)
    assert steps == [False, True, False, True, True]


def test_terms_are_summed_and_logged_at_every_so_many_steps():
    for global_step in range(6):
        method = make_method(global_step=global_step)
        loss = method.training_step(make_batch(5.0), 0)
        assert loss == 15 and loss.requires_grad
        terms = {"train/first": 10, "train/second": 5, "train/loss": 15}
        assert method.logged == (terms if global_step in (2, 5) else {})


def test_the_first_step_whose_loss_is_not_finite_is_named():
    method = make_method(global_step=6)
    with pytest.raises(InputError, match="the loss of step 7 is not"):
        method.training_step(make_batch(torch.inf), 0)
    method._trainer.global_step = 8
    with pytest.raises(InputError, match="the loss of step 7 is not"):
        method.training_step(make_batch(torch.nan), 0)


def test_the_e_step_runs_before_the_first_epoch_and_then_every_so_many():
    method = make_method()
    for method._trainer.current_epoch in range(8):
        method.on_train_epoch_start()
    assert method.e_steps == [0, 3, 6]
    method.e_step_every_n_epochs = 0
    method._trainer.current_epoch = 9
    method.on_train_epoch_start()
    assert method.e_steps == [0, 3, 6]


def test_groups_have_their_rates_and_schedules_count_steps_from_one():
    method = make_method()
    optimizer, scheduler = method.configure_optimizers().values()
    assert scheduler["interval"] == "step"
    rates = []
    for _ in range(3):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler["scheduler"].step()
    assert rates == [[0.5 * (10 * step + 2.5), 0.5 * 4 * 0.25] for step in (1, 2, 3)]


def test_what_no_batch_of_a_step_trains_keeps_no_gradient():
    method = make_method()
    first, second = method.first, method.second
    for untrained, keeps in (([[first], [first, second]], False), ([[first], []], True), ([], True)):  # of each batch
        first.grad, second.grad = torch.ones(()), torch.ones(())
        for parameters in untrained:
            method.leave_untrained(parameters)
        method.on_before_optimizer_step(None)
        assert (first.grad is not None) == keeps and second.grad is not None and method.untrained_parameters == []
