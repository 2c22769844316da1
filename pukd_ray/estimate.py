"""What a run will take, before it is made: small trial runs on this cluster, and a line through two of them per part.

The seconds of a part are a start plus a rate times the amount of its work: images, rows through a network, selected
images. A trial of a quarter of the size gives the second point. It is made twice: what it takes longer the first time,
in processes that have imported nothing yet, a run takes once too. What a trial makes goes to a folder `estimate/` of
the run's output, and is deleted at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from pukd_ray.config import ConfigError, RunConfig, SelectionConfig
from pukd_ray.corpus.context import RunContext, Shared
from pukd_ray.corpus.listing import list_inputs
from pukd_ray.corpus.reading import content_hash
from pukd_ray.corpus.sources import sources_by_role
from pukd_ray.corpus.stored_units import read_units, whole
from pukd_ray.corpus.units import Unit, clip, units_to_table
from pukd_ray.run.ahead import duration
from pukd_ray.run.folder import RunFolder, absolute
from pukd_ray.run.records import ESTIMATE, SELECTION, CostRecord, EstimateRecord
from pukd_ray.run.stages import STAGES
from pukd_ray.runtime.console import say
from pukd_ray.runtime.engine import Cluster, engine
from pukd_ray.runtime.timing import Stopwatch
from pukd_ray.selection.chunks import CHUNK_SECONDS
from pukd_ray.selection.rules import RULES
from pukd_ray.storage import list_files, read_file

TRIALS = "estimate"
TRIAL_STEPS = 200
SMALLER = 4
"""The small trial is so many times smaller than the large one."""
LEAST_ERROR = 0.15
"""Relative half-width of a stage's interval, at least: what repeated runs on a quiet machine differ by."""

PARALLEL = ("plan", "features", "score", "select", "evaluate")
"""Parts that take half the time on a cluster twice as large; the trainings do not, while `resources.train_workers` is
as it is."""


@dataclass(frozen=True)
class Prices:
    """What the cluster costs, in any currency."""

    cpu_hour: float = 0.0
    gpu_hour: float = 0.0
    gib_month: float = 0.0


@dataclass(frozen=True)
class Line:
    """Seconds of a part of a run against the amount of its work, through two trials."""

    start: float
    """Seconds that it takes however little there is to do."""
    rate: float
    """Seconds per piece of work."""
    error: float
    """Relative half-width of the interval of what the line says."""

    @classmethod
    def through(cls, small: tuple[float, float], large: tuple[float, float]) -> Line:
        """Of (amount, seconds) of both trials; amounts that are alike tell a start, no rate."""
        (x0, y0), (x1, y1) = small, large
        if x1 <= x0:
            return cls((y0 + y1) / 2, 0.0, max(LEAST_ERROR, abs(y1 - y0) / max(y0 + y1, 1e-9)))
        rate = max(0.0, (y1 - y0) / (x1 - x0))
        # Without a start the larger trial alone would say the most that a piece can take.
        most = y1 / x1
        return cls(max(0.0, y1 - rate * x1), rate, LEAST_ERROR + (0.1 if rate < 0.2 * most else 0.0))

    def at(self, amount: float) -> float:
        """Seconds for this amount of work."""
        return self.start + self.rate * amount


@dataclass(frozen=True)
class Amounts:
    """How much work each part has."""

    corpus: int
    labelled: int
    """Images of P."""
    test: int
    sample: int
    """Images of U that the selector is trained on."""
    selected: float
    prior_rows: float
    """Rows through each network of the grid of priors, see `selector_rows`."""
    fit_rows: float
    """The same of the trainings after it."""
    distill_images: float
    """Images that the student sees, all steps and arms together."""

    def of(self, part: str) -> float:
        """Pieces of work of a part."""
        return {
            "plan": 0.0,
            "features": float(self.labelled + self.sample),
            "prior": self.prior_rows,
            "fits": self.fit_rows,
            "evidence": float(self.labelled + self.sample),
            "score": float(self.corpus),
            "select": self.corpus + self.selected,
            "distill": self.distill_images,
            "evaluate": float(self.test),
            "report": 0.0,
        }[part]


@dataclass(frozen=True)
class Trial:
    """What a trial took."""

    amounts: Amounts
    seconds: Mapping[str, float]
    """By part."""
    score_bytes: int
    """Of `scores/`, kept images included."""
    selected_bytes: int


def estimate_run(config: RunConfig, prices: Prices, images: int) -> EstimateRecord:
    """Make the trials on the cluster of RAY_ADDRESS, or a private one; print nothing but progress.

    Args:
        config: of the run.
        prices: of a CPU's and a GPU's hour, and of a GiB's month.
        images: of the corpus, in the larger trial.

    Returns:
        What is written as `estimate.json` to the run's output too.

    Raises:
        RunError, ConfigError: as the run would.
    """
    if images < 200:
        raise ConfigError(["arguments: --images: at least 200 images make a trial"])
    whole = RunFolder(absolute(config.output))
    folder = RunFolder(whole.uri_of(TRIALS))
    whole.delete_folder(TRIALS)
    weights = read_file(config.teacher.weights)
    with engine(f"{config.name}-estimate", config.resources.autoscales) as cluster:
        try:
            run = RunContext(
                folder, config, cluster, Shared.of(weights), listing=list_inputs(sources_by_role(config)).table
            )
            watch = Stopwatch()
            STAGES[0].function()(run)
            plan_seconds = watch.seconds
            units = read_units(folder)
            if config.selector.prior == "audit":  # the labels lie with the run: the trials are told what they say
                from pukd_ray.selection.labels import load_labels  # torch, which the pipeline does without

                told = load_labels(whole, _rows_of(units)["corpus"]).prior.value
                run = replace(run, config=replace(config, selector=replace(config.selector, prior=told)))
            few = images // SMALLER, TRIAL_STEPS // SMALLER
            trials = []
            for name, size, steps in (("first", *few), ("small", *few), ("large", images, TRIAL_STEPS)):
                say(f"trial     of {size:,} images" + ", again" * (name == "small"))
                trials.append(make_trial(run, units, name, size, steps))
        finally:
            whole.delete_folder(TRIALS)
    found = conclude(config, cluster, units, plan_seconds, trials, prices)
    whole.write_record(ESTIMATE, found)
    return found


def _rows_of(units: Sequence[Unit]) -> dict[str, int]:
    """Images of each role."""
    return {role: sum(u.rows for u in units if u.role == role) for role in ("corpus", "positives", "test")}


def take_units(units: Sequence[Unit], images: int, seed: int) -> list[Unit]:
    """Some `images` rows of `units`, from at least eight of them where there are so many; which, says a seeded hash."""
    order = sorted(
        (unit for unit in units if unit.rows), key=lambda unit: content_hash(f"{seed}/{unit.unit_id}".encode())
    )
    most = max(1, math.ceil(images / min(8, max(1, len(order)))))
    pieces = (piece for unit in order for piece in clip([whole(unit)], 0, most))
    return list(clip(pieces, 0, images))


def make_trial(run: RunContext, units: Sequence[Unit], name: str, images: int, steps: int) -> Trial:
    """All stages but `plan` on so many images of the corpus and of the test set, for so many steps."""
    config = run.config
    corpus, labelled, test = ([u for u in units if u.role == role] for role in ("corpus", "positives", "test"))
    total = sum(u.rows for u in corpus)
    mine = [*labelled, *take_units(corpus, images, config.seed), *take_units(test, images, config.seed)]
    rows = _rows_of(mine)
    # Rounded up: a trial that fills it says that the run will fill its own.
    budget = config.selection.budget and max(10, -(-config.selection.budget * rows["corpus"] // max(1, total)))
    small = replace(
        config,
        selector=replace(
            config.selector,
            sample=min(config.selector.sample, rows["corpus"]),
            steps=min(config.selector.steps, steps),
        ),
        score=replace(config.score, chunk_images=10 * images, max_rejected=1.0),
        selection=replace(config.selection, budget=budget),
        distill=replace(config.distill, steps=min(config.distill.steps or steps, steps)),
    )
    trial = replace(run, folder=RunFolder(run.folder.uri_of(name)), config=small, units=mine)
    trial.folder.write_table("plan.parquet", units_to_table(mine))
    seconds: dict[str, float] = {}
    for stage in STAGES[1:]:
        if stage.asked_by:  # seconds, whatever the corpus
            continue
        watch = Stopwatch()
        counts = stage.function()(trial)
        seconds[stage.name] = watch.seconds
        trial.folder.finish(stage.name, {}, watch.seconds, counts)
        if stage.name == "selector":
            seconds |= counts["seconds"]
    del seconds["selector"]
    amounts = Amounts(
        corpus=rows["corpus"],
        labelled=rows["positives"],
        test=rows["test"],
        sample=small.selector.sample,
        selected=trial.folder.read_record(SELECTION)["n_selected"],
        **selector_rows(small),
        distill_images=_seen(small, small.distill.steps or 0),
    )
    return Trial(amounts, seconds, _bytes(trial.folder, "scores"), _bytes(trial.folder, "selected"))


def selector_rows(config: RunConfig) -> dict[str, float]:
    """Rows through the networks of the trainings, forward once, backward as two more; and held-out ones of U."""
    from pukd_ray.selection.crossfit import CHECKPOINTS, FOLDS  # torch comes with them
    from pukd_ray.selection.recipe import grid_training

    selector = config.selector
    grid = grid_training(selector, config.seed)
    return {
        "prior_rows": 3.0 * FOLDS * grid.steps * grid.batch_size + selector.sample,
        "fit_rows": 3.0 * (FOLDS + 1) * selector.steps * selector.batch_size + (CHECKPOINTS + 2) * selector.sample,
    }


def selected_rows(selection: SelectionConfig, corpus: int, trial: Amounts) -> float:
    """Images that the rule will take of so many: its budget, if it goes by one, as far as there are so many (for rules
    that are confined to positives: as many of them as the trial says); else the share that it took in the trial."""
    rule = RULES[selection.rule]
    alike = trial.selected / max(1, trial.corpus) * corpus
    if selection.budget is None or "budget" not in rule.needs:
        return alike
    return min(float(selection.budget), alike if rule.positives_only else float(corpus))


def _seen(config: RunConfig, steps: int) -> float:
    arms = 2 if config.distill.baseline == "positives" else 1
    return float(steps * config.distill.batch_size * arms)


def _bytes(folder: RunFolder, name: str) -> int:
    return sum(info.size for info in list_files(folder.fs, folder.path(name))) if folder.exists(name) else 0


def conclude(
    config: RunConfig,
    cluster: Cluster,
    units: Sequence[Unit],
    plan_seconds: float,
    trials: Sequence[Trial],
    prices: Prices,
) -> EstimateRecord:
    """The whole run from three trials: a small one, its processes fresh, the same again, and a large one."""
    from pukd_ray.distillation.training import total_steps  # torch comes with it

    first, small, large = trials
    rows = _rows_of(units)
    selected = selected_rows(config.selection, rows["corpus"], large.amounts)
    steps = total_steps(config.distill, int(rows["positives"] + selected))
    sample = min(config.selector.sample, rows["corpus"])
    whole = Amounts(
        corpus=rows["corpus"],
        labelled=rows["positives"],
        test=rows["test"],
        sample=sample,
        selected=selected,
        **selector_rows(replace(config, selector=replace(config.selector, sample=sample))),
        distill_images=_seen(config, steps),
    )
    lines = {
        part: Line.through((small.amounts.of(part), small.seconds[part]), (large.amounts.of(part), large.seconds[part]))
        for part in large.seconds
    }
    start_up = {part: max(0.0, first.seconds[part] - small.seconds[part]) for part in lines}
    seconds = {"plan": plan_seconds, **{p: start_up[p] + line.at(whole.of(p)) for p, line in lines.items()}}
    score = lines["score"]
    chunk = config.score.chunk_images or max(1.0, CHUNK_SECONDS / max(score.rate, 1e-9))
    seconds["score"] += score.start * (math.ceil(rows["corpus"] / chunk) - 1)
    errors = {"plan": 0.05, **{part: line.error for part, line in lines.items()}}
    total = sum(seconds.values())
    half = sum(errors[part] * seconds[part] for part in seconds)
    twice = sum(
        s - (lines[part].rate * whole.of(part) if part in lines else s) / 2 * (part in PARALLEL)
        for part, s in seconds.items()
    )
    scores_gib = large.score_bytes / max(1, large.amounts.corpus) * rows["corpus"] / 2**30
    selected_gib = large.selected_bytes / max(1.0, large.amounts.selected) * selected / 2**30
    storage = scores_gib + selected_gib

    def cost(seconds: float, size: float) -> CostRecord:
        cpu, gpu = (number * size * seconds / 3600 for number in (cluster.cpus, cluster.gpus))
        return {"cpu_hours": cpu, "gpu_hours": gpu, "money": cpu * prices.cpu_hour + gpu * prices.gpu_hour}

    return {
        "cluster": cluster.describe(),
        "images": {k: float(v) for k, v in asdict(whole).items() if k in ("corpus", "labelled", "test", "selected")},
        "trial_images": large.amounts.corpus,
        "seconds": {part: round(s, 1) for part, s in seconds.items()},
        "total_seconds": round(total, 1),
        "interval": [round(max(0.0, total - half), 1), round(total + half, 1)],
        "images_per_second": round(1 / score.rate, 1) if score.rate else None,
        **cost(total, 1.0),
        "storage_gib": storage,
        "storage_money_per_month": storage * prices.gib_month,
        "twice": {"total_seconds": round(twice, 1), **cost(twice, 2.0)},
    }


def lines_of(found: EstimateRecord) -> list[str]:
    """The estimate for people."""
    low, high = found["interval"]
    images, twice = found["images"], found["twice"]
    shown = [
        f"estimate  of {images['corpus']:,.0f} images on {found['cluster']}, from trials of up to "
        f"{found['trial_images']:,} images",
        "seconds   " + ", ".join(f"{part} {s:,.0f}" for part, s in found["seconds"].items()),
        f"in all    {duration(found['total_seconds'])} ({duration(low)} to {duration(high)}), Ray's own start not "
        f"counted; {found['cpu_hours']:,.2f} CPU hours, {found['gpu_hours']:,.2f} GPU hours",
        f"storage   {found['storage_gib']:,.3f} GiB: scores, kept and selected images "
        f"({images['selected']:,.0f} selected)",
        f"twice     a cluster twice as large: {duration(twice['total_seconds'])}, {twice['cpu_hours']:,.2f} CPU hours, "
        f"{twice['gpu_hours']:,.2f} GPU hours",
    ]
    if found["money"] or found["storage_money_per_month"]:
        shown.append(
            f"money     {found['money']:,.2f} ({twice['money']:,.2f} on twice the cluster), storage "
            f"{found['storage_money_per_month']:,.2f} a month"
        )
    return shown
