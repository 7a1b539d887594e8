"""Copy the parts of a sweep that its tables and figures need, so that they can be committed.

    python analysis/compact.py runs/mnist analysis/runs/mnist

Copies sweep.yaml, manifest.json, and the configuration, status and metrics of each run. The metrics are
merged into one file and rounded to single precision. Weights, checkpoints and the paths of the machine are
left out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jsonargparse import auto_cli

from feedbackhook.store.recorder import parts_of, schema


def main(sweep: Path, output: Path) -> None:
    """Copy a sweep without its weights, checkpoints and figures.

    Args:
        sweep: Folder of a sweep.
        output: Folder to write; its content is replaced.
    """
    if not (sweep / "sweep.yaml").is_file():
        raise SystemExit(f"{sweep} is not the folder of a sweep: it has no sweep.yaml")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    config = yaml.safe_load((sweep / "sweep.yaml").read_text())
    _write(
        output / "sweep.yaml", {**config, "data": _with_relative_root(config["data"]), "output": output.name}
    )
    shutil.copy(sweep / "manifest.json", output)
    for status in sorted(sweep.glob("*/status.json")):
        _compact(status.parent, output / status.parent.name)


def _compact(run: Path, output: Path) -> None:
    (output / "metrics").mkdir(parents=True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["provenance"]["command"] = "feedbackhook sweep sweep.yaml"
    config["provenance"]["machine"]["platform"] = config["provenance"]["machine"]["platform"].split("-")[0]
    _write(
        output / "config.yaml", {**config, "data": _with_relative_root(config["data"]), "output": output.name}
    )
    (output / "status.json").write_text(
        json.dumps(json.loads((run / "status.json").read_text()), indent=2) + "\n"
    )
    table = pa.concat_tables([pq.read_table(part) for part in parts_of(run / "metrics")])
    values = table["value"].cast(pa.float32(), safe=False).cast(pa.float64())
    table = table.set_column(table.column_names.index("value"), "value", values).cast(schema())
    pq.write_table(
        table, output / "metrics" / "part-00000.parquet", compression="zstd", write_page_checksum=True
    )


def _with_relative_root(data: dict[str, object]) -> dict[str, object]:
    return {**data, "root": "data", "cache": None}


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
