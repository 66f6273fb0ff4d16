"""The modules of benchmarks/, which import one another by their names, or are run as a package."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / "benchmarks"), str(Path(__file__).parents[1])]

import attention_peers
import attentions
import clock
import copies
import decodes
import forward
import measure
import memory
import model_truth
import models
import overview
import parameters
import profiles
import ring
import ropes
import rotations
import speeds
import spread
import test_append as append_rows
import test_attention as attention_rows
import test_decode as decode_rows
import test_host as host_rows
import test_models as model_rows
import test_rotary as rotary_rows
from ropes import WrongResultError

__all__ = [
    "WrongResultError",
    "append_rows",
    "attention_peers",
    "attention_rows",
    "attentions",
    "clock",
    "copies",
    "decode_rows",
    "decodes",
    "forward",
    "host_rows",
    "measure",
    "memory",
    "model_rows",
    "model_truth",
    "models",
    "overview",
    "parameters",
    "profiles",
    "ring",
    "ropes",
    "rotary_rows",
    "rotations",
    "speeds",
    "spread",
]


def forget_inputs() -> None:
    """Let go of the inputs that the last rows left."""
    for module in (rotations, attentions, decodes, append_rows):
        module.make_copies.cache_clear()
