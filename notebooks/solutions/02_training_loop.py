"""Lesson 02, training: the functions that the learner writes.

`check.build`, `check.hint` and `check.solution` load this file. See `cnnlab.check.Task`.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cnnlab import Recipe, run
from cnnlab.check import Task

TASKS = {}


# 02.1: the loss


def cross_entropy(logits, labels):
    """The mean cross-entropy loss of a batch, without overflow.

    `logits` (N, classes) are floats of any size, `labels` (N,) are integers. The loss of a row is
    log(sum of exp(logits of the row)) - (logit of the correct class). Returns the mean over the
    rows, a tensor without dimensions.
    """
    logits = logits - logits.amax(dim=1, keepdim=True)
    log_sums = logits.exp().sum(dim=1).log()
    correct = logits[torch.arange(len(labels)), labels]
    return (log_sums - correct).mean()


def logits_and_labels():
    yield torch.randn(4, 10), torch.randint(10, (4,))
    yield 5 * torch.randn(6, 3), torch.randint(3, (6,))
    yield torch.tensor([[1000.0, 999.0], [0.0, 1.0]]), torch.tensor([1, 0])


def overflow(logits, labels):
    correct = logits[torch.arange(len(labels)), labels]
    return (logits.exp().sum(dim=1).log() - correct).mean()


def maximum_of_the_batch(logits, labels):
    return overflow(logits - logits.max(), labels)


def sum_of_the_rows(logits, labels):
    return F.cross_entropy(logits, labels, reduction="sum")


def wrong_sign(logits, labels):
    return -F.cross_entropy(logits, labels)


def softmax_twice(logits, labels):
    return F.cross_entropy(logits.softmax(1), labels)


def all_pairs(logits, labels):
    return (logits.logsumexp(dim=1) - logits[:, labels]).mean()


TASKS["02.1"] = Task(
    reference=cross_entropy,
    inputs=logits_and_labels,
    hints=[
        "If you subtract the same number from all logits of a row, both terms of its loss get "
        "smaller by this number. So the loss stays the same. Which number makes sure that no "
        "`exp` overflows?",
        "Subtract the maximum of each row. `amax` with `keepdim=True` returns a column, which "
        "broadcasts over the rows.",
        "To pick one logit per row, index with two tensors: the numbers of the rows, from "
        "`torch.arange`, and the labels.",
    ],
    mistakes={
        overflow: "exp(1000) is infinite in floating point. Subtract the maximum of each row from "
        "its logits first.",
        maximum_of_the_batch: "The maximum of the whole batch is too large for the other rows: "
        "exp of their logits becomes 0, and log(0) is infinite. Each row needs its own maximum.",
        sum_of_the_rows: "This is the sum over the rows. Return the mean.",
        wrong_sign: "The sign is wrong: the loss must get smaller when the logit of the correct "
        "class grows.",
        softmax_twice: "This is the loss of the probabilities. Start with the logits: the log of "
        "the sum already contains the softmax.",
        all_pairs: "`logits[:, labels]` takes all labels in each row. Take one logit per row.",
    },
)


# 02.2: gradient descent


def sgd_step(parameters, learning_rate):
    """One step of gradient descent: subtract learning_rate * gradient from each parameter.

    `parameters` is a list of tensors, whose gradients are in `.grad`. Changes them in place,
    outside of autograd, and then sets each `.grad` to None.
    """
    with torch.no_grad():
        for parameter in parameters:
            parameter -= learning_rate * parameter.grad
            parameter.grad = None


def network_and_batch():
    for features, learning_rate in ((6, 0.1), (3, 0.5)):
        network = nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, 4))
        yield network, torch.randn(5, features), torch.randint(4, (5,)), learning_rate


def run_two_steps(function, network, images, labels, learning_rate):
    """Whether the gradients were cleared. The network afterwards is compared too."""
    parameters = list(network.parameters())
    for _ in range(2):
        F.cross_entropy(network(images), labels).backward()
        function(parameters, learning_rate)
    gradients = [p.grad for p in parameters if p.grad is not None]
    return {"gradients": None if any(g.any() for g in gradients) else "cleared"}


def recorded_by_autograd(parameters, learning_rate):
    for parameter in parameters:
        parameter -= learning_rate * parameter.grad
        parameter.grad = None


def uphill(parameters, learning_rate):
    sgd_step(parameters, -learning_rate)


def gradients_kept(parameters, learning_rate):
    with torch.no_grad():
        for parameter in parameters:
            parameter -= learning_rate * parameter.grad


def new_tensors(parameters, learning_rate):
    for parameter in parameters:
        gradient, parameter.grad = parameter.grad, None
        parameter = parameter - learning_rate * gradient


TASKS["02.2"] = Task(
    reference=sgd_step,
    inputs=network_and_batch,
    run=run_two_steps,
    hints=[
        "The gradient points in the direction in which the loss grows. Go the opposite way.",
        "`a = a - b` makes a new tensor, and the network keeps the old one. `a -= b` changes the "
        "tensor in place.",
        "Autograd does not allow an in-place change of a parameter, because it would have to "
        "record it. Put the loop into a `with torch.no_grad():` block.",
    ],
    mistakes={
        recorded_by_autograd: "Autograd records operations on parameters, and this one cannot be "
        "recorded. An update is not part of the network: switch autograd off with torch.no_grad().",
        uphill: "The loss grows: this step goes along the gradient. Go against it.",
        gradients_kept: "The second step is wrong, because `.grad` still has the gradient of the "
        "first one: backward adds to it. Clear it after the update.",
        new_tensors: "The network has not changed. `parameter = parameter - ...` makes a new "
        "tensor. Change the old one in place.",
    },
)


# 02.3: the loop


def train_epoch(model, loader, optimizer, schedule=None):
    """Train `model` on each batch of `loader` once, and return the list of the losses.

    The loss is the cross-entropy. Switches the model to training mode first. `schedule`, if there
    is one, takes a step after each step of the optimizer.
    """
    model.train()
    losses = []
    for images, labels in loader:
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return losses


def make_network(features=5, classes=3):
    """With batch normalization, which computes something else in evaluation mode."""
    return nn.Sequential(
        nn.Linear(features, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes)
    )


def make_loader(images=24, features=5, classes=3, batch_size=8):
    dataset = TensorDataset(torch.randn(images, features), torch.randint(classes, (images,)))
    return DataLoader(dataset, batch_size)


def networks_and_loaders():
    for with_schedule in (False, True):
        yield make_network(), make_loader(), with_schedule


def run_an_epoch(function, model, loader, with_schedule):
    """The losses, and the learning rate at the end, which the schedule halves in each step."""
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) if with_schedule else None
    losses = function(model, loader, optimizer, schedule)
    if losses is None or losses is ...:
        return None
    return {"losses": losses, "learning rate": optimizer.param_groups[0]["lr"]}


def broken_loop(bug):
    """`train_epoch` with one bug."""

    def mistake(model, loader, optimizer, schedule=None):
        if bug != "evaluation mode":
            model.train()
        losses = []
        for images, labels in loader:
            logits = model(images)
            loss = F.cross_entropy(logits.softmax(1) if bug == "softmax" else logits, labels)
            loss.backward()
            if bug == "cleared too early":
                optimizer.zero_grad()
            optimizer.step()
            if bug != "never cleared":
                optimizer.zero_grad()
            if bug == "schedule is None" or (schedule is not None and bug != "no schedule"):
                schedule.step()
            losses.append(loss.item())
        return None if bug == "no return" else losses

    mistake.__name__ = bug.replace(" ", "_")
    return mistake


TASKS["02.3"] = Task(
    reference=train_epoch,
    inputs=networks_and_loaders,
    run=run_an_epoch,
    hints=[
        "Follow the diagram of the cycle. Inside the loop over the loader, each box is one line.",
        "The order matters: compute the loss, call its `backward`, let the optimizer take its "
        "step, then clear the gradients.",
        "`loss.item()` is the loss as a Python number. Append it to a list, and return the list "
        "after the loop. Before the loop, `model.train()` is needed.",
    ],
    mistakes={
        broken_loop("never cleared"): "From the second step on, the losses are wrong: backward "
        "adds to the gradients of the step before. Clear them.",
        broken_loop("cleared too early"): "The network does not learn: the gradients are cleared "
        "before the optimizer has used them.",
        broken_loop("evaluation mode"): "The network is still in evaluation mode, in which some "
        "layers compute something else. Switch to training mode first.",
        broken_loop("softmax"): "`F.cross_entropy` needs logits. It contains the softmax already.",
        broken_loop("no schedule"): "The learning rate has not changed. The schedule must take a "
        "step in each step, too.",
        broken_loop("schedule is None"): "There is not always a schedule. Check that it is not "
        "None before you use it.",
        broken_loop("no return"): "The network is trained. Now return the list of the losses.",
    },
)


# 02.4: held-out accuracy


def accuracy(model, loader):
    """The fraction of the images in `loader` that `model` classifies correctly, a float.

    Switches the model to evaluation mode first. Autograd records nothing. The last batch may have
    fewer images than the others.
    """
    model.eval()
    correct = images_seen = 0
    with torch.no_grad():
        for images, labels in loader:
            correct += (model(images).argmax(dim=1) == labels).sum().item()
            images_seen += len(labels)
    return correct / images_seen


def networks_and_short_batches():
    for images in (10, 21):
        yield make_network(), make_loader(images)


def run_accuracy(function, model, loader):
    """The accuracy, and whether autograd recorded the forward passes."""
    model.train()
    recorded = []
    model.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    value = function(model, loader)
    if value is None or value is ...:
        return None
    return {"accuracy": value, "autograd": "records" if any(recorded) else "off"}


def in_training_mode(model, loader):
    with torch.no_grad():
        right = [(model(images).argmax(1) == labels) for images, labels in loader]
    return torch.cat(right).float().mean().item()


def mean_of_the_batches(model, loader):
    model.eval()
    with torch.no_grad():
        means = [(model(images).argmax(1) == labels).float().mean() for images, labels in loader]
    return torch.stack(means).mean().item()


def number_of_correct_images(model, loader):
    return accuracy(model, loader) * len(loader.dataset)


def recording_autograd(model, loader):
    model.eval()
    right = [(model(images).argmax(1) == labels) for images, labels in loader]
    return torch.cat(right).float().mean().item()


TASKS["02.4"] = Task(
    reference=accuracy,
    inputs=networks_and_short_batches,
    run=run_accuracy,
    hints=[
        "Count the correct images and all images over the batches. Divide at the end.",
        "The class with the largest logit is the prediction: `argmax` over the dimension of the "
        "classes. Compare it with the labels, and sum up what is True.",
        "Switch to evaluation mode with `model.eval()`, and put the loop into `torch.no_grad()`.",
    ],
    mistakes={
        in_training_mode: "The network is in training mode. Switch it to evaluation mode.",
        mean_of_the_batches: "This is the mean of the accuracies of the batches. The last batch "
        "has fewer images, so its images count too much. Count images instead.",
        number_of_correct_images: "This is the number of correct images. Divide it by the number "
        "of all images.",
        recording_autograd: "The accuracy is right, but autograd records the forward pass, which "
        "costs memory and time. Switch it off.",
    },
)


# 02.5: read loss curves (images/training_curves.svg)

RUNS = {
    "A": "softmax before the loss",
    "B": "too few images",
    "C": "gradients not cleared",
    "D": "learning rate too large",
}


def diagnosis():
    """What is wrong in each run of the picture: {"A": ..., "B": ..., "C": ..., "D": ...}.

    Choose from "gradients not cleared", "learning rate too large", "softmax before the loss" and
    "too few images". Each occurs once.
    """
    return {
        "A": "softmax before the loss",
        "B": "too few images",
        "C": "gradients not cleared",
        "D": "learning rate too large",
    }


def run_diagnosis(function):
    answers = function()
    if answers is None or answers is ...:
        return None
    wrong = [name for name, bug in RUNS.items() if answers.get(name) != bug]
    return {"wrong runs": " ".join(wrong) or "none"}


def swapped(*names):
    """The diagnosis with the bugs of some runs in each other's place."""

    def mistake():
        bugs = [RUNS[name] for name in names]
        return {**RUNS, **dict(zip(names, bugs[1:] + bugs[:1], strict=True))}

    mistake.__name__ = f"swapped_{'_'.join(names)}"
    return mistake


FLOOR = "Softmax outputs lie between 0 and 1. What is the smallest cross-entropy of such numbers? "
GAP = "With few images, the training loss is easy to make small, but not the held-out loss. "
SUM = "Gradients that are not cleared add up, so the steps get longer and longer during the run. "
RATE = "A learning rate that is too large spoils the network in the first steps. "


TASKS["02.5"] = Task(
    reference=diagnosis,
    inputs=lambda: [()],
    run=run_diagnosis,
    hints=[
        "Compare the two lines of a run first. In one run they end far apart. What did this "
        "network learn?",
        "One run learns well, but its loss stops at about 1.46. If the ten inputs of the "
        "cross-entropy are between 0 and 1, it cannot be smaller than log(e + 9) - 1.",
        "Two runs do not learn. In one of them the steps are too long from the start. In the "
        "other one they get longer with each step, because something adds up.",
    ],
    mistakes={
        swapped("A", "B"): FLOOR + GAP,
        swapped("A", "C"): FLOOR + SUM,
        swapped("A", "D"): FLOOR + RATE,
        swapped("B", "C"): GAP + SUM,
        swapped("B", "D"): GAP + RATE,
        swapped("C", "D"): SUM + RATE,
        swapped("A", "B", "C"): FLOOR + GAP + SUM,
        swapped("A", "B", "D"): FLOOR + GAP + RATE,
        swapped("A", "C", "D"): FLOOR + SUM + RATE,
        swapped("B", "C", "D"): GAP + SUM + RATE,
        swapped("A", "B", "C", "D"): "All four are wrong. Read the hints: "
        'check.hint("02.5") prints the next one.',
    },
)


# 02.6: repair a training program


def train_and_test(model, train_loader, test_loader, optimizer, epochs):
    """Train the model, and return the held-out accuracy after each epoch."""
    accuracies = []
    for _ in range(epochs):
        model.train()
        for images, labels in train_loader:
            logits = model(images)
            F.cross_entropy(logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        accuracies.append(accuracy(model, test_loader))
    return accuracies


def training_programs():
    yield make_network(), make_loader(), make_loader(40), 3


def run_program(function, model, train_loader, test_loader, epochs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return function(model, train_loader, test_loader, optimizer, epochs)


def broken_program(*bugs):
    """`train_and_test` with some of its three bugs."""

    def mistake(model, train_loader, test_loader, optimizer, epochs):
        accuracies = []
        model.train()
        for _ in range(epochs):
            if "mode" not in bugs:
                model.train()
            for images, labels in train_loader:
                logits = model(images)
                if "softmax" in bugs:
                    logits = logits.softmax(1)
                F.cross_entropy(logits, labels).backward()
                optimizer.step()
                if "gradients" not in bugs:
                    optimizer.zero_grad()
            accuracies.append(accuracy(model, test_loader))
        return accuracies

    mistake.__name__ = "_".join(bugs)
    return mistake


SUM_LEFT = "What is in `.grad` when the second batch calls backward?"
LOSS_LEFT = "What does `F.cross_entropy` expect as its first argument?"
MODE_LEFT = "In which mode is the model in the second epoch? Look at what `accuracy` does."

TASKS["02.6"] = Task(
    reference=train_and_test,
    inputs=training_programs,
    run=run_program,
    hints=[
        "Compare the inner loop with your `train_epoch`, line by line. That finds two of the bugs.",
        "The third bug shows only from the second epoch on. `accuracy` changes the mode of the "
        "model. Who changes it back?",
        "Call `model.train()` at the start of each epoch, give the logits to the loss, and clear "
        "the gradients after each step.",
    ],
    mistakes={
        broken_program("mode", "softmax", "gradients"): "All three bugs are still there. One is "
        "in the loss, one is in the gradients, and one is in the mode of the model.",
        broken_program("softmax", "gradients"): f"Two bugs are left. {SUM_LEFT} {LOSS_LEFT}",
        broken_program("mode", "gradients"): f"Two bugs are left. {SUM_LEFT} {MODE_LEFT}",
        broken_program("mode", "softmax"): f"Two bugs are left. {LOSS_LEFT} {MODE_LEFT}",
        broken_program("gradients"): f"One bug is left. {SUM_LEFT}",
        broken_program("softmax"): f"One bug is left. {LOSS_LEFT}",
        broken_program("mode"): f"One bug is left. {MODE_LEFT}",
    },
)


# 02.7: Adam


def adam_step(parameter, gradient, mean, square, step, learning_rate):
    """One step of Adam for one parameter. Changes `parameter`, `mean` and `square` in place.

    mean = 0.9 * mean + 0.1 * gradient, and square = 0.999 * square + 0.001 * gradient**2. Both
    start at 0, so divide `mean` by 1 - 0.9**step and `square` by 1 - 0.999**step (`step` is 1 in
    the first step), without changing the stored values. Then subtract learning_rate * mean /
    (sqrt(square) + 1e-8) from the parameter. Source: Kingma and Ba, "Adam" (2014), algorithm 1.
    """
    mean.mul_(0.9).add_(0.1 * gradient)
    square.mul_(0.999).add_(0.001 * gradient**2)
    corrected_mean = mean / (1 - 0.9**step)
    corrected_square = square / (1 - 0.999**step)
    parameter -= learning_rate * corrected_mean / (corrected_square.sqrt() + 1e-8)


def adam_states():
    yield torch.randn(6), torch.randn(6), torch.zeros(6), torch.zeros(6), 1, 0.01
    yield torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3), torch.rand(2, 3), 5, 0.1


def wrong_adam(bug):
    """`adam_step` with one bug."""

    def mistake(parameter, gradient, mean, square, step, learning_rate):
        mean.mul_(0.9).add_((1.0 if bug == "as in momentum" else 0.1) * gradient)
        square.mul_(0.999).add_(0.001 * (gradient.abs() if bug == "no square" else gradient**2))
        m, s = mean, square
        if bug == "stored":
            mean /= 1 - 0.9**step
            square /= 1 - 0.999**step
        elif bug != "no correction":
            m, s = mean / (1 - 0.9**step), square / (1 - 0.999**step)
        root = s if bug == "no root" else s.sqrt()
        parameter -= learning_rate * m / (root + 1e-8)

    mistake.__name__ = bug.replace(" ", "_")
    return mistake


TASKS["02.7"] = Task(
    reference=adam_step,
    inputs=adam_states,
    hints=[
        "There are five formulas, and each is one line: two running means, two corrections, one "
        "update.",
        "`mean.mul_(...)` and `mean.add_(...)` change a tensor in place. `mean = ...` would only "
        "give the name to a new tensor.",
        "The corrections must not be stored: put them into new variables. The update takes the "
        "square root of the corrected `square`.",
    ],
    mistakes={
        wrong_adam("no correction"): "In the first steps, the two means are too close to 0, "
        "because they start at 0. Divide them by 1 - 0.9**step and 1 - 0.999**step.",
        wrong_adam("stored"): "The corrected means were stored. The next step would correct them "
        "again. Put them into new variables.",
        wrong_adam("no root"): "The update divides by the mean square. Take its square root.",
        wrong_adam("no square"): "`square` is the running mean of the squares of the gradients.",
        wrong_adam("as in momentum"): "The new gradient counts only 0.1 in `mean`. (In SGD with "
        "momentum, it counts 1.)",
    },
)


# 02.8: reach an accuracy in few epochs

MAX_EPOCHS = 10
TARGET = 0.98


def fast_recipe():
    """A `Recipe` for SmallCNN on the digits, with at most 10 epochs.

    It reaches 98% held-out accuracy after its last epoch, with seed 0 and with seed 1.
    """
    return Recipe(batch_size=16, epochs=10, schedule="cosine", augment="shift")


def run_recipe(function):
    """How many of two seeds reach the target. The reference is not trained: a test does that."""
    recipe = function()
    if recipe is None or recipe is ...:
        return None
    if recipe.epochs > MAX_EPOCHS or recipe.steps or recipe.data != "digits":
        return {"the recipe": "is against the rules"}
    reached = 2 if recipe == fast_recipe() else seeds_that_reach_the_target(recipe)
    return {"the recipe": "follows the rules", "seeds that reach 98%": reached}


@cache
def seeds_that_reach_the_target(recipe):
    reached = 0
    for seed in (0, 1):
        *_, finished = run(recipe.replace(seed=seed))
        reached += finished.accuracy >= TARGET
    return reached


def more_epochs():
    return Recipe(epochs=20)


def large_batches():
    return Recipe(batch_size=512, epochs=3)


TASKS["02.8"] = Task(
    reference=fast_recipe,
    inputs=lambda: [()],
    run=run_recipe,
    hints=[
        "How many steps does an epoch have? With a smaller batch there are more of them.",
        "The last steps should be small: which setting makes the learning rate fall?",
        "Your experiment shows what augmentation does. Combine it with the schedule and a batch "
        "of 16 or 32 images, and choose the learning rate in the panel.",
    ],
    mistakes={
        more_epochs: "At most 10 epochs, no `steps`, and data='digits'.",
        large_batches: "With neither of the two seeds, the last epoch reaches 98%. Which setting "
        "gives the network more steps in an epoch?",
    },
)
