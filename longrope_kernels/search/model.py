"""A model as what a search measures: the losses of tokens under a rope."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..distributed.ranks import Group
from ..rope.value import Rope
from .needles import Needle
from .own_tokens import OwnTokens

Ropes = Rope | Sequence[Rope]
Head = Callable[[torch.Tensor], torch.Tensor]  # hidden states to logits
CHUNK_NUMBERS = 2**24  # of logits in memory at a time: 64 MB in float32


class Answer(NamedTuple):
    """Of the tokens of an answer, each after the true ones before it."""

    losses: torch.Tensor  # (tokens,) float32 on the host, in nats
    likeliest: torch.Tensor  # (tokens,) bool on the host: no other token has a higher logit

    @property
    def found(self) -> bool:
        """Whether greedy decoding would give the answer in full."""
        return bool(self.likeliest.all())


class Losses(Protocol):
    """What the fitness functions ask of a model. A row is one sequence under one rope.

    Without ``keeps``, `read` and `behind` a search judges by skipped windows first.
    """

    def __call__(
        self,
        ropes: Ropes,
        tokens: torch.Tensor,
        *,
        last: int | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross entropy of each token after the first, or of the last ones alone, in nats.

        Args:
            ropes: one for all rows, or one for each; of several sets, that of the length.
            tokens: (rows, length) int64.
            last: how many tokens at the end to score; None for all that have one before them.
            positions: (rows, length) int64, ascending in each row, which is one sequence also
                where they jump; the last one says how long it is. None for 0, 1, 2, ...

        Returns:
            (rows, last or length - 1) float32 on the host.
        """
        ...

    @property
    def keeps(self) -> bool:
        """Whether there are `read` and `behind`: caches hold keys that no rope has rotated."""
        ...

    def read(self, rope: Rope, text: torch.Tensor, *, length: int) -> Any:
        """Keys and values of a text, for `behind`.

        Args:
            rope: under which it is read; of several sets, that of ``length``.
            text: (tokens,) int64.
            length: in tokens, for which the factor set is chosen.
        """
        ...

    def behind(self, rope: Rope, text: Any, tokens: torch.Tensor, *, length: int) -> torch.Tensor:
        """Cross entropy of tokens behind a text, each but the first, in nats.

        Args:
            rope: which rotates the text's keys too; of several sets, that of ``length``.
            text: of `read`, maybe under another rope. It is as before when this ends.
            tokens: (tokens,) int64, which follow the text.
            length: in tokens, for which the factor set is chosen.

        Returns:
            (tokens - 1,) float32 on the host.
        """
        ...

    def answers(
        self, rope: Rope, text: torch.Tensor, needles: Sequence[Needle], *, length: int
    ) -> list[Answer]:
        """What it answers about a text, which it reads once for all questions.

        Args:
            rope: of several sets, that of ``length``.
            text: (tokens,) int64.
            needles: each question follows the text alone, and its answer the question.
            length: in tokens, for which the factor set is chosen.

        Returns:
            An `Answer` for each needle.
        """
        ...


class TransformersLosses:
    """The losses of a causal language model of transformers, which is enabled with this package.

    A rope is put into the enabled model (`set_rope`): no weight, table or kernel is made anew.
    Rows that share a forward may have different ropes: each is a factor set of one `Rope`, pinned
    to its row. Models that `enable` serves with rotated keys alone have a forward for each row.
    Logits exist for a chunk of the scored positions at a time.

    Attributes:
        model: the model, enabled; ``disable(model)`` gives it back as it was.
        rope: that of its config. Ropes to measure have as many pairs, its base and its pairing.
    """

    def __init__(
        self,
        model: Any,
        *,
        backend: str | None = None,
        batch_tokens: int | None = None,
        group: Group = None,
    ) -> None:
        """Enable ``model`` and put it into eval mode.

        Args:
            model: with a language-model head, of those that `enable` serves.
            backend: as in `enable`.
            batch_tokens: how many tokens a forward has at most, where it has more than one row;
                by default 32768 on a GPU, and one row at a time on a CPU. A forward that does not
                fit into the memory of a device is tried again in halves.
            group: as in `enable`: its ranks measure each row together, all call alike, and each
                gets all losses. What does not fit into memory is not tried again then.

        Raises:
            ValueError: the model has no head, no rotary embedding that this package knows, or
                several for layers of several kinds; ``batch_tokens`` is not positive.
        """
        from ..integrations.transformers import disable, enable
        from ..integrations.transformers.models import cache_of

        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise ValueError(
                "model: expected one with a language-model head (AutoModelForCausalLM), got "
                f"{type(model).__name__}"
            )
        if batch_tokens is not None and batch_tokens < 1:
            raise ValueError(f"batch_tokens: expected at least 1, got {batch_tokens}")
        cache = cache_of(model)
        self._row_by_row = cache == "rotated"
        self.model = enable(model.eval(), cache=cache, backend=backend)
        try:
            self.rope = _only_rope(self.model)
            self._head = head_of(self.model)
            if group is not None:  # the head was tried on whole sequences
                enable(model, cache=cache, backend=backend, group=group)
        except Exception:
            disable(model)
            raise
        self._group = group
        weight = next(model.parameters())
        if batch_tokens is None:
            batch_tokens = 2**15 if weight.device.type != "cpu" else 1
        self._batch_tokens = batch_tokens

    def __call__(
        self,
        ropes: Ropes,
        tokens: torch.Tensor,
        *,
        last: int | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Losses`.

        Raises:
            ValueError, TypeError: naming the argument that does not fit the model.
        """
        count = tokens.shape[-1] - 1 if last is None else last
        return self._rows(ropes, tokens, count, positions)

    @property
    def keeps(self) -> bool:
        """As `Losses`: not over ranks, nor where layers keep states or rotated keys."""
        alone = self._group is None and not self._row_by_row
        return alone and _cache_of_keys(self.model) is not None

    @torch.no_grad()
    def read(self, rope: Rope, text: torch.Tensor, *, length: int) -> Any:
        """As `Losses`.

        Raises:
            ValueError, TypeError: naming the argument that does not fit the model.
        """
        self._put(rope, length)
        cache = _cache_of_keys(self.model)
        self._hidden(text[None], cache)
        return cache

    @torch.no_grad()
    def behind(self, rope: Rope, text: Any, tokens: torch.Tensor, *, length: int) -> torch.Tensor:
        """As `Losses`.

        Raises:
            ValueError, TypeError: naming the argument that does not fit the model.
        """
        self._put(rope, length)
        hidden = self._hidden(tokens[None, :-1], text)
        text.crop(1 - len(tokens))
        return self._scored(hidden, tokens[None, 1:])[0].cpu()

    @torch.no_grad()
    def answers(
        self, rope: Rope, text: torch.Tensor, needles: Sequence[Needle], *, length: int
    ) -> list[Answer]:
        """As `Losses`; a cache keeps the keys and values of the text, and drops a question's.

        Where layers keep states instead, the text is read again for each question.

        Raises:
            ValueError, TypeError: naming the argument that does not fit the model.
        """
        _check_answers(text, needles, length)
        self._put(rope, length)
        cache = _cache_of_keys(self.model)
        if cache is not None:
            self._hidden(text[None], cache)
        found = []
        for _, question, answer in needles:
            # Nothing is asked after the last token.
            asked = torch.tensor([[*question, *answer[:-1]]])
            whole = asked if cache is not None else torch.cat([text[None], asked], 1)
            logits = self._head(self._hidden(whole, cache)[:, -len(answer) :])
            if cache is not None:
                cache.crop(-asked.shape[1])
            right = torch.tensor([answer], device=logits.device)
            losses, likeliest = _cross_entropy(logits, right), logits.argmax(-1) == right
            found.append(Answer(losses[0].cpu(), likeliest[0].cpu()))
        return found

    def _put(self, rope: Rope, length: int) -> None:
        """The set of one rope for a length, into the model."""
        from ..integrations.transformers import set_rope

        self._check_rope(rope)
        set_rope(self.model, merged([rope], [length])[0])

    def _hidden(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Of tokens behind those of a cache, which keeps them too; None for none."""
        kept = {} if cache is None else {_name_of_cache(self.model.base_model): cache}
        ids = ids.to(self.model.device)
        out: Any = self.model.base_model(input_ids=ids, use_cache=cache is not None, **kept)
        hidden: torch.Tensor = out.last_hidden_state
        return hidden

    def _scored(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The losses of targets, (rows, targets), each by the hidden state before it."""
        vocabulary = self.model.config.get_text_config().vocab_size
        step = max(CHUNK_NUMBERS // (vocabulary * len(targets)), 1)
        parts = []
        for at in range(0, max(hidden.shape[1], 1), step):
            logits = self._head(hidden[:, at : at + step])
            parts.append(_cross_entropy(logits, targets[:, at : at + step].to(logits.device)))
        return torch.cat(parts, 1)

    def _rows(
        self,
        ropes: Ropes,
        tokens: torch.Tensor,
        last: int,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self._check_tokens(tokens, last)
        if positions is not None:
            _check_positions(positions, tokens)
        rows, length = tokens.shape
        ropes = [ropes] * rows if isinstance(ropes, Rope) else list(ropes)
        if len(ropes) != rows:
            raise ValueError(f"ropes: expected one, or one for each of {rows} rows: {len(ropes)}")
        for rope in {id(rope): rope for rope in ropes}.values():
            self._check_rope(rope)
        step = 1 if self._row_by_row else max(self._batch_tokens // length, 1)
        parts = [
            self._in_halves(ropes[part], tokens[part], last, _of(positions, part))
            for part in (slice(at, at + step) for at in range(0, rows, step))
        ]
        return torch.cat(parts)

    def _in_halves(
        self,
        ropes: list[Rope],
        tokens: torch.Tensor,
        last: int,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        try:
            return self._forward(ropes, tokens, last, positions)
        except torch.OutOfMemoryError:
            if len(ropes) == 1 or self._group is not None:  # the other ranks may have had room
                raise
        # Outside of the handler, whose traceback holds the tensors that were too many.
        half = len(ropes) // 2
        self._batch_tokens = max(half * tokens.shape[1], 1)
        parts = [
            self._in_halves(ropes[part], tokens[part], last, _of(positions, part))
            for part in (slice(half), slice(half, None))
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def _forward(
        self,
        ropes: list[Rope],
        tokens: torch.Tensor,
        last: int,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        from ..integrations.transformers import set_rope

        ends = [tokens.shape[1]] * len(ropes)
        if positions is not None:
            ends = (positions[:, -1] + 1).tolist()
        rope, sets = merged(ropes, ends)
        set_rope(self.model, rope)
        tokens = tokens.to(self.model.device)
        chosen = {} if len(rope.sets) == 1 else {"longrope_sets": sets.to(tokens.device)}
        if positions is not None:
            # transformers takes positions that jump for packed sequences, unless it has a mask.
            mask = torch.ones_like(tokens)
            chosen |= {"position_ids": positions.to(tokens.device), "attention_mask": mask}
        base = self.model.base_model
        hidden = base(input_ids=tokens, use_cache=False, **chosen).last_hidden_state
        own = None if self._group is None else OwnTokens(self._group, tokens.shape[1], last)
        if own is None:
            hidden, targets = hidden[:, -last - 1 : -1], tokens[:, -last:]
        else:
            hidden, targets = own.of(hidden, tokens)
        found = self._scored(hidden, targets)
        return (found if own is None else own.of_all(found)).cpu()

    def _check_tokens(self, tokens: torch.Tensor, last: int) -> None:
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens: expected (rows, length) int64, got {tuple(tokens.shape)}, {tokens.dtype}"
            )
        if not 0 < last < tokens.shape[1]:
            raise ValueError(
                f"last: expected 1 to {tokens.shape[1] - 1}, since the first of "
                f"{tokens.shape[1]} tokens has none before it, got {last}"
            )

    def _check_rope(self, rope: Rope) -> None:
        if not isinstance(rope, Rope):
            raise TypeError(f"rope: expected a Rope, got {type(rope).__name__}")
        for name in ("rotary_dim", "base", "interleaved"):
            wanted, got = getattr(self.rope, name), getattr(rope, name)
            if wanted != got:
                raise ValueError(f"rope: expected {name} = {wanted} as in the model, got {got}")


def head_of(model: Any) -> Head:
    """From hidden states to logits, as the model does it: its head, which some scale or cap.

    Raises:
        ValueError: it does something else.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
    scale = scale or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = head(hidden)
        if scale != 1:
            found = found * scale
        return found if cap is None else cap * torch.tanh(found / cap)

    ids = torch.arange(8, device=model.device)[None] % config.vocab_size
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        base = model.base_model(input_ids=ids, use_cache=False)
        hidden = getattr(base, "last_hidden_state", None)
        if hidden is None or not torch.allclose(
            logits(hidden), expected, rtol=1e-2, atol=1e-2, equal_nan=True
        ):  # NaN is for a search to report
            raise ValueError(
                "model: expected logits that are what its head gives, scaled or capped, got a "
                f"{type(model).__name__}, which makes others"
            )
    return logits


def _cache_of_keys(model: nn.Module) -> Any:
    """A cache that can drop its last tokens; None where layers keep states of all that they saw."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=model.config).layers
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    # One made for the config drops what no window sees any more, and takes nothing back.
    return DynamicCache() if all(type(layer) in kinds for layer in layers) else None


def _name_of_cache(model: nn.Module) -> str:
    """What transformers calls it: it was renamed in 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _only_rope(model: nn.Module) -> Rope:
    """Of an enabled model."""
    from ..integrations.transformers import ExactRotaryEmbedding

    found = next(one for one in model.modules() if isinstance(one, ExactRotaryEmbedding))
    if len(found.settings.ropes) > 1:
        raise ValueError(
            "model: expected one rope for all layers, which a search extends, got one for each of "
            f"{', '.join(found.settings.ropes)}"
        )
    return found.rope


def merged(ropes: Sequence[Rope], lengths: Sequence[int]) -> tuple[Rope, torch.Tensor]:
    """One rope with the factor sets that several have for sequences of given lengths.

    Args:
        ropes: of the same pairs, base and pairing, one for each row.
        lengths: of each row, in tokens.

    Returns:
        The rope, whose bounds mean nothing, and the set of each row, (rows,) int32.
    """
    of_rows = [
        replace(rope.sets[rope.set_index(length)], max_length=None)
        for rope, length in zip(ropes, lengths, strict=True)
    ]
    unique = {factor_set: index for index, factor_set in enumerate(dict.fromkeys(of_rows))}
    sets = tuple(
        replace(factor_set, max_length=None if index == len(unique) - 1 else index + 1)
        for factor_set, index in unique.items()
    )
    rope = Rope(sets, ropes[0].base, ropes[0].interleaved)
    return rope, torch.tensor([unique[s] for s in of_rows], dtype=torch.int32)


def _of(positions: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if positions is None else positions[rows]


def _check_positions(positions: torch.Tensor, tokens: torch.Tensor) -> None:
    if positions.shape != tokens.shape or positions.dtype != torch.int64:
        raise ValueError(
            f"positions: expected {tuple(tokens.shape)} int64 as tokens, got "
            f"{tuple(positions.shape)}, {positions.dtype}"
        )
    if bool((positions.diff() < 1).any()) or bool((positions < 0).any()):
        raise ValueError("positions: expected 0 or more, ascending in each row, got others")


def _check_answers(text: torch.Tensor, needles: Sequence[Needle], length: int) -> None:
    if text.dim() != 1 or text.dtype != torch.int64 or not len(text):
        raise ValueError(f"text: expected (tokens,) int64, got {tuple(text.shape)}, {text.dtype}")
    for needle in needles:
        if not needle.question or not needle.answer:
            raise ValueError(f"needles: expected a question and an answer, got {needle}")
        whole = len(text) + len(needle.question) + len(needle.answer)
        if whole > length:
            raise ValueError(f"length: expected at least {whole} tokens, got {length}")


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = logits.float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)
