"""Train SmallCNN on handwritten digits in all ranks that torchrun starts, with checkpoints.

    train_digits.py FUNCTIONS FOLDER STEPS

FUNCTIONS is a pickle of the functions that the lesson builds. Checkpoints are in FOLDER.
"""

import os
import pickle
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from cnnlab import data
from cnnlab.model import SmallCNN

functions, folder, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
pause_s = float(os.environ.get("PAUSE", 0))
save_checkpoint, newest_checkpoint, images_of_step = pickle.loads(functions.read_bytes())

torch.set_num_threads(1)
dist.init_process_group("gloo")  # torchrun has set RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = DistributedDataParallel(SmallCNN(channels=1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
images, labels = data.digits().train.tensors

step = 0
found = [newest_checkpoint(folder)]
dist.broadcast_object_list(found)  # All ranks must load the same one: rank 0 decides.
if found[0]:
    state = torch.load(found[0])
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    step = state["step"]
print(f"rank {rank} of {world} continues after {step} steps", flush=True)

while step < steps:
    time.sleep(pause_s)  # so that there is time to kill a host
    start = time.perf_counter()
    chosen = images_of_step(step, 64, len(labels), rank, world)
    loss = F.cross_entropy(model(images[chosen]), labels[chosen])
    loss.backward()  # DDP averages the gradients over the ranks
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    ms = 1000 * (time.perf_counter() - start)
    print(f"step {step} of rank {rank}: {ms:.2f} ms, loss {loss.item():.6f}", flush=True)
    if rank == 0 and step % 5 == 0:
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(folder / f"step-{step}.pt", {**state, "step": step})

del model  # before the group is destroyed: DDP uses it
dist.destroy_process_group()
