"""``pool``: what several sites have written about one model, together, without their rows."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medgemma_clinical import files
from medgemma_clinical.commands.command_line import EXIT_DONE, OUTPUT_DIR, Table
from medgemma_clinical.evaluation import aggregate
from medgemma_clinical.evaluation.report import write_report
from medgemma_clinical.evaluation.sites_page import pooled_cells, pooled_words, sites_page
from medgemma_clinical.files import InputError
from medgemma_clinical.flags import Flag

logger = logging.getLogger(__name__)

FILES = "what each site wrote by predict --aggregate"
FLAGS: Table = {
    "files": (
        Flag("files", Path, help=FILES, several=True, positional=True),
        OUTPUT_DIR,
    ),
}

FORMAT = 2
"""Rises when aggregates of earlier versions cannot be pooled with new ones."""

MAX_SIZE = 2**14
"""Bytes of an aggregate."""


def run(args: Namespace) -> int:
    """Pool the files of several sites."""
    return pool(args.files, args.output_dir)


def pool(paths: Sequence[Path], output_dir: Path) -> int:
    """Pool the aggregates of several sites; write ``sites.json`` and ``sites.html``."""
    sites: dict[str, Any] = {}
    for path in paths:
        site, content = files.one_line(path.stem), read_aggregate(path)
        for other, earlier in sites.items():
            if site == other or content["models"] == earlier["models"]:
                raise InputError(f"pool {path}: the same as {other}: give each site once")
            if model_of(content) != model_of(earlier):
                raise InputError(f"pool {path}: of another model than {other}: leave it out")
        sites[site] = content
    if len(sites) < 2:
        raise InputError("pool: name the files of two sites or more")
    estimates, pooled, notes = aggregate.pool_sites(sites)
    model = model_of(content)
    files.make_output_dir(output_dir)
    table, page = output_dir / "sites.json", output_dir / "sites.html"
    with files.locked(page):
        for aside in files.move_aside([table, page]):
            logger.info("earlier file moved to %s", aside)
        results = {"pooled": pooled.reset_index(), "sites": estimates}
        tables = {
            name: aggregate.few_digits(found.to_dict("records")) for name, found in results.items()
        }
        files.write_json(table, {"format": FORMAT, "model": model, **tables, "left_out": notes})
        write_report(page, sites_page(sites, estimates, pooled, notes))
    cells = pooled_cells(pooled.loc[model["name"]]).to_string(index=False)
    text = pooled_words(pooled, len(sites)) or cells
    logger.info("\n%s\nresults: %s, %s", "\n".join([text, *notes]), page, table)
    return EXIT_DONE


def model_of(content: Any) -> dict[str, Any]:
    """Return what the used model of an aggregate is, which all sites must have."""
    used = content["models"][0]
    return {"name": used["name"], "sha256": used["sha256"], "outcome": content["outcome"]} | {
        name: content[name] for name in ("target",) if name in content
    }


def read_aggregate(path: Path) -> Any:
    """Return the content of a file of ``predict --aggregate``, checked."""
    try:
        if path.stat().st_size > MAX_SIZE:
            raise ValueError
        content = files.read_json(path)
        if (version := content["format"]) != FORMAT:
            raise InputError(f"pool {path}: of format {version!s:.20}, not {FORMAT}")
        aggregate.read_models(content)
        if problem := aggregate.count_problem(content):
            raise InputError(f"pool {path}: {problem}: leave it out")
    except InputError:
        raise
    except files.READING_ERRORS as error:
        text = "not a file of predict --aggregate, or damaged"
        raise InputError(f"pool {path}: {text}: leave it out") from error
    return content
