"""Decoding by the Triton kernels: the scratch of the splits, and the launches."""

from __future__ import annotations

import torch

from .triton_launch import arch_of, multiprocessors_of, on_device, run_launch

# What the interpreter stands for: enough that small tests see several splits.
_INTERPRETED_MULTIPROCESSORS = 16


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cache_lens: torch.Tensor,
    block_table: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    steps: torch.Tensor,
    n_hat: torch.Tensor,
    attention_factor: torch.Tensor,
    max_length: torch.Tensor,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    interleaved: bool,
    softmax_scale: float,
    window: int,
    softcap: float,
) -> None:
    """Attend to a cache of unrotated keys, into out and lse.

    What is launched follows from shapes alone, so that one captured graph serves all lengths.

    Args:
        q, out: (B, q_len, Hq, D) bfloat16 or float16, a unit last stride, any others.
        k_cache, v_cache: (B, capacity, Hk, D), or (blocks, block_size, Hk, D) with block_table, of
            that dtype or float8_e4m3fn, a unit last stride, any others; Hq is a multiple of Hk.
        lse: (B, Hq, q_len) float32, contiguous: the log-sum-exp of the scores, base e; -inf where a
            query sees no key (and 0 in out).
        cache_lens: (B,) int32 or int64, how many keys each sequence has.
        block_table: (B, max_blocks) int32 or None.
        key_positions: (B, slots) int32 or int64 or None: key j stands at j - kv_start.
        k_scale, v_scale: (Hk,) float32 or None, multiply a float8 cache.
        steps, n_hat, attention_factor, max_length: as in `RopeTables`.
        lengths, sets: (B,) or None; ``sets`` wins.
        kv_start: (B,) int32 or int64 or None; keys at slots below it are hidden.
        interleaved: as in `Rope`.
        softmax_scale: multiplies the scores.
        window: how many slots back a query sees; 0 for all.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0.0 for none.
    """
    from ..kernels import decode as kernels

    if out.numel() == 0:
        return
    if k_cache.numel() == 0 or (block_table is not None and block_table.numel() == 0):
        out.zero_()
        lse.fill_(float("-inf"))
        return
    arch = arch_of(q)
    multiprocessors = multiprocessors_of(q, _INTERPRETED_MULTIPROCESSORS)
    splits = kernels.splits_of(q, k_cache, block_table, arch, multiprocessors)
    scratch = None
    if splits.most > 1:
        shape = (splits.most, *lse.shape)
        scratch = lse.new_empty(*shape, q.shape[3]), lse.new_empty(shape)
    with on_device(q):
        for launch in kernels.plan(
            q,
            k_cache,
            v_cache,
            out,
            lse,
            scratch,
            cache_lens,
            block_table,
            key_positions,
            k_scale,
            v_scale,
            steps,
            n_hat,
            attention_factor,
            max_length,
            lengths,
            sets,
            kv_start,
            interleaved,
            softmax_scale,
            window,
            softcap,
            arch,
            splits,
        ):
            run_launch(launch)
