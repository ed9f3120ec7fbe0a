"""The solutions of lesson 09 against plain PyTorch, the machine report, and the package."""

import itertools
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from cnnlab import Recipe, amdahl, data, machine, run, state_formula
from cnnlab.model import SmallCNN
from cnnlab.plots import loss_curve

FILE = Path(__file__).parents[2] / "notebooks" / "solutions" / "09_mixed_precision.py"
TASKS = runpy.run_path(str(FILE))["TASKS"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def solution(task_id):
    return TASKS[task_id].reference


@pytest.mark.parametrize("exponent_bits, dtype", [(5, torch.float16), (8, torch.bfloat16)])
def test_decode_reads_all_finite_numbers_as_torch_does(exponent_bits, dtype):
    for whole in range(-(2**15), 2**15, 37):
        value = torch.tensor(whole, dtype=torch.int16).view(dtype)
        if value.isfinite():
            assert solution("09.1")(f"{whole % 2**16:016b}", exponent_bits) == value.item()


def test_master_weights_follow_sgd_in_fp32():
    start, gradients = torch.randn(50), (1e-3 * torch.randn(20, 50)).bfloat16()
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    weights, master = [start.bfloat16()], [start.clone()]
    for gradient in gradients:
        solution("09.2")(weights, master, [gradient], 0.1)
        parameter.grad = gradient.float()
        optimizer.step()
    torch.testing.assert_close(master[0], parameter.detach())
    assert torch.equal(weights[0], master[0].bfloat16())


def test_the_smallest_scale_is_enough_and_half_of_it_is_not():
    gradients = torch.exp2(4 * torch.randn(1000) - 30)
    scale = solution("09.9")(gradients, 0.0105)
    assert solution("09.3")(gradients, scale) <= 0.0105 < solution("09.3")(gradients, scale / 2)


def batches(steps):
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(data.digits().train, 16, shuffle=True, generator=order)
    return itertools.islice(loader, steps)


def train_in_fp16(step, steps):
    torch.manual_seed(0)
    model = SmallCNN(channels=1, width=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    losses = []
    for images, labels in batches(steps):
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(images), labels)
        step(model, optimizer, loss)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_loss_scaling_takes_the_steps_and_the_scales_of_grad_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
    state, scales = (2.0**24, 0), ([], [])

    def packaged(model, optimizer, loss):
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales[0].append(scaler.get_scale())

    def built(model, optimizer, loss):
        nonlocal state
        finite = solution("09.4")(model, optimizer, loss, state[0])
        state = solution("09.5")(*state, finite, 3)
        scales[1].append(state[0])

    losses = train_in_fp16(packaged, 14)
    assert train_in_fp16(built, 14) == pytest.approx(losses, abs=1e-4)
    assert scales[0] == scales[1]
    assert min(scales[0]) < 2.0**24 and any(b > a for a, b in itertools.pairwise(scales[0]))


def test_loss_scaling_gives_the_losses_of_the_packaged_one():
    recipe = Recipe(width=4, batch_size=16, steps=5, precision="fp16", threads=1, evaluate=False)
    _, packaged = loss_curve(list(run(recipe)))

    def step(model, optimizer, loss):
        solution("09.4")(model, optimizer, loss, 2.0**16)

    assert train_in_fp16(step, 5) == pytest.approx(packaged.tolist(), abs=1e-3)


def test_the_precision_of_a_cpu_is_what_it_computes_in_hardware():
    here = machine.describe()
    if torch.backends.mkldnn.is_available():
        expected = "bf16" if here.hardware["bf16"] else "fp32"
        assert solution("09.6")("cpu", "", here.units) == expected


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
@pytest.mark.parametrize("way", ["fp32", "pure bf16", "master", "autocast"])
def test_bytes_per_parameter_are_those_of_a_real_step(way, optimizer):
    layer = torch.nn.Linear(10, 10, bias=False)
    master = [torch.nn.Parameter(layer.weight.detach().clone())] if way == "master" else []
    layer.to(torch.bfloat16 if way in ("pure bf16", "master") else torch.float32)
    updated = master or list(layer.parameters())
    make = {"adam": torch.optim.Adam, "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9)}
    update = make[optimizer](updated)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        loss = layer(torch.randn(2, 10, dtype=layer.weight.dtype)).float().sum()
    loss.backward()
    updated[0].grad = layer.weight.grad.to(updated[0].dtype)
    update.step()
    state = [tensor for tensor in update.state[updated[0]].values() if tensor.ndim]
    tensors = {
        "parameters": [layer.weight, *master],
        "gradients": [layer.weight.grad],
        "optimizer state": state,
    }
    sizes = {part: sum(t.nbytes for t in found) / 100 for part, found in tensors.items()}
    assert solution("09.7")(way, optimizer) == sizes


def test_master_weights_take_the_memory_of_the_zero_paper():
    sizes = solution("09.7")("master", "adam")
    assert sum(sizes.values()) == sum(state_formula(1, 1, "ddp", (2, 2, 12)).values()) == 16


def test_the_predicted_speedup_is_amdahls():
    parts = {"arithmetic": 0.7, "memory": 0.2, "launch": 0.1}
    assert solution("09.8")(parts, 4) == pytest.approx(amdahl(4, 0.3))


def test_the_repaired_loop_trains_as_fp32_with_clipping():
    ((examples, scale), _) = TASKS["09.10"].inputs()
    models = []
    for loop in (solution("09.10"), train_in_fp32):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loop(model, optimizer, torch.amp.GradScaler("cpu", init_scale=scale), examples)
        models.append(model.weight.detach())
    torch.testing.assert_close(*models, rtol=0, atol=5e-3)


def train_in_fp32(model, optimizer, _, examples):
    for images, labels in examples:
        F.cross_entropy(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_stochastic_rounding_is_right_on_average():
    values = torch.randn(20).repeat_interleave(2000)
    noise = torch.randint(2**16, (len(values),), dtype=torch.int32)
    rounded = solution("09.11")(values, noise).float()
    assert ((rounded - values).abs() <= values.abs() * 2**-7).all()
    means = rounded.reshape(20, -1).mean(1)
    torch.testing.assert_close(means, values[::2000], rtol=5e-4, atol=0)
