"""What `launch.run` costs: its images/s beside those of the same loop written inline in a plain script, in turn.

One thread each, for it steadies the figures, and the cost of a step's bookkeeping shows most where steps are short.

    python tests/benchmarks/loop_overhead.py [ROUNDS]
"""

import subprocess
import sys

from cnnlab.events import Finished
from cnnlab.launch.launcher import run
from cnnlab.measure.compare import Measurement, speedup
from cnnlab.recipe import Recipe

INLINE = """
import sys, time
import torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

model_name, batch_size, steps, warmup = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
images = digits().train
torch.manual_seed(0)
model = {"SmallCNN": SmallCNN, "ResNet9": ResNet9}[model_name](channels=1)
loader = DataLoader(images, batch_size, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(0))
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


def main(rounds):
    for model, batch_size, steps in (("SmallCNN", 64, 400), ("ResNet9", 64, 15)):
        recipe = Recipe(
            model=model,
            batch_size=batch_size,
            steps=steps,
            warmup_steps=5,
            threads=1,
            evaluate=False,
        )
        rates = {"inline": [], "run()": []}
        for _ in range(rounds):
            words = [sys.executable, "-c", INLINE, model, str(batch_size), str(steps), "5"]
            rates["inline"].append(
                float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
            )
            rates["run()"].append(
                next(event.images_per_s for event in run(recipe) if isinstance(event, Finished))
            )
        inline, packaged = (
            Measurement(name=name, recipe=recipe, images_per_s=tuple(values))
            for name, values in rates.items()
        )
        print(
            "inline:",
            *(f"{rate:.0f}" for rate in rates["inline"]),
            " run():",
            *(f"{rate:.0f}" for rate in rates["run()"]),
        )
        print(
            f"{model}, batch {batch_size}: inline {inline.quartiles[1]:,.0f}, run() {packaged.quartiles[1]:,.0f} images/s: {speedup(inline, packaged)}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
