"""The baseline: CMA-ES with categories and integers (CatCMAwM, arXiv 2504.07884) on the same space.

Factors are sampled as logarithms, clipped to the range, and sorted where they have to be in order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

try:
    import cmaes
    import numpy as np
except ImportError as error:
    raise ImportError(
        f"{__name__} needs cmaes and numpy: pip install 'longrope-kernels[search]'"
    ) from error

from .base import Search
from .candidate import Candidate
from .coarse import Sieve
from .evolution import EvolutionSettings
from .space import SearchSpace, check_whole

# Generations without a new candidate, one after the other, after which a search ends.
_ATTEMPTS = 100
# First standard deviations: of a factor's logarithm, as a share of the range's, and of an attention
# factor in hundredths.
_FACTOR_SPREAD, _ATTENTION_SPREAD = 0.04, 4.0


@dataclass(frozen=True)
class CmaEsSettings:
    """As many evaluations, by default, as the paper's search has.

    Attributes:
        population: candidates of an iteration, at least 4.
        iterations: the first one are PI, NTK and YaRN; the best is where the sampling begins.
        seed: of all random choices.

    Raises:
        ValueError, TypeError: naming the attribute that is out of range.
    """

    population: int = 16
    iterations: int = 82
    seed: int = 0

    @classmethod
    def matching(cls, settings: EvolutionSettings, starts: int) -> CmaEsSettings:
        """At most as many evaluations as an evolutionary search of these settings has."""
        left = max(settings.candidates - starts, 0)
        population = max(4, min(cls.population, left))
        return cls(population, 1 + left // population, settings.seed)

    def __post_init__(self) -> None:
        for name, least in {"population": 4, "iterations": 1, "seed": 0}.items():
            check_whole(name, getattr(self, name), least)


class CmaEsSearch(Search):
    """CatCMAwM behind the same ask and tell; a resume replays the journal.

    Args:
        space: what may be proposed.
        settings: the defaults where not given; those of an evolutionary search mean at most as many
            evaluations and the same seed.
        folder: of the journal and the state, as in `Search`.
        context: as in `Search`.
        formulas: as in `Search`.
        sieve: as in `Search`.

    Raises:
        ImportError: the package ``cmaes`` is not there.
    """

    def __init__(
        self,
        space: SearchSpace,
        settings: CmaEsSettings | EvolutionSettings | None = None,
        folder: str | os.PathLike[str] | None = None,
        context: Mapping[str, Any] | None = None,
        formulas: Sequence[str] = (),
        sieve: Sieve | None = None,
    ) -> None:
        if not hasattr(cmaes, "CatCMAwM"):
            raise ImportError(f"cmaes: expected a version with CatCMAwM, got {cmaes.__version__}")
        if isinstance(settings, EvolutionSettings):
            settings = CmaEsSettings.matching(settings, len(space.starts()))
        self.settings = settings or CmaEsSettings()
        self._optimizer: Any = None
        self._known: set[Candidate] = set()
        self._origin = ""
        # What the optimiser sampled, and the candidate each sample stands for.
        self._generation: list[tuple[Any, Candidate]] = []
        config = {"optimizer": "cmaes", "settings": asdict(self.settings)}
        super().__init__(space, config, self.settings.iterations, folder, context, formulas, sieve)

    @property
    def total(self) -> int:
        starts = len(self.space.starts())
        return starts + (self.settings.iterations - 1) * self.settings.population

    def _propose(self) -> list[Candidate]:
        if not self._known:
            starts = self.space.starts()
            self._known.update(starts)
            return starts
        if self._optimizer is None:
            self._optimizer = self._start()
        else:
            self._teach()
        for _ in range(_ATTEMPTS):
            samples = [self._optimizer.ask() for _ in range(self.settings.population)]
            self._generation = [(sample, self._candidate(sample)) for sample in samples]
            found = dict.fromkeys(candidate for _, candidate in self._generation)
            new = [candidate for candidate in found if candidate not in self._known]
            if new:
                self._known.update(new)
                return new
            self._teach()
        return []

    def _teach(self) -> None:
        # Ranks in place of fitness: NaN, stopped early and ties have one, and CMA-ES asks no more.
        order = sorted(
            range(len(self._generation)),
            key=lambda i: self._rank(self._generation[i][1]),
        )
        ranked = [(self._generation[i][0], float(rank)) for rank, i in enumerate(order)]
        self._optimizer.tell(ranked)

    def _start(self) -> Any:
        """The optimiser, with its mean at the best start."""
        space = self.space
        start = min(self._asked[0], key=self._rank)
        self._origin = start.origin
        low, high = (math.log(bound) for bound in space.bounds)
        mean = [math.log(value) for value in start.factors]
        # A sample is clipped, so equal bounds need some room here as well.
        bounds = [[low, max(high, low + 1e-6)]] * space.genes
        variances = [(_FACTOR_SPREAD * (bounds[0][1] - low)) ** 2] * space.genes
        steps = None
        least, most = space.attention_bounds or (0, 0)
        if least < most:
            steps = [list(range(least, most + 1))]
            mean.append(float(start.attention or least))
            variances.append(_ATTENTION_SPREAD**2)
        thresholds = len(space.thresholds)
        return cmaes.CatCMAwM(
            x_space=bounds,
            z_space=steps,
            c_space=[thresholds] if thresholds > 1 else None,
            population_size=self.settings.population,
            mean=np.array(mean),
            sigma=1.0,
            cov=np.diag(variances),
            seed=self.settings.seed,
        )

    def _candidate(self, sample: Any) -> Candidate:
        low, high = self.space.bounds
        logs = [float(value) for value in sample.x]
        if self.space.monotone:
            logs.sort()
        factors = tuple(min(max(round(math.exp(value)), low), high) for value in logs)
        thresholds = self.space.thresholds
        n_hat = thresholds[0] if sample.c is None else thresholds[int(np.argmax(sample.c[0]))]
        attention = None
        if self.space.attention_bounds is not None:
            fixed = self.space.attention_bounds[0]
            attention = fixed if sample.z is None else int(sample.z[0])
        return Candidate(factors, n_hat, attention, self._origin)

    def _memory(self) -> dict[str, Any]:
        return {"cmaes": cmaes.__version__, "numpy": np.__version__}

    def _recall(self, memory: Mapping[str, Any]) -> None:
        """Sample again what was sampled, from the seed, and tell what is in the journal."""
        sampled = self._asked[: len(self._asked) - self._closing]
        for iteration, asked in enumerate(sampled):
            if self._propose() != asked:
                raise ValueError(
                    f"folder: expected the samples of iteration {iteration} again; made with "
                    f"{dict(memory)}, and here is {self._memory()}"
                )
