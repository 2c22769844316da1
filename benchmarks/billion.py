"""What a billion images cost, and what breaks first on the way: from the figures in docs/benchmarks, and prices.

python -m benchmarks.billion --cpu-hour 0.05 --gpu-hour 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import StrictUndefined, Template

from benchmarks.corpora import DISTINCT
from benchmarks.corpus_pass import PAGE, busy_seconds
from benchmarks.scheduling import DriverCost
from pukd_ray.config import ResourcesConfig
from pukd_ray.corpus.files import BLOCK_BYTES, FileFacts, SourceFile
from pukd_ray.corpus.stored_units import PLAN, read_units
from pukd_ray.corpus.units import UNIT_BYTES, UNIT_ROWS, Owner, runs_of_rows, units_to_table
from pukd_ray.run.ahead import duration
from pukd_ray.run.folder import RunFolder
from pukd_ray.runtime.devices import rows_per_call
from pukd_ray.runtime.engine import most_tasks
from pukd_ray.selection.committing import FILE_ROWS

FILES = ("corpus_pass", "gpu", "scale", "scheduling")
PIXEL_BYTES = 3 * 224 * 224


@dataclass(frozen=True)
class Figures:
    """What was measured."""

    photo_bytes: float
    """Of a JPEG of 500 x 375."""
    core_rate: float
    """Such images a core reads, decodes, scores with LeNet-5 and writes in a second: corpus_pass.json."""
    gpu_rate: float
    """Decoded images a card scores with ResNet-50 at 224 in a second: gpu.json."""
    decode_rate: float
    """JPEGs a core decodes to 224 pixels in a second: gpu.json."""
    row_bytes: float
    """Of an image in `scores/`, its own bytes left out, at most: scale.json, by the images that differ."""
    largest: int
    """Images of the largest pass that was measured."""
    driver: DriverCost
    """Where cards do the network: scheduling.json."""
    request_ms: float
    """CPU of the driver per request where CPUs do the network: scheduling.json."""

    @classmethod
    def read(cls, folder: Path) -> Figures:
        """From the JSON files in `folder`; an error names what was not measured."""
        corpus_pass, gpu, scale, scheduling = (json.loads((folder / f"{name}.json").read_text()) for name in FILES)
        kinds = {(entry["kind"], entry["network"]): entry for entry in corpus_pass["comparisons"]}
        photos = kinds["jpeg", "lenet5"]
        card = {row["name"]: row["value"] for sitting in gpu["sittings"] for row in sitting["results"]}
        smallest, *_, largest = sorted(scale["sizes"], key=lambda entry: int(entry["images"]))
        rate = statistics.median(photos["images"] / busy_seconds(run) for run in photos["runs"]["ours"])
        return cls(
            photo_bytes=photos["bytes"] / photos["images"],
            core_rate=rate / corpus_pass["cpus"],
            gpu_rate=card["a resnet50@224: actor on decoded tables, 2 threads"],
            decode_rate=card["a resnet50@224: decoding, one core"],
            row_bytes=smallest["runs"][-1]["said"]["columns_mib"] * 2**20 / min(smallest["images"], DISTINCT),
            largest=max(entry["images"] for entry in [largest, *corpus_pass["comparisons"]]),
            driver=DriverCost.of(scheduling["passes"]),
            request_ms=scheduling["tasks"][-1]["driver_cpu_ms"],
        )

    @property
    def unit_rows(self) -> float:
        """Photographs of a unit, which is what a read request asks for."""
        return float(min(UNIT_ROWS, UNIT_BYTES // self.photo_bytes))


@dataclass(frozen=True)
class Prices:
    """In any one currency."""

    cpu_hour: float
    gpu_hour: float
    gib_month: float
    thousand_gets: float
    thousand_puts: float


@dataclass(frozen=True)
class SetUp:
    """A cluster and its network."""

    name: str
    network: str
    cpus: int
    gpus: int = 0

    def rate(self, figures: Figures, efficiency: float) -> float:
        """Images per second; where there are cards, the slower of decoding and of them decides."""
        if not self.gpus:
            return self.cpus * figures.core_rate * efficiency
        return min(self.gpus * figures.gpu_rate, self.cpus * figures.decode_rate) * efficiency

    def handed_out(self, figures: Figures) -> tuple[float, float]:
        """(images of a piece of work that the driver hands out, pieces that it can hand out in a second)."""
        if self.gpus:
            return float(rows_per_call(True, PIXEL_BYTES)), figures.driver.batches_per_second(self.gpus)
        return figures.unit_rows, 1000 / figures.request_ms


SET_UPS = (
    SetUp("CPUs", "LeNet-5 at 28", 1024),
    SetUp("GPU nodes", "ResNet-50 at 224", 32 * 24, 32),
    SetUp("GPU nodes, and CPU nodes that decode", "ResNet-50 at 224", 32 * 64, 32),
)


def costs(images: float, kept: float, efficiency: float, by: SetUp, figures: Figures, prices: Prices) -> dict[str, str]:
    """A column of the table."""
    rate = by.rate(figures, efficiency)
    hours = images / rate / 3600
    units = images / figures.unit_rows
    gets = images * figures.photo_bytes / BLOCK_BYTES + 2 * units  # each unit reads the footer of its file
    puts = units + images / FILE_ROWS
    left = images * (figures.row_bytes + kept * figures.photo_bytes) / 2**30
    rows, most = by.handed_out(figures)
    asked = rate / rows
    machines = hours * (by.cpus * prices.cpu_hour + by.gpus * prices.gpu_hour)
    requests = (gets * prices.thousand_gets + puts * prices.thousand_puts) / 1000
    return {
        "network": by.network,
        "vCPUs": f"{by.cpus:,}",
        "GPUs": f"{by.gpus:,}",
        "images/s": f"{rate:,.0f}",
        "of its GPUs' rate": f"{rate / by.gpus / figures.gpu_rate:.2f}" if by.gpus else "",
        "read from storage": f"{rate * figures.photo_bytes / 2**30:.1f} GiB/s",
        "**the pass takes**": f"**{duration(hours * 3600)}**",
        "CPU hours": f"{hours * by.cpus:,.0f}",
        "GPU hours": f"{hours * by.gpus:,.0f}",
        "**its machines cost**": f"**{machines:,.0f}**",
        "GETs": f"{gets / 1e6:.1f} million",
        "PUTs": f"{puts / 1e6:.2f} million",
        "these requests cost": f"{requests:,.0f}",
        "scores and kept images": f"{left:,.0f} GiB",
        "which cost a month": f"{left * prices.gib_month:,.0f}",
        "pieces of work a second": f"{asked:,.0f}",
        "that one driver can hand out": f"{most:,.0f}"
        + (f", **{asked / most:.1f} times too few**" if asked > most else ""),
    }


def unit_bytes(count: int = 10_000) -> float:
    """Memory of a unit in the driver: of so many in outline, of files with names of a usual length."""
    owner, facts = Owner("corpus", 0, "parquet"), FileFacts(((1500, UNIT_BYTES),))
    files = [f"photos/part-{number:08d}.parquet" for number in range(count)]
    sources = [SourceFile(f"s3://bucket/lake/{name}", name, UNIT_BYTES, "1") for name in files]
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(place)
        measured = zip(sources, files, strict=True)
        units = [unit for file, name in measured for unit in runs_of_rows(owner, [(file, facts, name)])]
        folder.write_table(PLAN, units_to_table(units))
        tracemalloc.start()
        outlined = read_units(folder)
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return size / len(outlined)


def page(images: float, kept: float, efficiency: float, figures: Figures, prices: Prices) -> str:
    """The Markdown."""
    columns = [costs(images, kept, efficiency, by, figures, prices) for by in SET_UPS]
    rows = ["| " + " | ".join(["", *(by.name for by in SET_UPS)]) + " |", "|---" + "|--:" * len(SET_UPS) + "|"]
    rows += [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]]
    batch = rows_per_call(True, PIXEL_BYTES)
    template = Template(Path(__file__).with_suffix(".md.j2").read_text(), undefined=StrictUndefined)
    text: str = template.render(
        images=images,
        kept=kept,
        efficiency=efficiency,
        figures=figures,
        prices=prices,
        table="\n".join(rows),
        unit_bytes=unit_bytes(),
        units=images / figures.unit_rows,
        batch=batch,
        cards=figures.driver.accelerators(figures.gpu_rate / batch),
        under_way=most_tasks(ResourcesConfig()),
        pixel_bytes=PIXEL_BYTES,
        block_bytes=BLOCK_BYTES,
    )
    return text + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=float, default=1e9)
    parser.add_argument("--efficiency", type=float, default=0.9, help="of what the parts add up to (%(default)s)")
    parser.add_argument("--kept", type=float, default=0.02, help="share of the images that are kept (%(default)s)")
    for name, price, what in (
        ("cpu-hour", 0.05, "a vCPU's hour"),
        ("gpu-hour", 3.0, "a GPU's hour, without CPUs"),
        ("gib-month", 0.023, "a GiB's month in storage"),
        ("thousand-gets", 0.0004, "1,000 GETs"),
        ("thousand-puts", 0.005, "1,000 PUTs"),
    ):
        parser.add_argument(f"--{name}", type=float, default=price, help=f"price of {what} (%(default)s)")
    parser.add_argument("--figures", type=Path, default=PAGE, help="folder of the JSON files; the page goes there too")
    asked = parser.parse_args(argv)
    prices = Prices(asked.cpu_hour, asked.gpu_hour, asked.gib_month, asked.thousand_gets, asked.thousand_puts)
    text = page(asked.images, asked.kept, asked.efficiency, Figures.read(asked.figures), prices)
    (asked.figures / "billion.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
