"""Rotations are shared between layers."""

import torch

from turboquant.quant.rotation import random_rotation


def test_layers_share_one_matrix_however_many_dims_were_used_between() -> None:
    cpu = torch.device("cpu")
    first = random_rotation("hadamard", 48, 7, 0, cpu)
    for dim in range(4, 164, 4):
        random_rotation("hadamard", dim, 7, 0, cpu)
    assert random_rotation("hadamard", 48, 7, 1, cpu).matrix is first.matrix
