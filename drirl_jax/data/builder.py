"""The demonstrations as a TFDS data set: prepared once, then read at any index without parsing the JSON again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.resources
import json
import logging
import pathlib
import shutil
import sys
import tempfile
from typing import Sequence

import grain
import tensorflow_datasets as tfds

from drirl_jax.data import records
from drirl_jax.data.records import PathLike, Record
from drirl_jax.runtime import console, processes
from drirl_jax.types import InputError

log = logging.getLogger(__name__)


@dataclasses.dataclass
class DemosConfig(tfds.core.BuilderConfig):
    """Names a data set by the hash of its records, and carries these records, so that exactly they are written."""

    records: tuple[Record, ...] = dataclasses.field(default=(), repr=False)


def config(
    paths: PathLike | Sequence[PathLike],
    categories: Sequence[str],
    harmless: Sequence[str] = records.HARMLESS,
    unanswered: bool = False,
) -> DemosConfig:
    """The config of the demonstrations in `paths` (see `records.read_records`). Changed data gets another name."""
    rows = tuple(records.read_records(paths, categories, harmless=harmless, unanswered=unanswered))
    new_config = _named(rows)
    return next((existing for existing in SafetyDemos.BUILDER_CONFIGS if existing.name == new_config.name), new_config)


def _named(rows: tuple[Record, ...]) -> DemosConfig:
    return DemosConfig(name=hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:16], records=rows)


def _starter() -> DemosConfig:
    folder = importlib.resources.files("drirl_jax.data") / records.STARTER
    names = sorted(file.name.removesuffix(".jsonl") for file in folder.iterdir() if file.name.endswith(".jsonl"))
    return _named(tuple(records.read_records(records.STARTER, names)))


class SafetyDemos(tfds.core.GeneratorBasedBuilder):
    """Prompts of each harm category, each with a demonstration: a safe answer. The default is the starter set.

    Importing this module registers it in TFDS as `safety_demos`.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [_starter()]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {field: tfds.features.Text() for field in Record._fields}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        splits = {r.split for r in self.builder_config.records}
        return {split: self._generate_examples(split) for split in records.SPLITS if split in splits}

    def _generate_examples(self, split: str):
        for record in self.builder_config.records:
            if record.split == split:
                yield record.id, record._asdict()


def load(
    paths: PathLike | Sequence[PathLike],
    categories: Sequence[str],
    data_dir: PathLike | None = None,
    harmless: Sequence[str] = records.HARMLESS,
    unanswered: bool = False,
) -> dict[str, grain.MapDataset]:
    """Prepares the demonstrations under `data_dir`, unless they are there already, and opens them.

    Several processes may do so at once. Each writes its own folder; the first to finish gives it the final name.

    Args:
        paths: "starter", a file, a folder, or several of these (see `records.read_records`).
        categories: the categories in use.
        data_dir: the folder of prepared data sets; None means the default of TFDS (~/tensorflow_datasets).
        harmless, unanswered: which records may be unanswered, and whether to keep them (see `records.read_records`).

    Returns:
        split -> the split's records, readable at any index; a split without records is absent. Their order depends
        only on the content.

    Raises:
        InputError: in at least one process a file is missing or a record breaks the schema; or the processes read
            different records.
    """
    with processes.all_or_none():
        demos = config(paths, categories, harmless, unanswered)
    if len(set(processes.gather_json(demos.name))) > 1:
        raise InputError(f"the processes read different records in {paths}: give all of them the same files.")
    with processes.all_or_none():
        return _opened(demos, data_dir)


def _opened(demos: DemosConfig, requested_dir: PathLike | None) -> dict[str, grain.MapDataset]:
    """Opens the prepared data set and compares it with its source records. It prepares a damaged set anew. If it cannot
    write to the default folder of TFDS (no home folder, say), it prepares the set in a folder of this process."""
    data_dir = pathlib.Path(requested_dir or tfds.core.constants.DATA_DIR)
    folder = data_dir / SafetyDemos.name / demos.name / str(SafetyDemos.VERSION)
    try:
        return _prepared(demos, data_dir)
    except Exception as error:  # one changed byte may break JSON, a protocol buffer, zstd or an index
        damage = error
    if folder.is_dir():
        log.warning("%s is damaged (%s): it is prepared anew", folder, f"{type(damage).__name__}: {damage}"[:200])
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(Exception):
            return _prepared(demos, data_dir)
    if requested_dir is not None:
        raise damage
    log.warning(
        "no prepared data can be kept in %s (%s): set TFDS_DATA_DIR to a folder that can be written", data_dir, damage
    )
    return _prepared(demos, pathlib.Path(_own_folder().name))


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory:
    """A temporary folder of this process; it is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="drirl_jax-data-")


def _prepared(demos: DemosConfig, data_dir: pathlib.Path) -> dict[str, grain.MapDataset]:
    """The data set in this folder. Raises ValueError if it does not hold the config's records, and any error of
    TFDS."""
    builder = SafetyDemos(config=demos, data_dir=data_dir)
    if console.mode() != "text":
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # TFDS logs to stdout, which is for the result
            builder.download_and_prepare(file_format="array_record")
    except OSError:
        if not builder.data_path.is_dir():
            raise
        # Another process was first. It prepared the same content.
        builder = SafetyDemos(config=demos, data_dir=data_dir)
    opened = {
        split: grain.MapDataset.source(source).map(_to_record) for split, source in builder.as_data_source().items()
    }
    if sorted(Record(*row) for rows in opened.values() for row in rows) != sorted(demos.records):
        raise ValueError("it holds other records than those it was prepared from")
    return opened


def read_splits(
    paths: PathLike | Sequence[PathLike],
    categories: Sequence[str],
    data_dir: PathLike | None = None,
    harmless: Sequence[str] = records.HARMLESS,
    unanswered: bool = False,
) -> dict[str, list[Record]]:
    """The records of `load` as lists. Each process reads its share of the prepared data."""
    prepared = load(paths, categories, data_dir, harmless, unanswered)
    return {split: [Record(*row) for row in processes.map_shares(dataset, list)] for split, dataset in prepared.items()}


def _to_record(example: dict[str, bytes]) -> Record:
    return Record(**{field: value.decode() for field, value in example.items()})
