"""``natgrad datasets``: what data there are on this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import natgrad_datasets
import typer

from ntk_analysis.cli.app import app, output, work
from ntk_analysis.results import FILE_NAME, now, read_document, write_json
from ntk_analysis.tables import dataset_table

COMMAND = "natgrad datasets"


@app.command()
def datasets(
    out: Annotated[
        Path | None, typer.Option(help="folder to write results.json into [default: none]")
    ] = None,
) -> None:
    """List the data sets: sizes, where they were found, licence, state of the checksums.

    Nothing is downloaded. Files are searched in the folder that the environment variable
    NATGRAD_DATA names, then in the user's cache.
    """
    with work(out, "nothing is kept"):
        if out is not None:
            read_document(out / FILE_NAME, COMMAND)
        rows = natgrad_datasets.status()
        output.print(dataset_table(rows))
        if out is not None:
            document = {
                "command": COMMAND,
                "date": now(),
                "datasets": [asdict(row) for row in rows],
            }
            write_json(out / FILE_NAME, document)
            output.print(f"wrote {FILE_NAME} to {out}")
