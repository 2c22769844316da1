"""The page from the JSON of a small run, without Ray."""

from __future__ import annotations

import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from record_types import faults_of

from pukd_ray.config import RunConfig, SelectionConfig
from pukd_ray.report import page
from pukd_ray.report.gallery import ClassGallery, Gallery, Picture
from pukd_ray.report.summary import summary_lines
from pukd_ray.run.folder import RunFolder
from pukd_ray.run.records import DriftRecord
from pukd_ray.selection.calibration import Calibration, to_json

NASTY = "<b>x</b>"
PICTURE = Picture("part-0.parquet#3", 1.25, 0.8125, True, True, "data:image/png;base64,AAAA")


def make_config(tmp_path: Path, **changes: Any) -> RunConfig:
    teacher = {"arch": "lenet5", "weights": "t.pt", "num_classes": 3, "input_size": 28, "channels": 1}
    teacher |= {"mean": [0.5], "std": [0.5], "classes": changes.pop("classes", [NASTY, "$x_$", "c & d"])}
    return RunConfig(
        name=changes.pop("name", "a run"),
        output=str(tmp_path),
        teacher=teacher,
        positives={"uri": "p.parquet"},
        corpus={"uri": "u.parquet"},
        **changes,
    )


def make_run(tmp_path: Path, config: RunConfig) -> RunFolder:
    """What the stages leave, as far as the page reads it: 100 images, of which 10 are unreadable and 4 copies."""
    folder = RunFolder(str(tmp_path))
    classes = config.teacher.classes
    folder.write_json(
        "environment.json",
        {
            "python": "3.11.7",
            "platform": "Linux",
            "versions": {"ray": "2.60.0"},
            "cluster": {"cpus": 2.0, "gpus": 0.0, "nodes": 1, "autoscales": False},
            "commit": None,
        },
    )
    network = {"top1": 0.81234, "top5": 1.0, "per_class": [0.9, 0.8, None], "parameters": 60_000, "arch": "lenet5"}
    estimated = {
        "precision": 0.9111,
        "precision_interval": [0.871, 0.951],
        "recall": 0.7222,
        "recall_interval": [0.681, 0.761],
    }
    folder.write_json(
        "metrics.json",
        {
            "n_positives": 30,
            "n_corpus": 100,
            "n_scored": 90,
            "n_rejected": 10,
            "rejected_by_reason": {"empty": 7, "truncated": 3},
            "n_duplicates": 4,
            "n_selected": 20,
            "n_test_rejected": 0,
            "prior": {"value": 0.25, "lower": 0.2, "upper": 0.3, "source": "bbe", "used_for_training": 0.25},
            "teacher": network,
            "student": network | {"top1": 0.7654, "parameters": 15_000, "arch": "lenet5_half"},
            "baseline_positives": network | {"top1": 0.6543, "parameters": 15_000, "arch": "lenet5_half"},
            "selection": {"precision": 0.9, "recall": 0.6666, "average_precision": 0.9555},
            "selection_estimated": estimated,
            "trust": {"level": "low", "reasons": ["P differs <b>a lot</b>"]},
            "images_per_second": {"score": 12.34},
        },
    )
    folder.write_json(
        "selector/prior.json",
        {
            "value": 0.25,
            "lower": 0.2,
            "upper": 0.3,
            "source": "bbe",
            "used_for_training": 0.25,
            "trust": "low",
            "reasons": ["P differs <b>a lot</b>"],
            "evidence": {
                "priors": [0.1, 0.25, 0.5],
                "emptiness": [1.9, 0.2, 1.4],
                "shares": [0.0987, 0.25, 0.5],
                "gap": True,
                "boundary": 0.2345,
                "boundary_interval": [0.1, 0.3],
                "density_ratio": 0.2,
                "density_ratio_interval": [0.15, 0.25],
                "bbe": 0.26,
                "alike": 0.123,
                "auc": 0.654,
                "auc_error": 0.02,
            },
            "warnings": ["Set selector.prior & <i>look</i>."],
            "true_in_sample": 0.2555,
        },
    )
    folder.write_json(
        "selector/meta.json",
        {
            "classes": classes,
            "positives_per_class": [10, 10, 10],
            "positive_weights": {"0": 1.6543, "1": 0.4},
            "n_sample": 90,
            "rejected_positives": {},
            "teacher_agreement": 0.9,
            "steps": 40,
            "proxy_accuracy": 0.9321,
            "held_out_recall": 0.88,
            "held_out_share": 0.24,
        },
    )
    folder.write_json(
        "selector/training.json",
        {"loss": "nnpu", "risk": [[20, 0.4], [40, 0.1]], "proxy_accuracy": [[20, 0.9], [40, 0.9321], [60, 0.93]]},
    )
    folder.write_json(
        "selector/calibration.json", to_json(Calibration(1.0, 0.0), [Calibration(0.9, 0.1), Calibration(1.1, -0.1)])
    )
    logits = np.r_[np.linspace(1, 4, 30), np.linspace(-4, 3, 90)].astype(np.float32)
    folder.write_table(
        "selector/held_out.parquet", pa.table({"role": ["positives"] * 30 + ["corpus"] * 90, "logit": logits})
    )
    folder.write_json(
        "selection.json",
        {
            "n_selected": 20,
            "class_counts": [15, 5, 0],
            "truth": {"precision": 0.9, "recall": 0.6666, "selected_relevant": 18},
            "histogram": {
                "logit": [-3.0, -1.0, 1.0, 3.0],
                "edges": [-2.0, 0.0, 2.0],
                "all": [40, 30, 8, 12],
                "selected": [0, 0, 8, 12],
                "relevant": [1, 2, 6, 12],
            },
        },
    )
    folder.write_json(
        "student/class_weights.json",
        {"classes": classes, "kind": "soft", "class_weights": [0.4, 0.9, 1.7], "effective_classes": 2.345},
    )
    folder.write_json(
        "student/training.json",
        {"steps": 40, "images": 50, "loss": {"student": [[20, 1.0], [40, 0.5]], "baseline_positives": [[40, 0.6]]}},
    )
    folder.finish("score", {}, 75.0, {})
    return folder


def update(folder: RunFolder, name: str, **changes: Any) -> None:
    folder.write_json(name, folder.read_json(name) | changes)


def make_gallery(*pictures: Picture) -> Gallery:
    return Gallery(tuple(ClassGallery(k, 0.0, pictures, (), pictures[:1]) for k in range(3)), ranked=True)


class Tags(HTMLParser):
    """Collects tags, attributes and text; checks that what opens closes."""

    VOID = ("meta", "br", "img", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in ("td", "th", "i"):
            self.text += " "
        self.links += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data", "srcset")]
        self.ids += [str(v) for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return make_config(tmp_path)


@pytest.fixture
def folder(tmp_path: Path, config: RunConfig) -> RunFolder:
    return make_run(tmp_path, config)


def render(folder: RunFolder, config: RunConfig, gallery: Gallery | None = None) -> str:
    return page.render_page(folder, config, gallery or make_gallery(PICTURE))


def test_the_page_has_the_figures_of_the_run(folder: RunFolder, config: RunConfig) -> None:
    text = " ".join(Tags(render(folder, config)).text.split())
    for figure in (
        *("teacher lenet5 0.8123 1.0000 60,000 1.0", "lenet5_half 0.7654 1.0000 15,000 4.0", "0.6543"),
        *("precision 0.9000 0.9111 0.871 to 0.951 truth inside", "recall 0.6666 0.7222 0.681 to 0.761 truth outside"),
        *("prior 0.2555 0.2500 0.200 to 0.300 truth inside", "average precision 0.9555"),
        *("corpus 100 100.0 %", "unreadable 10 10.0 %", "scored 90 90.0 %", "copies dropped 4 4.0 %"),
        *("not taken by the rule 66 66.0 %", "selected 20 20.0 %", "empty 7 7.000 %", "truncated 3 3.000 %"),
        *(
            "trust low: P differs",
            "what is taken, AUC 0.654 ± 0.033",
            "overlap 12.3 %",
            "score 75.0 s",
            "12.3 images per second",
        ),
        *("10 1.65 times 15 0.400", "c & d 10 – 0 1.700 – – –", "2.3 equally frequent classes of 3"),
        *("number of steps (40, 0.9321)", "0.81 ✓"),
    ):
        assert figure in text, figure


def test_the_page_refers_to_nothing_outside_itself(folder: RunFolder, config: RunConfig) -> None:
    html = render(folder, config)
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    tags = Tags(html)
    assert tags.open == []
    assert {"script", "link", "iframe", "object"}.isdisjoint(tags.tags)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in tags.links)
    assert len(tags.ids) == len(set(tags.ids))
    references = set(re.findall(r"url\(([^)]*)\)", html)) | {link for link in tags.links if link[0] == "#"}
    assert references <= {f"#{i}" for i in tags.ids}


def test_names_ids_and_warnings_are_escaped(tmp_path: Path) -> None:
    config = make_config(tmp_path, name="<script>alert(1)</script>")
    picture = Picture('"><script>', 0.0, 0.5, None, False, None)
    html = render(make_run(tmp_path, config), config, make_gallery(picture))
    assert NASTY not in html
    assert "<script" not in html
    assert html.count("&lt;b&gt;x&lt;/b&gt;") == 4  # plot, table, gallery, config
    assert "Set selector.prior &amp; &lt;i&gt;look&lt;/i&gt;." in html
    assert "$x_$" in html  # no formula
    assert Tags(html).open == []


def test_a_picture_tells_its_id_its_source_and_what_shows_more(folder: RunFolder, config: RunConfig) -> None:
    picture = Picture("it's <b>#3", 1.25, 0.8125, None, True, None, "/lake/it's <b>.jpg", 3)
    html = render(folder, config, make_gallery(picture))
    tags = Tags(html)
    assert tags.open == []
    assert "it's <b>#3/lake/it's <b>.jpg row 3P(relevant) 0.8125, logit 1.25, selected" in tags.text
    command = next(line for line in tags.text.splitlines() if "pukd show" in line).partition("pukd show ")[2]
    assert shlex.split(command)[:2] == [folder.display, "it's <b>#3"]
    assert tags.links.count("file:///lake/it%27s%20%3Cb%3E.jpg") == 6
    opened = re.findall(r'popovertarget="([^"]+)"', html)
    assert len(opened) == 6
    assert set(opened) <= set(tags.ids)
    assert len(tags.ids) == len(set(tags.ids))


AUDIT = {
    "prior": 0.2611,
    "prior_interval": [0.221, 0.311],
    "precision": 0.8888,
    "precision_interval": [0.841, 0.931],
    "recall": 0.4444,
    "recall_interval": [0.401, 0.641],
    "n_labelled": 300,
    "current": True,
}


def test_an_audit_stands_beside_the_estimates(folder: RunFolder, config: RunConfig) -> None:
    without = render(folder, config)
    assert "Audit" not in without
    assert "labels)" not in without
    update(folder, "metrics.json", audit=None)
    assert render(folder, config) == without
    update(folder, "metrics.json", audit=AUDIT)
    html = render(folder, config)
    tags = Tags(html)
    text = " ".join(tags.text.split())
    assert tags.open == []
    assert "true estimated 90 % interval audit(300 labels) 90 % interval" in text
    assert "precision 0.9000 0.9111 0.871 to 0.951 0.8888 0.841 to 0.931 truth inside" in text
    assert "prior 0.2555 0.2500 0.200 to 0.300 0.2611 0.221 to 0.311 truth inside" in text
    assert html.count('fill="var(--green)"') == 3
    assert (
        "The audit contradicts the recall that the run assumes or estimates: believe the audit." in text
    )  # 0.641 is below 0.681


def test_an_audit_of_an_earlier_selection_tells_the_prior_alone(folder: RunFolder, config: RunConfig) -> None:
    update(folder, "metrics.json", audit=AUDIT | {"current": False})
    html = render(folder, config)
    text = " ".join(Tags(html).text.split())
    assert "precision 0.9000 0.9111 0.871 to 0.951 – truth inside" in text
    assert "0.2611 0.221 to 0.311" in text
    assert "of an earlier selection: draw another" in text
    assert "contradicts" not in text


def test_what_an_audit_cannot_tell_is_a_dash(folder: RunFolder, config: RunConfig) -> None:
    update(folder, "metrics.json", audit=AUDIT | {"recall": None, "recall_interval": None})
    text = " ".join(Tags(render(folder, config)).text.split())
    assert "recall 0.6666 0.7222 0.681 to 0.761 – truth outside" in text
    assert "too few labels to tell" in text
    assert "contradicts" not in text


def test_the_last_lines_show_an_audit(folder: RunFolder) -> None:
    update(folder, "metrics.json", seconds={"score": 75.0}, computing_seconds={"score": 70.0})
    before = summary_lines(folder)
    update(folder, "metrics.json", audit=AUDIT | {"recall": None, "recall_interval": None})
    after = summary_lines(folder)
    added = [new.removeprefix(old) for old, new in zip(before, after, strict=True) if old != new]
    assert added == [
        "   audit (300 labels)",
        "  0.2611  [0.221, 0.311]",
        "  0.8888  [0.841, 0.931]",
    ]


def test_warnings_say_what_to_do(folder: RunFolder, config: RunConfig) -> None:
    update(folder, "metrics.json", baseline_positives=folder.read_json("metrics.json")["student"])
    update(folder, "selector/meta.json", teacher_agreement=0.6, positives_per_class=[30, 0, 0])
    html = render(folder, config)
    warnings = re.findall(r"<li>(.*?)</li>", html)
    assert [w[:28] for w in warnings] == [
        "Set selector.prior &amp; &lt",
        "The teacher agrees with only",
        "P has no image of $x_$, c &a",
        "Nothing is selected for c &a",
        "10% of the corpus could not ",
        "The selection did not help: ",
    ]


@pytest.mark.parametrize(
    ("selection", "advice"),
    [
        ({"rule": "positive"}, "give more of such images in P"),
        (
            {"rule": "budget", "budget": 20},
            "the budget went to other classes: raise selection.budget, or take rule quota",
        ),
        ({"rule": "budget", "budget": 21}, "give more of such images in P"),  # there were no more positives
        ({"rule": "quota", "budget": 20}, "give more of such images in P"),
    ],
)
def test_a_class_of_which_nothing_is_selected_has_its_cause(
    folder: RunFolder, tmp_path: Path, selection: dict[str, Any], advice: str
) -> None:
    (warning,) = re.findall(r"<li>(Nothing is .*?)</li>", render(folder, make_config(tmp_path, selection=selection)))
    assert f": look at the gallery; {advice}" in warning


def test_one_image_was_selected(folder: RunFolder, config: RunConfig) -> None:
    assert "20 images were selected." in render(folder, config)
    update(folder, "metrics.json", n_selected=1)
    assert " 1 image was selected." in render(folder, config)


def test_estimates_say_what_they_are_from(folder: RunFolder, config: RunConfig) -> None:
    assert "P(relevant) of every image and from held-out positives" in render(folder, config)


def test_without_test_set_and_truth(folder: RunFolder, tmp_path: Path) -> None:
    config = make_config(tmp_path, classes=None)
    metrics = folder.read_json("metrics.json")
    metrics.pop("baseline_positives")
    nothing = {"top1": None, "top5": None, "per_class": None}
    for name in ("teacher", "student"):
        metrics[name] |= nothing
    metrics["selection"] = dict.fromkeys(metrics["selection"])
    metrics |= {"n_rejected": 0, "n_scored": 100, "rejected_by_reason": {}}
    folder.write_json("metrics.json", metrics)
    summary = folder.read_json("selection.json")
    summary["histogram"]["relevant"] = None
    update(folder, "selection.json", truth=None, histogram=summary["histogram"])
    update(folder, "selector/prior.json", true_in_sample=None, warnings=[])
    update(folder, "selector/meta.json", classes=None)
    update(folder, "student/training.json", loss={"student": []})
    tags = Tags(render(folder, config, make_gallery(Picture("u#1", 0.0, 0.5, None, False, None))))
    text = " ".join(tags.text.split())
    assert "There is no test set" in text
    assert "no truth column" in text
    assert "calibration error" not in text
    assert "truth inside" not in text
    assert "precision – 0.9111" in text
    assert "class 2 10 – 0 1.700 – –" in text
    assert "nothing 0" in text
    assert "gone0.50" in text
    assert "✓" not in text


def test_runs_made_before_have_the_summary_within_the_folder(folder: RunFolder, config: RunConfig) -> None:
    new = render(folder, config)
    folder.write_json("selected/summary.json", folder.read_json("selection.json"))
    folder.delete("selection.json")
    assert render(folder, config) == new


def test_without_warnings(folder: RunFolder, config: RunConfig) -> None:
    update(folder, "selector/prior.json", warnings=[])
    update(folder, "selection.json", class_counts=[15, 4, 1])
    update(folder, "metrics.json", n_rejected=5, n_scored=95)
    assert "Warnings None." in " ".join(Tags(render(folder, config)).text.split())


def test_a_prior_from_the_config_has_no_interval(folder: RunFolder, tmp_path: Path) -> None:
    config = make_config(tmp_path, selector={"prior": 0.4})
    given = {"source": "config", "trust": "high", "reasons": [], "evidence": None}
    update(folder, "selector/prior.json", **given, value=0.4, lower=0.4, upper=0.4, used_for_training=0.4)
    text = " ".join(Tags(render(folder, config)).text.split())
    assert "prior 0.2555 0.4000 given by the config" in text
    assert "Were the prior another one" not in text


def test_a_prior_that_is_given_shows_what_was_looked_at(folder: RunFolder, config: RunConfig) -> None:
    before = folder.read_json("selector/prior.json")
    at_one = before["evidence"] | {"priors": [0.4], "emptiness": [0.3], "shares": [0.41], "gap": False}
    update(folder, "selector/prior.json", source="audit", trust="low", reasons=["few labels"], evidence=at_one)
    text = " ".join(Tags(render(folder, config)).text.split())
    assert "source labels of an audit" in text
    assert "P against what is taken, AUC" in text
    assert "emptiest boundary" not in text  # no other prior was tried
    assert "Were the prior another one" not in text


def test_new_files_stand_beside_the_sample(folder: RunFolder, config: RunConfig) -> None:
    figures = {"images": 1200, "groups": 3, "distance": 0.31, "relevant": 0.75, "relevant_in_sample": 0.25,
               "rejected": 0.01, "rejected_in_sample": 0.0}  # fmt: skip
    drift = {
        **figures,
        "found": True,
        "reasons": ["75.00% look <b>relevant</b>"],
        "chunks": [{**figures, "chunk": "1"}],
    }
    assert faults_of(drift, DriftRecord) == []
    update(folder, "metrics.json", drift=drift)
    page = render(folder, config)
    text = " ".join(Tags(page).text.split())
    assert "all new files 1,200 3 75.0 % 1.0 % 0.3100" in text
    assert "the 1,200 images of new files are not like the sample" in text
    assert "--redo selector" in text
    assert "<b>relevant" not in page
    update(folder, "metrics.json", drift=drift | {"found": False, "reasons": []})
    text = " ".join(Tags(render(folder, config)).text.split())
    assert "They are like the sample" in text
    assert "not like the sample" not in text
    update(folder, "metrics.json", drift=None)
    assert "New files against the sample" not in render(folder, config)


def test_what_cannot_be_told_is_no_number(folder: RunFolder, tmp_path: Path) -> None:
    update(folder, "selector/prior.json", trust="none", reasons=["no gap"], lower=0.0, upper=1.0)
    nothing = dict.fromkeys(("precision", "precision_interval", "recall", "recall_interval"))
    update(folder, "metrics.json", selection_estimated=nothing, trust={"level": "none", "reasons": ["no gap"]})
    text = " ".join(Tags(render(folder, make_config(tmp_path))).text.split())
    assert "prior 0.2555 – cannot tell" in text
    assert "recall 0.6666 – cannot tell" in text
    assert "trust none: no gap" in text
    lines = summary_lines(folder)
    assert sum(" cannot tell" in line for line in lines) == 3  # set apart from the figure before it
    assert any(line.endswith("none  no gap") for line in lines)
    update(folder, "metrics.json", audit=AUDIT)
    text = " ".join(Tags(render(folder, make_config(tmp_path))).text.split())
    assert "prior 0.2555 – cannot tell 0.2611 0.221 to 0.311" in text
    assert "The audit contradicts" not in text


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"rule": "positive"}, "all images with PU logit above 0"),
        ({"rule": "threshold", "threshold": 0.5}, "all images with P(relevant) of at least 0.5"),
        ({"rule": "prior"}, "the top share of images that the prior says is relevant"),
        ({"rule": "precision", "target_precision": 0.95}, "the most images whose estimated precision is at least 0.95"),
        (
            {"rule": "budget", "budget": 2000, "order": "random"},
            "2,000 of the images with PU logit above 0, drawn at random",
        ),
        (
            {"rule": "quota", "budget": 20},
            "20 images with PU logit above 0, shared evenly over the teacher's classes, those with the highest logits",
        ),
        ({"rule": "random", "budget": 20}, "20 images at random, without the selector"),
        (
            {"rule": "teacher_confidence", "budget": 20},
            "the 20 images of which the teacher is surest, without the selector",
        ),
    ],
)
def test_every_rule_is_explained(selection: dict[str, Any], expected: str) -> None:
    assert page.explain_rule(SelectionConfig(**selection)) == expected


def test_a_rule_without_selector_and_an_empty_gallery(folder: RunFolder, tmp_path: Path) -> None:
    config = make_config(tmp_path, selection={"rule": "random", "budget": 20})
    text = " ".join(Tags(render(folder, config, Gallery((), ranked=False))).text.split())
    assert "Rule random: 20 images at random, without the selector. 20 images were selected." in text
    assert "There are no images to show." in text
    assert "the estimates rest on it all the same" in text
    assert "logit 0 (not used by this rule)" in text


def test_partial_truth_gives_no_reliability_curve() -> None:
    truth = {"precision": 0.9, "selected_relevant": 18}
    assert page.truth_is_complete({"truth": truth, "n_selected": 20})
    assert not page.truth_is_complete({"truth": truth, "n_selected": 40})
    assert not page.truth_is_complete({"truth": None, "n_selected": 40})
    assert not page.truth_is_complete({"truth": {"precision": None, "selected_relevant": 0}, "n_selected": 40})


def test_durations() -> None:
    assert [page.duration(s) for s in (0.04, 99.0, 100.0, 3599.0, 7320.0)] == [
        *("0.0 s", "99.0 s", "1.7 min", "1 h 00 min", "2 h 02 min")
    ]


def test_many_classes_are_folded(folder: RunFolder, tmp_path: Path) -> None:
    config = make_config(tmp_path, classes=None)
    teacher = config.teacher.__dict__ | {"num_classes": 300}
    config = RunConfig(**(config.__dict__ | {"teacher": teacher}))
    metrics = folder.read_json("metrics.json")
    for name in ("teacher", "student", "baseline_positives"):
        metrics[name]["per_class"] = [0.5] * 300
    folder.write_json("metrics.json", metrics)
    update(folder, "selector/meta.json", positives_per_class=[1] * 300, classes=None)
    update(folder, "selection.json", class_counts=list(range(300)))
    update(folder, "student/class_weights.json", class_weights=[1.0] * 300)
    html = render(folder, config)
    assert "<details><summary>300 classes</summary>" in html
    assert "the 3 of 300 classes with most selected images" in html
