"""The helper itself: a test that hangs or hides a rank's failure would be worth nothing."""

import os
import time

import pytest
from ranks import run_in_processes


def who_am_i(offset):
    return int(os.environ["RANK"]) + offset, os.environ["WORLD_SIZE"]


def fail_on_rank_one():
    if os.environ["RANK"] == "1":
        raise ValueError("rank one says no")
    time.sleep(600)


def never_answer():
    time.sleep(600)


def die():
    os._exit(3)


def test_results_come_in_the_order_of_the_ranks_and_the_environment_is_put_back():
    before = dict(os.environ)
    assert run_in_processes(who_am_i, 2, 10) == [(10, "2"), (11, "2")]
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (fail_on_rank_one, RuntimeError, "(?s)rank 1 failed:.*fail_on_rank_one.*ValueError: rank one says no"),
        (never_answer, TimeoutError, r"rank\(s\) \[0, 1\]"),
        (die, RuntimeError, "died without a word"),
    ],
)
def test_a_failure_is_raised_with_its_cause_and_nobody_is_waited_for(function, error, match):
    with pytest.raises(error, match=match):
        run_in_processes(function, 2, timeout=2 if function is never_answer else 60)


def fail_on(rank: int, where: str) -> str:
    """What each rank hears when something fails on one of them."""
    from vmd_scale.errors import RunFailed, UserError
    from vmd_scale.training.launch import join_world, leave_world

    world = join_world()

    def do() -> None:
        if world.rank == rank:
            raise {"on_all": UserError("its disk"), "on_main": RunFailed("the corpus")}[where]

    try:
        getattr(world, where)(do)
    except (UserError, RunFailed) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        leave_world()
    return "nothing"


@pytest.mark.parametrize(
    ("rank", "where", "heard"),
    [(1, "on_all", "UserError: its disk"), (0, "on_main", "RunFailed: the corpus"), (1, "on_main", "nothing")],
)
def test_what_fails_on_one_rank_is_raised_on_all(rank, where, heard):
    """`on_main` asks rank 0 alone."""
    assert run_in_processes(fail_on, 2, rank, where) == [heard, heard]
