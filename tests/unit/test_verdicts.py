"""Goals of the reference tasks: reached, missed, or not decided by what was measured."""

import math
from dataclasses import replace

import numpy as np
import pytest

from vmd_scale.reproduction.task import Goal, Row
from vmd_scale.reproduction.tasks import TASKS
from vmd_scale.reproduction.verdicts import paired_difference, verdict_table, verdicts

ROW = Row("t", "", "vmd", "iw", 1, 1, "fixed", "balanced", "", "", "bound_nats", 64, 2.34, 0.01, 0.02, 3, None)


def reached(goal, *rows):
    return [v.reached for v in verdicts(goal, rows)]


def test_a_limit_is_reached_or_missed():
    assert reached(Goal("bound_nats", 1, at_most=2.35), ROW) == ["yes"]
    assert reached(Goal("bound_nats", 1, at_most=2.33), ROW) == ["no"]
    assert reached(Goal("bound_nats", 1, at_least=2.33), ROW) == ["yes"]
    assert reached(Goal("bound_nats", 1, at_least=2.39, at_most=3), ROW) == ["no"]
    assert reached(Goal("bound_nats", 1, at_least=2.39, slack=3), ROW) == ["yes"]  # 2.34 + 3 x 0.02
    assert reached(Goal("bound_nats", 1, at_least=2.41, slack=3), ROW) == ["no"]


def test_a_goal_is_about_its_own_rows_only():
    for other in ({"method": "mdm"}, {"steps": 2}, {"blocks": 2}, {"metric": "kl"}, {"latent": "fresh"}):
        assert reached(Goal("bound_nats", 1, at_most=9), replace(ROW, **other)) == []
    named = Goal("bound_nats", 1, at_most=9, variant="circles", law="balanced", tokens="drawn", split="test")
    right = replace(ROW, variant="circles", tokens="drawn", split="test")
    assert reached(named, right) == ["yes"]
    for other in ({"variant": "0.5"}, {"law": "bernoulli"}, {"tokens": "argmax"}, {"split": "validation"}):
        assert reached(named, replace(right, **other)) == []
    assert reached(Goal("bound_nats", 1, at_most=2.35), replace(ROW, scaled_down=True)) == []


def test_the_better_way_to_take_tokens_counts_and_the_largest_k():
    drawn = replace(ROW, metric="accuracy", tokens="drawn", k=None, mean=0.9)
    argmax = replace(drawn, tokens="argmax", mean=0.99)
    assert reached(Goal("accuracy", 1, at_least=0.95), drawn, argmax) == ["yes"]
    assert reached(Goal("accuracy", 1, at_least=0.95, tokens="drawn"), drawn, argmax) == ["no"]
    better = [replace(drawn, metric="kl", mean=0.5), replace(argmax, metric="kl", mean=0.1)]
    assert reached(Goal("kl", 1, at_most=0.2), *better) == ["yes"]
    loose = replace(ROW, k=1, mean=2.0)  # by chance below
    assert reached(Goal("bound_nats", 1, at_most=2.1), loose, ROW) == ["no"]


def test_one_method_is_better_only_beyond_the_error():
    goal = Goal("accuracy", 5, better_than="mdm")
    vmd = replace(ROW, metric="accuracy", steps=5, k=None, std=None, standard_error=0.03, seeds=1, split="validation")
    mdm = replace(vmd, method="mdm", standard_error=0.04)  # the error of the difference is 0.05
    for gain, verdict in ((0.11, "yes"), (0.09, "undecided"), (-0.09, "undecided"), (-0.11, "no")):
        assert reached(goal, replace(vmd, mean=0.5 + gain), replace(mdm, mean=0.5)) == [verdict]
    assert reached(goal, vmd) == []
    unknown = [replace(row, standard_error=None) for row in (vmd, mdm)]  # one value of one seed
    assert reached(goal, replace(unknown[0], mean=0.9), unknown[1]) == ["undecided"]
    vmd, mdm = (replace(r, std=s, seeds=9) for r, s in ((vmd, 0.09), (mdm, 0.12)))  # of the means 0.03 and 0.04
    assert reached(goal, replace(vmd, mean=0.61), replace(mdm, mean=0.5)) == ["yes"]
    vmd, mdm = (replace(r, std=s * math.sqrt(2), seeds=2) for r, s in ((vmd, 0.03), (mdm, 0.04)))
    for gain, verdict in ((0.22, "yes"), (0.21, "undecided")):  # 4.3 errors of the difference, 0.05
        assert reached(goal, replace(vmd, mean=0.5 + gain), replace(mdm, mean=0.5)) == [verdict]
    other = [replace(r, split="29-37 clues", mean=mean) for r, mean in ((vmd, 0.9), (mdm, 0.1))]
    assert reached(goal, replace(vmd, mean=0.5), replace(mdm, mean=0.9), *other) == ["no", "yes"]


def test_bounds_on_the_same_rows_are_compared_row_by_row():
    hard = np.random.default_rng(0).normal(2, 1, 200)  # what rows have in common is no error of the difference
    vmd = replace(ROW, metric="perplexity", mean=7.0, row_nats=(tuple(hard - 0.1),), std=None, standard_error=5.0)
    mdm = replace(
        vmd, method="mdm", mean=7.5, row_nats=(tuple(hard + 0.01 * np.random.default_rng(1).normal(size=200)),)
    )
    difference, error, freedom = paired_difference(vmd, mdm)
    assert freedom == 199
    assert difference == pytest.approx(-0.1, abs=0.003)
    assert error == pytest.approx(0.01 / np.sqrt(200), rel=0.2)
    assert reached(Goal("perplexity", 1, better_than="mdm"), vmd, mdm) == ["yes"]
    assert reached(Goal("perplexity", 1, better_than="vmd", method="mdm"), vmd, mdm) == ["no"]
    seeds = replace(vmd, row_nats=((1.0, 2.0), (2.0, 3.0), (3.0, 4.0)))
    others = replace(mdm, row_nats=((0.0, 1.0), (0.0, 1.0), (0.0, 1.0)))
    assert paired_difference(seeds, others) == pytest.approx((2.0, 1 / np.sqrt(3), 2))  # 1, 2, 3 of three seeds


@pytest.mark.parametrize("name", TASKS)
def test_every_goal_of_a_task_is_about_what_the_task_measures(name):
    task = TASKS[name]
    methods = {method.name for method in task.methods}
    for goal in task.goals:
        assert {goal.method, goal.better_than or goal.method} <= methods
        assert goal.variant is None or goal.variant in task.variants
        assert (goal.at_least, goal.at_most, goal.better_than) != (None, None, None)


def test_the_table_names_what_differs():
    text = verdict_table(replace(TASKS["four_tokens_d1"], goals=(Goal("bound_nats", 1, at_most=2.35),)), [ROW])
    assert "| vmd | 1 | bound_nats (K = 64) | at most 2.35 | 2.3400 ± 0.0100 | yes |" in text
    assert verdict_table(TASKS["cifar10"], [ROW]) == ""
