"""Each rule against the plain sentence that says what it takes."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from pukd_ray.config import NEEDED_BY_RULES, RuleName, SelectionConfig
from pukd_ray.selection.cuts import (
    EVERYTHING,
    NOTHING,
    Cut,
    Scores,
    ordered_bits,
    precision_count,
    share_quota,
    unit_interval,
)
from pukd_ray.selection.rules import RULES
from pukd_ray.selection.rules.base import Supply

CLASSES = 4


def make_scores(seed: int, n: int = 300) -> Scores:
    rng = np.random.default_rng(seed)
    logit = np.round(rng.normal(-0.3, 1.0, n), 1).astype(np.float32)  # many ties, and -0.0 next to 0.0
    return Scores(
        pu_logit=logit,
        pu_probability=(1 / (1 + np.exp(-logit))).astype(np.float32),
        teacher_label=rng.choice(CLASSES, n, p=[0.6, 0.25, 0.1, 0.05]).astype(np.int32),
        teacher_confidence=np.round(rng.random(n), 1).astype(np.float32),
        relevant=rng.random(n) < 0.3,
        tie_breaker=rng.integers(-(2**63), 2**63, n, dtype=np.int64),
        more={"teacher_entropy": np.round(rng.random(n), 1).astype(np.float32)},
    )


def take(config: SelectionConfig, scores: Scores, prior: float = 0.3) -> set[int]:
    """What stage `select` does with rules, on one machine: count, cut, admit."""
    rule = RULES[config.rule]
    allowed = rule.eligible(config, scores)
    bits = ordered_bits(rule.ranking(config, scores))
    groups = rule.groups(scores)
    size = CLASSES if rule.per_class else 1
    available = np.bincount(groups[allowed], minlength=size)
    order = np.argsort(-scores.pu_logit[allowed], kind="stable")
    supply = Supply(prior, len(bits), scores.pu_probability[allowed][order], np.ones(len(order), np.int64))
    targets = rule.targets(config, available, supply)
    taken: set[int] = set()
    for g in range(size):
        mine = np.flatnonzero(allowed & (groups == g))
        if targets is None or targets[g] >= available[g]:
            cut = EVERYTHING
        elif targets[g] == 0:
            cut = NOTHING
        else:
            last = sorted(mine, key=lambda i: (-int(bits[i]), int(scores.tie_breaker[i])))[targets[g] - 1]
            cut = Cut(int(bits[last]), int(scores.tie_breaker[last]))
        taken |= set(mine[cut.admits(bits[mine], scores.tie_breaker[mine])].tolist())
    return taken


def best(scores: Scores, key: np.ndarray, among: np.ndarray, count: int) -> set[int]:
    """The `count` highest keys, equal ones by tie breaker."""
    order = np.lexsort((scores.tie_breaker, -key.astype(np.float64)))
    return set(order[among[order]][:count].tolist())


def positive(s: Scores) -> np.ndarray:
    return s.pu_logit > 0


def everyone(s: Scores) -> np.ndarray:
    return np.ones(len(s.pu_logit), bool)


TAKES: dict[str, tuple[dict[str, Any], Callable[[Scores], set[int]]]] = {
    "positive": ({}, lambda s: set(np.flatnonzero(positive(s)).tolist())),
    "threshold": ({"threshold": 0.5}, lambda s: set(np.flatnonzero(s.pu_probability >= 0.5).tolist())),
    "budget": ({"budget": 30}, lambda s: best(s, s.pu_logit, positive(s), 30)),
    "prior": ({}, lambda s: best(s, s.pu_logit, everyone(s), round(0.3 * len(s.pu_logit)))),
    "random": ({"budget": 40}, lambda s: best(s, unit_interval(s.tie_breaker), everyone(s), 40)),
    "teacher_confidence": ({"budget": 40}, lambda s: best(s, s.teacher_confidence, everyone(s), 40)),
    "entropy": ({"budget": 40}, lambda s: best(s, -s.more["teacher_entropy"], everyone(s), 40)),
    "all": ({}, lambda s: set(range(len(s.pu_logit)))),
    "truth": ({}, lambda s: set(np.flatnonzero(s.relevant).tolist())),
}


@pytest.mark.parametrize("rule", TAKES)
@pytest.mark.parametrize("seed", range(5))
def test_rules_against_brute_force(rule: str, seed: int) -> None:
    options, expected = TAKES[rule]
    scores = make_scores(seed)
    assert take(SelectionConfig(rule=rule, **options), scores) == expected(scores)


def test_as_many_as_the_prior_says_without_what_was_dropped_as_copies() -> None:
    chosen = RULES["prior"]
    left = Supply(0.25, 10_000, np.array([0.9, 0.01]), np.array([1000, 7500]))  # of 2,500 relevant images
    targets = chosen.targets(SelectionConfig(rule="prior"), np.array([8500]), left)
    assert targets is not None
    assert targets.tolist() == [975]


@pytest.mark.parametrize("seed", range(5))
def test_a_random_budget_is_a_random_part_of_the_positives(seed: int) -> None:
    scores = make_scores(seed)
    taken = take(SelectionConfig(rule="budget", budget=30, order="random"), scores)
    assert taken == best(scores, unit_interval(scores.tie_breaker), positive(scores), 30)
    assert taken != best(scores, scores.pu_logit, positive(scores), 30)


@pytest.mark.parametrize("rule", ["budget", "random", "teacher_confidence", "teacher_topk_per_class", "quota"])
def test_a_budget_beyond_the_supply_takes_all_there_is(rule: str) -> None:
    scores = make_scores(1)
    supply = positive(scores) if rule in ("budget", "quota") else everyone(scores)
    assert take(SelectionConfig(rule=rule, budget=10**6), scores) == set(np.flatnonzero(supply).tolist())


@pytest.mark.parametrize("order", ["top", "random"])
@pytest.mark.parametrize("seed", range(3))
def test_a_quota_is_the_best_of_each_class(order: str, seed: int) -> None:
    scores = make_scores(seed)
    taken = take(SelectionConfig(rule="quota", budget=40, order=order), scores)
    key = scores.pu_logit if order == "top" else unit_interval(scores.tie_breaker)
    of_class = [positive(scores) & (scores.teacher_label == k) for k in range(CLASSES)]
    shares = share_quota(np.array([m.sum() for m in of_class]), 40)
    assert shares.sum() == 40
    assert taken == set().union(*(best(scores, key, m, int(n)) for m, n in zip(of_class, shares, strict=True)))


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_of_the_surest_of_each_class(seed: int) -> None:
    scores = make_scores(seed)
    taken = take(SelectionConfig(rule="teacher_topk_per_class", budget=60), scores)
    of_class = [scores.teacher_label == k for k in range(CLASSES)]
    shares = share_quota(np.array([m.sum() for m in of_class]), 60)
    key = scores.teacher_confidence
    assert taken == set().union(*(best(scores, key, m, int(n)) for m, n in zip(of_class, shares, strict=True)))
    assert taken != best(scores, key, everyone(scores), 60)  # not the surest of all
    assert taken - set(np.flatnonzero(positive(scores)).tolist())  # whatever the selector says


@pytest.mark.parametrize("target", [0.55, 0.7, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_precision_takes_the_most_that_keep_it(target: float, seed: int) -> None:
    scores = make_scores(seed)
    taken = take(SelectionConfig(rule="precision", target_precision=target), scores)
    order = np.lexsort((scores.tie_breaker, -scores.pu_logit.astype(np.float64)))
    probability = scores.pu_probability[order].astype(np.float64)
    most = max((n for n in range(1, len(order) + 1) if probability[:n].mean() >= target), default=0)
    assert 0 < most < len(order)
    assert taken == set(order[:most].tolist())


def test_precision_count_of_bins() -> None:
    probabilities, counts = np.array([0.9, 0.5, 0.1, 0.0]), np.array([10, 10, 0, 20])
    assert precision_count(probabilities, counts, 0.9) == 10
    assert precision_count(probabilities, counts, 0.7) == 20
    assert precision_count(probabilities, counts, 0.35) == 40
    assert precision_count(probabilities, counts, 0.95) == 0
    assert precision_count(np.zeros(0), np.zeros(0), 0.5) == 0
    assert precision_count(np.full(10, 0.1), np.ones(10), 0.1) == 10  # whatever the sums round to


@pytest.mark.parametrize(
    ("available", "budget", "expected"),
    [
        ([10, 10, 10], 9, [3, 3, 3]),
        ([10, 10, 10], 10, [4, 3, 3]),
        ([1, 10, 10], 9, [1, 4, 4]),
        ([0, 2, 10], 9, [0, 2, 7]),
        ([1, 2, 3], 100, [1, 2, 3]),
        ([5, 5], 1, [1, 0]),
        ([0, 0], 5, [0, 0]),
        ([100, 1, 50, 7], 90, [41, 1, 41, 7]),
    ],
)
def test_quotas_are_even_and_pass_on_what_is_not_used(available: list[int], budget: int, expected: list[int]) -> None:
    assert share_quota(np.array(available), budget).tolist() == expected


def test_ordered_bits_sort_as_floats_do() -> None:
    tiny = np.float32(1e-45)  # the smallest of all
    keys = np.array([-np.inf, -3e38, -1.5, -1, -tiny, 0.0, tiny, 1, 1.0000001, 3e38, np.inf], np.float32)
    bits = ordered_bits(keys)
    assert bits.dtype == np.uint32
    assert (np.diff(bits.astype(np.int64)) > 0).all()
    assert ordered_bits(np.array([-0.0], np.float32)) == ordered_bits(np.array([0.0], np.float32))
    random = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert np.array_equal(np.argsort(ordered_bits(random)), np.argsort(random))
    assert np.array_equal(ordered_bits(random[::3]), ordered_bits(random)[::3])


def test_cuts() -> None:
    bits = np.array([5, 6, 6, 6, 7, 0, 2**32 - 1], np.uint32)
    ties = np.array([-9, -3, 0, 4, 99, -(2**63), 2**63 - 1], np.int64)
    assert Cut(6, 0).admits(bits, ties).tolist() == [False, True, True, False, True, False, True]
    for kind in (np.uint32, np.int64):
        assert EVERYTHING.admits(bits.astype(kind), ties).all()
        assert not NOTHING.admits(bits.astype(kind), ties).any()


def test_unit_interval_covers_it_in_the_order_of_unsigned_hashes() -> None:
    hashes = np.array([0, 1, 2**62, 2**63 - 1, -(2**63), -1], np.int64)
    values = unit_interval(hashes)
    assert values.dtype == np.float32
    assert values.tolist() == [0, 0, 0.25, pytest.approx(0.5), 0.5, pytest.approx(1)]
    assert values[-1] < 1


def test_p_of_a_logit_holds_for_what_goes_by_the_logit_or_by_nothing() -> None:
    known = {name for name, rule in RULES.items() if rule.known_by_logit}
    assert known == {"positive", "threshold", "budget", "quota", "prior", "precision", "random", "all"}


def test_only_the_rivals_do_without_the_selector() -> None:
    used = {rule: RULES[rule].uses_selector for rule in RULES}
    assert {rule for rule, yes in used.items() if not yes} == {
        "random",
        "teacher_confidence",
        "teacher_topk_per_class",
        "entropy",
        "energy",
        "max_logit",
        "rmds",
        "all",
        "truth",
        "knn",
        "linear_probe",
    }


def test_the_config_and_the_rules_say_the_same() -> None:
    assert set(get_args(RuleName)) == RULES.keys()
    for key, names in NEEDED_BY_RULES.items():
        assert set(names) == {rule.name for rule in RULES.values() if key in rule.needs}
    assert {key for rule in RULES.values() for key in rule.needs} == NEEDED_BY_RULES.keys()


def compared_rules(source: str) -> list[str]:
    """Comparisons of a rule with a name."""

    def says_rule(node: ast.expr) -> bool:
        return (
            (isinstance(node, ast.Attribute) and node.attr == "rule")
            or (isinstance(node, ast.Name) and node.id == "rule")
            or (isinstance(node, ast.Subscript) and ast.unparse(node.slice) == "'rule'")
            or (isinstance(node, ast.Attribute) and node.attr == "name" and says_rule(node.value))
        )

    def has_text(node: ast.expr) -> bool:
        return any(isinstance(n, ast.Constant) and isinstance(n.value, str) for n in ast.walk(node))

    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        and any(says_rule(side) for side in (node.left, *node.comparators))
        and any(has_text(side) and not says_rule(side) for side in (node.left, *node.comparators))
    ]


def test_only_the_rules_know_their_names() -> None:
    for bad in ('a.rule == "x"', 'rule in ("x", "y")', '"x" != c["rule"]', 'job.rule.name in {"x"}'):
        assert compared_rules(bad), bad
    assert compared_rules('rule.count is None and row.data == "x" and a.rule in RULES') == []
    package = Path(__file__).parents[2] / "pukd_ray"
    modules = {str(f.relative_to(package)): f for f in package.rglob("*.py")}
    assert "selection/rules/quota.py" in modules
    found = {n: compared_rules(f.read_text()) for n, f in modules.items() if not n.startswith("selection/rules/")}
    assert {n: lines for n, lines in found.items() if lines} == {}
