"""A pause that waits: what has begun is finished, across the switch and short of blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import ORIGINAL, save_model
from test_scheduler import ask, drive, make
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("policy", "blocks", "most"),
    [("recompute", 60, 3), ("recompute", 17, 2), ("prompt", 17, 2), ("recompute", 11, 1)],
)
def test_what_has_begun_is_finished(
    policy: str, blocks: int, most: int, ahead: bool, tmp_path: Path
) -> None:
    """And nothing else. As many requests as these blocks are enough for at first, or all."""
    init_none_hash(sha256)
    scheduler = make(save_model(tmp_path), ahead, blocks, 0)
    requests = [ask(name, ORIGINAL - 10, 60, policy) for name in ("1", "22", "333")]
    late = ask("late", 20, 4, policy)
    begun: list[Any] = []
    schedule = scheduler.schedule

    def scheduled() -> Any:
        if not begun and requests[0].num_output_tokens > 8:
            begun.extend(one for one in requests if one.num_output_tokens)
            scheduler.set_pause_state(PauseState.PAUSED_NEW)
            scheduler.add_request(late)
        return schedule()

    scheduler.schedule = scheduled
    drive(scheduler, requests, ahead, 0)
    assert [one.num_output_tokens for one in begun] == [60] * most
    assert any(one.num_preemptions for one in begun)
    waiting = [one for one in (*requests, late) if one not in begun]
    assert {one.status for one in waiting} == {RequestStatus.WAITING}
    assert not any(one.num_computed_tokens for one in waiting)
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert scheduler.get_num_unfinished_requests() == len(waiting)
