"""Faults that the tests must see: each is put into a copy of the tree, and its tests must fail.

    python tests/mutations.py             # all of them, some ten seconds each
    python tests/mutations.py threshold   # those with this in their name

Prints one line each, and fails where a fault survived. A new kind of fault that a review found gets
a line here, with the test that sees it now.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGE = "longrope_kernels"


class Mutation(NamedTuple):
    """What is wrong then, the file in the package, its text (once in there), and who sees it."""

    name: str
    file: str
    old: str
    new: str
    tests: str


NUMBERS = [
    Mutation("a step of 32 bits", "kernels/rotation.py", "((n * step) >> 32)", "(n * (step >> 32))", "test_rotary_forward.py -k triton"),
    Mutation("an angle in float32", "backends/reference.py", "n[..., None].double() * tables.inv_freq[token_set, row]", "(n[..., None].float() * tables.inv_freq[token_set, row].float()).double()", "test_rotary_forward.py -k reference"),
    Mutation("the other sense of rotation", "kernels/rotation.py", "x_i * cos - x_j * sin, x_i * sin + x_j * cos", "x_i * cos + x_j * sin, x_j * cos - x_i * sin", "test_rotary_forward.py -k triton"),
    Mutation("the threshold's token itself", "kernels/rotation.py", "(n_hat > 0) & (n < n_hat)", "(n_hat > 0) & (n <= n_hat)", "test_rotary_sets.py test_rotary_forward.py -k triton"),
    Mutation("a threshold of 0 for negative positions", "backends/reference.py", "original = (n_hat > 0) & (n < n_hat)", "original = n < n_hat", "test_rotary_forward.py test_properties.py -k reference"),
    Mutation("the attention factor below the threshold", "backends/reference.py", "a = torch.where(original, 1.0, tables.attention_factor[token_set])[..., None]", "a = tables.attention_factor[token_set][..., None]", "test_rotary_forward.py -k reference"),
    Mutation("4096 tokens are long", "rope/tables.py", "lengths.long()[..., None] > max_length", "lengths.long()[..., None] >= max_length", "test_rotary_sets.py -k reference"),
    Mutation("4096 tokens are long, in a kernel", "kernels/rotation.py", "(length > tl.load(p_max_length + i))", "(length >= tl.load(p_max_length + i))", "test_rotary_sets.py -k triton"),
    Mutation("4096 tokens are long, on the host", "rope/value.py", "length <= factor_set.max_length", "length < factor_set.max_length", "test_rope.py"),
    Mutation("lengths win over sets", "calls/arguments.py", "elif sets is not None:\n        lengths = None", "elif lengths is not None:\n        sets = None", "test_rotary_sets.py -k reference"),
    Mutation("a gradient that turns on", "ops/rotary.py", "conjugate=not call.conjugate", "conjugate=call.conjugate", "test_rotary_grad.py -k native"),
    Mutation("rounding down to bfloat16", "kernels/rotation.py", "bits += 0x7FFF + ((bits >> 16) & 1)", "bits += 0", "test_rotary_forward.py test_triton.py -k triton"),
    Mutation("tokens past a border", "kernels/rotation.py", "inside & (begin <= token)", "inside & (begin < token)", "test_triton.py test_rotary_sets.py -k 'triton or sequence'"),
    Mutation("one rounding of a base", "rope/phase.py", "_DIGITS = 60", "_DIGITS = 12", "test_golden.py"),
]  # fmt: skip
ATTENTION = [
    Mutation("the key behind the query", "calls/masks.py", "seen & (distance >= 0)", "seen & (distance >= -1)", "test_attention_forward.py -k 'reference or composed'"),
    Mutation("a window one too long", "calls/masks.py", "distance.abs()) < window)", "distance.abs()) <= window)", "test_attention_forward.py -k reference"),
    Mutation("a window one too long, in a kernel", "kernels/attention_tiles.py", "seen = seen & (slot - j < window)", "seen = seen & (slot - j <= window)", "test_attention_forward.py -k 'triton and window'"),
    Mutation("padding that is seen", "kernels/attention_tiles.py", "(j >= first_key) & (j < keys)", "(j < keys)", "test_attention_forward.py -k 'triton and kv_start'"),
    Mutation("queries at the first keys", "calls/masks.py", "slot = slot + keys - queries", "slot = slot + 0", "test_attention_forward.py -k 'reference and x'"),
    Mutation("keys that share positions share sets", "ops/attention.py", " and of_k.borders is of_q.borders:", ":", "test_attention_sets.py -k other_borders"),
    Mutation("keys of another sequence's border", "ops/attention.py", "selection._replace(borders=keys.borders)", "selection", "test_attention_sets.py -k composed"),
    Mutation("weights that are not rescaled", "kernels/attention.py", "alpha = tl.exp2(top - base)", "alpha = tl.exp2(top - top)", "test_attention_forward.py -k triton"),
    Mutation("the log-sum-exp to base 2", "kernels/decode_kernel.py", "tl.store(lse + offset, top * LN2, mask=in_q)", "tl.store(lse + offset, top, mask=in_q)", "test_decode_forward.py -k triton"),
    Mutation("a check for the kind of some arguments", "calls/kinds.py", "kind = kind_of(*arguments)", "kind = kind_of(*arguments[:4])", "test_kinds.py"),
    Mutation("a launch on whatever device is the current one", "backends/triton/launch.py", "if device != ready.device:", "if False:", "test_launches.py"),
    Mutation("a launch for the kind of one argument", "backends/triton/launch.py", "kind = kind_of(*arguments)", "kind = kind_of(arguments[0])", "test_launches.py"),
    Mutation("a kernel for aligned pointers, for all", "backends/triton/launch.py", "add(x.data_ptr() % 16)", "add(0)", "test_launches.py"),
    Mutation("sets of a cache that are aligned", "cache/warmup.py", "sets = caches[0].sets if caches else torch.zeros", "sets = torch.zeros", "test_launches.py"),
    Mutation("softcap without its factor", "backends/reference.py", "scores = how.cap * torch.tanh(scores / how.cap)", "scores = torch.tanh(scores / how.cap)", "test_attention_forward.py -k reference"),
    Mutation("a sink that has a value", "backends/reference.py", "total = total + torch.exp(sinks - top)", "total = torch.maximum(total, torch.exp(sinks - top))", "test_sinks.py -k reference"),
    Mutation("a sink for each split", "kernels/decode_kernel.py", "start_of_rows(i_h, sinks, i_split == 0, BLOCK_M)", "start_of_rows(i_h, sinks, True, BLOCK_M)", "test_sinks.py -k 'triton and decode'"),
    Mutation("a sink as its dtype has it", "backends/composed.py", "(sink - rounded).to(q.dtype)", "0 * rounded", "test_sinks.py -k composed"),
    Mutation("native attention to one key less", "backends/native.py", "torch.full(q.shape[:1], q.shape[1],", "torch.full(q.shape[:1], q.shape[1] - 1,", "test_native_attention.py"),
    Mutation("native attention to keys that stand elsewhere", "ops/attention.py", " and key_positions is None,\n    )", ",\n    )", "test_native_attention.py"),
    Mutation("gradients of sinks without those of the log-sum-exp", "ops/attention.py", "d_scores = d_scores + d_lse", "pass", "test_sinks.py -k 'triton and gradients'"),
    Mutation("dropped autocast", "calls/autocast.py", "return x if dtype is None else x.to(dtype)", "return x", "test_attention_compile.py -k autocast"),
    Mutation("an op that nobody sees", "torch_private.py", "or _count_modes()", "", "test_torch_private.py"),
    Mutation("a change in place unseen", "ops/rotary.py", "        torch.autograd.graph.increment_version((q, k))\n        return", "        return", "test_torch_private.py test_rotary_inplace.py -k 'native or place'"),
    Mutation("fields of an op in another order", "calls/schema.py", "return tuple(found)", "return tuple(reversed(found))", "test_schema.py"),
]  # fmt: skip
DECODING = [
    Mutation("drafts under the last one's set", "backends/reference.py", "lengths = tokens if selection.lengths is None", "lengths = tokens[:, -1:] if selection.lengths is None", "test_decode_drafts.py -k reference"),
    Mutation("drafts under the last one's set, in a kernel", "kernels/decode_sets.py", "takes = set_of_query(i_b, i_t, tokens + i_t,", "takes = set_of_query(i_b, i_t, tokens + t1,", "test_decode_drafts.py -k triton"),
    Mutation("a key too few", "kernels/decode_kernel.py", "part_keys = tl.maximum(part_high - part_low, 0)", "part_keys = tl.maximum(part_high - part_low - 1, 0)", "test_decode_forward.py -k triton"),
    Mutation("a split that is left out", "kernels/decode_splits.py", "live = s0 + o_s < splits", "live = s0 + o_s < splits - 1", "test_triton_decode.py"),
    Mutation("the scale of keys for values", "kernels/decode.py", "vector_args(cache.v_scale),", "vector_args(cache.k_scale),", "test_decode_forward.py -k 'triton and float8'"),
    Mutation("new keys one slot too far", "kernels/append.py", "slot = length - tokens + t\n", "slot = length - tokens + t + 1\n", "test_append_forward.py -k triton"),
    Mutation("tokens that are not dropped", "kernels/append.py", "written = address >= 0", "written = exists", "test_append_forward.py -k triton"),
    Mutation("float8 rounded down", "kernels/append.py", "+ 0x7FFFF + ((rest >> 20) & 1)", "+ 0", "test_append_forward.py -k 'triton and float8'"),
    Mutation("values over the scale of keys", "backends/reference.py", "(v, cache.v, cache.v_scale)", "(v, cache.v, cache.k_scale)", "test_append_forward.py -k reference"),
    Mutation("written before all is checked", "ops/decode.py", "    values.check_decode(call)\n    if writer", "    if writer", "test_append_errors.py -k decode"),
    Mutation("a count that is not set back", "kernels/decode_splits.py", "tl.store(p_count, 0)", "pass", "test_triton_decode.py -k last_program"),
    Mutation("two streams that count together", "kernels/splits.py", "(q.device, threading.get_ident())", "(q.device, 0)", "test_triton_decode.py -k apart"),
    Mutation("blocks by the first row of the table", "kernels/decode_cache.py", "p_ids = table[0] + i_b * table[1]", "p_ids = table[0]", "test_decode_forward.py -k 'triton and block'"),
]  # fmt: skip
CACHES = [
    Mutation("a full row goes on", "cache/rows.py", "if length + count > self.limit:", "if length + count > self.limit + 1:", "test_cache.py test_cache_errors.py test_cache_policies.py"),
    Mutation("pinned rows switch", "cache/base.py", 'own["sets"] = self.sets', "pass", "test_cache_policies.py test_cache.py"),
    Mutation("a cut row keeps its set", "cache/rows.py", "        if length == 0:\n            self.sets[row] = None", "        if length < 0:\n            self.sets[row] = None", "test_cache_policies.py test_cache_stateful.py"),
    Mutation("recompute that goes on", "cache/rows.py", 'if crossing and self.policy == "recompute":', "if False:", "test_cache_policies.py"),
]  # fmt: skip
MODELS = [
    Mutation("padding counts", "integrations/transformers/masks.py", "return torch.where(last == self.end - 1, self.start, 0)", "return torch.zeros_like(last)", "test_models_padding.py"),
    Mutation("packed sequences see one another", "integrations/transformers/sequences.py", "restarts = step < 1", "restarts = step < -(2**40)", "test_models_packed.py"),
    Mutation("one set for a whole pack", "integrations/transformers/sequences.py", "lengths = (of_tokens[last] + 1).clamp(min=0)", "lengths = (of_tokens[last] + 1).clamp(min=0) * 0", "test_models_packed.py"),
    Mutation("rotated keys of another set", "integrations/transformers/caches.py", "if held != own and not _is_empty", "if False and not _is_empty", "test_models_caches.py"),
    Mutation("keys of others", "integrations/transformers/caches.py", "if held is own or held == own:", "if True:", "test_models_caches.py"),
    Mutation("dropped keys", "integrations/transformers/kept.py", "if not known.issuperset(now):", "if False:", "test_models_kept.py"),
    Mutation("keys dropped from a window", "integrations/transformers/kept.py", "tokens != seen or held < expected", "tokens != seen", "test_models_kept.py"),
    Mutation("a row that begins late", "integrations/transformers/kept.py", "known = known.union(rows.by_first[rows.starts].tolist())", "pass", "test_models_kept.py"),
    Mutation("drafts of a model under one set", "integrations/transformers/sequences.py", "if lengths is not None and queries > 1:", "if False:", "test_models_generate.py -k 'assisted or draft or several'"),
    Mutation("flash-attn's window without the query's own place", "integrations/flash_attn.py", "None if left < 0 else left + 1", "None if left < 0 else left", "test_flash_attn_interface.py"),
    Mutation("flash-attn's cache written past its end", "integrations/flash_attn.py", "most = slots - new", "most = slots", "test_flash_attn_interface.py -k cache"),
    Mutation("a trial beside thresholds", "integrations/transformers/trial.py", "vars(config).pop(N_HAT_KEY, None)", "pass", "test_transformers.py -k threshold_of"),
    Mutation("one original length for all layers", "integrations/transformers/ropes.py", "own = set() if kind is None else parameters.keys()", "own = set()", "test_transformers.py -k own_original"),
    Mutation("keywords that layers keep from their attention", "integrations/transformers/rotary.py", "turn.note, MEMORY.told())", "turn.note)", "test_models_keywords.py"),
    Mutation("sets that a search asks for", "integrations/transformers/attention.py", '"sets": longrope_sets,', '"sets": None,', "test_search_fitness.py"),
]  # fmt: skip
SEARCH = [
    Mutation("a journal that is not waited for", "search/state.py", "            os.fsync(self._journal)\n        except", "        except", "test_search_resume.py"),
    Mutation("a child out of order", "search/moves.py", "return raised(child) if monotone else child", "return child", "test_search_space.py test_search_evolution.py"),
    Mutation("worse parents first", "search/evolution.py", "key=lambda evaluation: evaluation.rank)", "key=lambda evaluation: evaluation.rank, reverse=True)", "test_search_evolution.py"),
    Mutation("parents of all that were judged in full", "search/evolution.py", "max(math.ceil(whole * told / max(len(finished) + more, 1)), min(whole, 2))", "whole", "test_search_coarse.py -k parents"),
    Mutation("a prefix read anew for each better rope", "search/base.py", "_CLOSER = 0.98", "_CLOSER = 1.0", "test_search_coarse.py -k read"),
    Mutation("a race that stops too early", "search/fitness.py", "if not total / sum(counts) <= limit:", "if not total / sum(counts[: len(sums)]) <= limit:", "test_search_fitness.py"),
    Mutation("skipped windows taken for packed sequences", "search/model.py", ', "attention_mask": mask}', "}", "test_search_fitness.py"),
    Mutation("a prefix that stays as the first rope read it", "search/behind.py", "if reference != self._reference:", "if self._reference is None:", "test_search_behind.py"),
    Mutation("a prefix that keeps what was judged behind it", "search/model.py", "        text.crop(1 - len(tokens))", "        pass", "test_search_behind.py"),
    Mutation("needles whose questions count", "search/fitness.py", "found.double().where(counted, 0.0)", "found.double()", "test_search_fitness.py -k needle"),
    Mutation("windows that mislead and stay", "search/coarse.py", "not correlation >= LEAST", "correlation < -1", "test_search_coarse.py"),
    Mutation("windows judged by the best alone", "search/coarse.py", "[(len(judged) - best) / others]", "[1.0]", "test_search_coarse.py"),
    Mutation("a search that outlasts its hours", "search/base.py", "self._closing or spent or", "self._closing or", "test_search_coarse.py"),
    Mutation("a mutant of no formula", "search/space.py", "n_hat, attention, candidate.origin)", "n_hat, attention)", "test_search_space.py test_search_coarse.py"),
    Mutation("evaluate: other tokens at each length", "search/evaluate.py", "tails(documents, self.lengths[-1], length, start)", "documents", "test_search_evaluate.py -k same"),
    Mutation("evaluate: the formulas of the original length", "search/evaluate.py", "baselines(source, longest) if compare", "baselines(source, self.lengths[0]) if compare", "test_search_evaluate.py"),
    Mutation("randomness that begins anew", "search/evolution.py", "        self._rng.setstate((version, tuple(internal), gauss))", "        pass", "test_search_resume.py test_search_evolution.py"),
    Mutation("rows of weights that change places", "search/source.py", "torch.arange(1, 2 * rows, 2,", "torch.ones(rows, dtype=torch.int64,", "test_search_identity.py"),
]  # fmt: skip
SPREAD = [
    Mutation("spread: gradients of a sum, not of a mean", "distributed/sums.py", "grad * ctx.size, None", "grad, None", "test_models_spread.py -k training"),
    Mutation("spread: stretches joined that see a part", "distributed/blocks.py", "found[-1].sees == pair.sees ==", "pair.sees in", "test_distributed.py -k 'equals or nobody'"),
    Mutation("spread: the other keys' weight", "distributed/ring.py", "torch.nan_to_num(new_lse - lse)", "torch.nan_to_num(lse - new_lse)", "test_distributed.py -k equals"),
    Mutation("spread: a block that is waited for first", "distributed/ring.py", "pass_on(block, coming)\n        for pair", "pass_on(block, coming)\n        finish(plan.line, works)\n        works = []\n        for pair", "test_distributed.py -k on_its_way"),
    Mutation("spread: a block that a name holds", "distributed/ring.py", "            found = blocks.attend(plan.backend, _parts(q, block, pair), pair, plan.hidden)", "            held = _parts(q, block, pair)\n            found = blocks.attend(plan.backend, held, pair, plan.hidden)", "test_distributed.py -k holds"),
    Mutation("spread: a chunk sees what comes behind it", "integrations/transformers/spread.py", "total = spread.total - (queries - some.stop)", "total = spread.total", "test_models_spread.py -k chunks"),
    Mutation("spread: the last token of another rank", "integrations/transformers/spread.py", "owner = 0 if", "owner = -1 if", "test_models_spread.py -k generates"),
    Mutation("spread: the first rope for all layers", "integrations/transformers/attention.py", "attend_spread(q, k, v, call, rope,", "attend_spread(q, k, v, call, settings.rope,", "test_models_spread.py -k several"),
    Mutation("spread: a token scored by its own hidden state", "search/own_tokens.py", "tokens[:, before + 1]", "tokens[:, before]", "test_search_spread.py -k losses"),
    Mutation("spread: every rank tells its candidates", "search/distributed.py", "for found, _ in answers[::sharing]", "for found, _ in answers", "test_search_spread.py -k plain"),
    Mutation("spread: windows of each process", "search/tune.py", "accelerator.process_index // sharing", "accelerator.process_index", "test_search_spread.py -k shared"),
    Mutation("spread: layers that stay whole", "search/sharding.py", "        fully_shard(layer, mesh=everyone)", "        pass", "test_search_spread.py -k optimiser"),
    Mutation("spread: an optimiser that begins anew", "search/sharding.py", '{"model": weights, "optimizer": of_optimizer}', '{"model": weights, "optimizer": {}}', "test_search_spread.py -k goes_on"),
    Mutation("spread: tied weights written twice", "search/sharding.py", "whole[name] = whole[first[value]]", "pass", "test_search_spread.py -k saves"),
]  # fmt: skip
ALL = [*NUMBERS, *ATTENTION, *DECODING, *CACHES, *MODELS, *SEARCH, *SPREAD]


def survives(mutation: Mutation, tree: Path) -> bool:
    """Whether its tests pass all the same."""
    path = tree / PACKAGE / mutation.file
    text = path.read_text("utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file}: expected {mutation.old!r} once")
    path.write_text(text.replace(mutation.old, mutation.new), "utf-8")
    names, _, chosen = mutation.tests.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/{name}" for name in names.split()]
    command += ["-k", chosen.strip("'")] if chosen else []
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    path.write_text(text, "utf-8")
    if done.returncode > 1:  # nothing selected, or not collected; below 0 it crashed, which is seen
        raise RuntimeError(f"{mutation.name}: {done.stdout[-2000:]}")
    return done.returncode == 0


def main(wanted: list[str]) -> int:
    chosen = [one for one in ALL if all(word in one.name for word in wanted)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in (PACKAGE, "tests", "benchmarks", "pyproject.toml", "csrc", "reports"):
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__")
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=ignored)
            else:
                shutil.copy(source, tree / name)
        for mutation in chosen:
            survived = survives(mutation, tree)
            survivors += survived
            print(f"{'SURVIVED' if survived else 'caught  '}  {mutation.name}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
