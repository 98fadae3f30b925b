# SPDX-License-Identifier: Apache-2.0
"""What the processes of `forked` start with, imported once by the server that forks them."""

import gc

import accelerate.commands.launch  # noqa: F401
import killing  # noqa: F401
import pytest  # noqa: F401
import torch

import peft_metalora.training.train_encoder  # noqa: F401

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # each process collects when it lets a model go, and would look at all of this
