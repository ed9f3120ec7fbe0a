"""Overhead of `run`: its images/s compared with the same loop in a plain script, interleaved.

Both use one thread, which reduces the noise. The overhead per step is largest for SmallCNN, whose
steps are short.

    python tests/benchmarks/loop_overhead.py [ROUNDS]
"""

import subprocess
import sys

from cnnlab.events import Finished
from cnnlab.launch.launcher import run
from cnnlab.measure.compare import Measurement, speedup
from cnnlab.recipe import Recipe

WARMUP_STEPS = 5
INLINE = """
import sys, time
import torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from cnnlab.data.datasets import digits
from cnnlab.model import ResNet9, SmallCNN

model_name = sys.argv[1]
batch_size, steps, warmup = (int(word) for word in sys.argv[2:])
torch.set_num_threads(1)
images = digits().train
torch.manual_seed(0)
model = {"SmallCNN": SmallCNN, "ResNet9": ResNet9}[model_name](channels=1)
loader = DataLoader(
    images, batch_size, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(0)
)
optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
step = correct = 0
while step < steps:
    for x, y in loader:
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        correct += (logits.argmax(1) == y).sum()
        step += 1
        if step == warmup:
            began = time.perf_counter()
        if step == steps:
            break
print((steps - warmup) * batch_size / (time.perf_counter() - began))
"""


def inline_rate(recipe):
    """Images/s of the plain script, in a fresh interpreter."""
    numbers = (recipe.batch_size, recipe.steps, recipe.warmup_steps)
    command = [sys.executable, "-c", INLINE, recipe.model, *map(str, numbers)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def packaged_rate(recipe):
    """Images/s of `run(recipe)`."""
    return next(event.images_per_s for event in run(recipe) if isinstance(event, Finished))


def compare_loops(recipe, rounds):
    inline, packaged = [], []
    for _ in range(rounds):
        inline.append(inline_rate(recipe))
        packaged.append(packaged_rate(recipe))
    print("inline:", *(f"{rate:.0f}" for rate in inline), end="  ")
    print("run():", *(f"{rate:.0f}" for rate in packaged))
    before = Measurement(name="inline", recipe=recipe, images_per_s=tuple(inline))
    after = Measurement(name="run()", recipe=recipe, images_per_s=tuple(packaged))
    print(
        f"{recipe.model}, batch {recipe.batch_size}: "
        f"inline {before.quartiles[1]:,.0f}, run() {after.quartiles[1]:,.0f} images/s: "
        f"{speedup(before, after)}"
    )


def main(rounds):
    for model, steps in (("SmallCNN", 400), ("ResNet9", 15)):
        recipe = Recipe(
            model=model,
            batch_size=64,
            steps=steps,
            warmup_steps=WARMUP_STEPS,
            threads=1,
            evaluate=False,
        )
        compare_loops(recipe, rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
