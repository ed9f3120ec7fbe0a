"""The ranks as a table: a row for each replica of the model, a column for each part of it."""

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cnnlab.recipe import SHARDED, Recipe


def make_mesh(recipe: Recipe, device: torch.device) -> DeviceMesh | None:
    """The mesh ("data", "model") of a sharded strategy; None for other strategies.

    Rank r is in row r // model_ranks: ranks of one replica are neighbors, because they exchange
    the most.
    """
    if recipe.strategy not in SHARDED:
        return None
    shape = (recipe.replicas, recipe.model_ranks)
    return init_device_mesh(device.type, shape, mesh_dim_names=("data", "model"))
