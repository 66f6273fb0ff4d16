"""The search for LongRoPE's factors: what may be proposed, by ask and tell, resumable, parallel."""

from .base import Iteration, Search
from .candidate import Candidate, Evaluation
from .evolution import EvolutionarySearch, EvolutionSettings
from .run import run_search
from .space import PAPER_N_HATS, SearchSpace, critical_dimension

__all__ = [
    "PAPER_N_HATS",
    "Candidate",
    "Evaluation",
    "EvolutionSettings",
    "EvolutionarySearch",
    "Iteration",
    "Search",
    "SearchSpace",
    "critical_dimension",
    "run_search",
]
