"""The pools: exact counts, no overlap, and truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pukd_ray.commands import make_pools
from pukd_ray.demo import pools
from pukd_ray.demo.build import CLASSES, SOURCE_CLASSES
from pukd_ray.demo.glyphs import encode_small_png
from pukd_ray.demo.pools import POOLS, Bank, Pool, draw_pool, write_pool
from pukd_ray.studies import cifar


@pytest.fixture(scope="module")
def bank() -> Bank:
    """As many images of each kind as the real bank has, all black but for their number."""
    classes = np.array(SOURCE_CLASSES)[np.arange(60_000) % 10]
    rendered = [np.full(count, kind) for kind, count in pools.RENDERED.items()]
    kinds = np.concatenate([classes, *rendered])
    ids = [f"train/{i}" for i in range(60_000)] + [f"{k}/{i}" for k, n in pools.RENDERED.items() for i in range(n)]
    images = np.zeros((len(kinds), 28, 28), np.uint8)
    images[:, 0, :4] = np.arange(len(kinds), dtype=">u4").view(np.uint8).reshape(-1, 4)
    return Bank(images, kinds, np.array(ids))


@pytest.mark.parametrize("name", POOLS)
def test_counts_are_exact_and_p_is_the_teachers(bank: Bank, name: str) -> None:
    pool = draw_pool(bank, name, seed=3)
    facts = pool.facts(bank)
    assert facts["by_kind"] == dict(sorted(POOLS[name].items()))
    assert facts["relevant"] == sum(POOLS[name][kind] for kind in CLASSES)
    assert len(set(pool.corpus)) == len(pool.corpus)
    assert set(bank.kinds[pool.corpus[pool.relevant]]) == set(CLASSES)
    assert (pool.corpus[pool.relevant] >= 40_000).all()  # unknown to the teacher
    assert (pool.positives < 40_000).all()
    assert (bank.kinds[pool.positives] == np.repeat(CLASSES, 100)).all()
    assert (np.array(CLASSES)[pool.labels] == bank.kinds[pool.positives]).all()


def test_shares_of_relevant_images_are_those_of_the_issue(bank: Bank) -> None:
    shares = {name: draw_pool(bank, name, seed=0).relevant.mean() for name in POOLS}
    assert shares == {"hard": 0.25, "easy": 0.25, "rare": 0.02, "imbalanced": pytest.approx(0.25, abs=0.005)}
    assert POOLS["imbalanced"][CLASSES[0]] == 10 * POOLS["imbalanced"][CLASSES[-1]]
    assert len(draw_pool(bank, "rare", seed=0).corpus) == 30_000


@pytest.mark.parametrize("name", POOLS)
def test_tuning_and_final_pools_share_no_image(bank: Bank, name: str) -> None:
    def images(*, tuning: bool) -> set[int]:
        drawn = [draw_pool(bank, name, seed=seed, tuning=tuning) for seed in range(3)]
        return {int(i) for pool in drawn for i in (*pool.corpus, *pool.positives)}

    assert images(tuning=True).isdisjoint(images(tuning=False))


def test_seeds_decide(bank: Bank) -> None:
    def hashed(seed: int) -> str:
        return str(draw_pool(bank, "hard", seed=seed).facts(bank)["ids_sha256"])

    assert hashed(0) == hashed(0) != hashed(1)
    few, many = draw_pool(bank, "hard", seed=0, per_class=20), draw_pool(bank, "hard", seed=0)
    assert set(few.positives) < set(many.positives)


def test_a_biased_p_is_brighter_and_the_corpus_is_the_same(bank: Bank) -> None:
    plain, biased = (draw_pool(bank, "hard", seed=0, bias=k) for k in (0.0, 1.2))
    np.testing.assert_array_equal(plain.corpus, biased.corpus)
    for label in range(5):
        mean = [bank.images[p.positives[p.labels == label]].mean() for p in (plain, biased)]
        assert mean[1] > mean[0]
    assert set(draw_pool(bank, "hard", seed=0, per_class=20, bias=1.2).positives) < set(biased.positives)


def test_files_hold_the_images_and_the_truth(bank: Bank, tmp_path: Path) -> None:
    drawn = draw_pool(bank, "hard", seed=0)
    pool = Pool(drawn.positives[:7], drawn.labels[:7], drawn.corpus[:30], drawn.relevant[:30])
    assert write_pool(bank, pool, tmp_path)["images"] == 30
    corpus, positives = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("corpus", "positives"))
    assert corpus.column("relevant").to_pylist() == pool.relevant.tolist()
    assert corpus.column("origin").to_pylist() == bank.ids[pool.corpus].tolist()
    assert positives.column("label").to_pylist() == [0] * 7
    assert corpus.column("image")[0].as_py().startswith(b"\x89PNG")


def test_corpora_of_real_images_have_the_shares_that_they_are_named_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "CORPUS", 200)
    rng = np.random.default_rng(0)
    pngs = [encode_small_png(image) for image in rng.integers(0, 256, (320, 3, 32, 32), np.uint8)]
    wnids = [min(cifar.RELEVANT) if i < 110 else "n00000001" for i in range(310)]
    for file, columns in (
        ("cifar10/train.parquet", {"image": pngs[310:], "label": list(range(10))}),
        ("tiny_imagenet32/a.parquet", {"image": pngs[:310], "wnid": wnids}),
    ):
        (tmp_path / file).parent.mkdir()
        pq.write_table(pa.table(columns), tmp_path / file)
    make_pools.main(["--data", str(tmp_path), "--output", str(tmp_path / "pools")])
    drawn = {}
    for share in cifar.SHARES:
        corpus = pq.read_table(tmp_path / "pools" / f"cifar-{share:g}" / "corpus.parquet")
        origins, relevant = (corpus.column(c).to_pylist() for c in ("origin", "relevant"))
        assert len(set(origins)) == 200
        assert sum(relevant) == round(200 * share)
        assert all((int(o.removeprefix("a/")) < 110) == r for o, r in zip(origins, relevant, strict=True))
        drawn[share] = {o for o, r in zip(origins, relevant, strict=True) if r}
    assert drawn[0.005] < drawn[0.02] < drawn[0.11] < drawn[0.5]
    first = int(origins[0].removeprefix("a/"))
    assert corpus.column("image")[0].as_py() == pngs[first]  # in colour, as it was
