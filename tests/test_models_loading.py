"""Models that others load, move, wrap and change around `enable`."""

from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from model_cases import family_model, logits, max_diff
from torch import nn

from longrope_kernels.integrations.transformers import disable, enable

CLOSE = 2e-5
both_caches = pytest.mark.parametrize("cache", ["unrotated", "rotated"])


# ------------------------------------------------------------------------------------- accelerate


def offloaded(model: Any) -> Any:
    return cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)


@both_caches
def test_offloaded_again_once_enabled(cache):
    """As PEFT does where it loads adapters into an offloaded model."""
    model = enable(offloaded(family_model("phi3")), cache=cache)
    for _ in range(2):
        add_hook_to_module(model.model.rotary_emb, ModelHook())
        assert isinstance(model.model.rotary_emb(None, torch.arange(4)[None])[1], tuple)
        assert max_diff(logits(model), logits(family_model("phi3"))) < CLOSE
        remove_hook_from_submodules(model)
        model.load_state_dict(family_model("phi3").state_dict(), assign=True)
    assert torch.equal(logits(disable(model)), logits(family_model("phi3")))


def test_an_offloaded_model_takes_the_backend_of_where_it_runs():
    model = offloaded(family_model("llama"))
    expected = logits(family_model("llama"))
    assert max_diff(logits(enable(model, backend="native")), expected) < CLOSE


# ------------------------------------------------------------------------------ quantised weights


class Halves(torch.Tensor):
    """A weight that lies in two tensors and has no view, as torchao's quantised ones."""

    def __new__(cls, left: torch.Tensor, right: torch.Tensor) -> "Halves":
        shape = (left.shape[0], left.shape[1] + right.shape[1])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=left.dtype)

    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self.left, self.right = left, right

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["left", "right"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].left, args[0].right)
        if func is torch.ops.aten.t.default:
            return torch.cat((args[0].left, args[0].right), 1).t()
        raise NotImplementedError(f"{func} of Halves")


def test_weights_that_have_no_views():
    found = []
    for sign in (1.0, -1.0, 1.0):
        model = family_model("llama")
        for layer in model.model.layers:
            for linear in layer.self_attn.children():
                weight = sign * linear.weight.detach()
                linear.weight = nn.Parameter(Halves(*weight.chunk(2, 1)), requires_grad=False)
        expected = logits(model)
        assert max_diff(logits(enable(model)), expected) < CLOSE
        found.append(model.model.longrope.settings.fingerprint)
    assert found[0] == found[2] != found[1]
