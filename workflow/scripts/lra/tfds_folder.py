"""Data sets in the folders of TFDS, made without network. The only module that imports TensorFlow."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

from .files import scratch_folder


def import_tfds():
    """TensorFlow Datasets, on the CPU and without TensorFlow's greetings."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    return tfds


def open_builder(name: str, data_dir: Path):
    """The TFDS builder of `name` (such as cifar10:3.0.2); ValueError when TFDS has none.

    What a killed attempt left is removed, because TFDS takes any folder of that name for a whole one.
    """
    tfds = import_tfds()
    from tensorflow_datasets.core.utils import gcs_utils

    # TFDS would ask a bucket for the data set's description, and wait for an answer.
    gcs_utils._is_gcs_disabled = True
    folder = data_dir / name.replace(":", "/")
    for leftover in folder.parent.glob(f"incomplete.*{folder.name}"):
        shutil.rmtree(leftover)
    # Before TFDS looks: it reads the description of a folder that is there, and Snakemake has removed that.
    if folder.exists() and not (folder / "dataset_info.json").exists():
        shutil.rmtree(folder)
    try:
        return tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as error:
        raise ValueError(f"TFDS has no data set {name}: {str(error).splitlines()[0]}") from None


def write_tfds(name: str, data_dir: Path, splits: dict[str, Iterable]) -> list[Path]:
    """Write generated examples, (key, features) pairs a split, as the TFDS data set `name`.

    An older data set of that name is replaced. Returns its record files.
    """
    tfds = import_tfds()
    builder = open_builder(name, data_dir)
    folder = Path(builder.data_dir)
    shutil.rmtree(folder, ignore_errors=True)
    builder = open_builder(name, data_dir)
    builder._split_generators = lambda *_: splits
    # A protobuf map has no order of its own; TFDS writes whichever comes, which differs between runs.
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    in_order = mock.patch.object(
        ExampleSerializer,
        "serialize_example",
        lambda self, example: self.get_tf_example(example).SerializeToString(deterministic=True),
    )
    with in_order, scratch_folder(data_dir / f".{builder.name}.tmp") as scratch:
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_dir=scratch, download_config=config)
    return sorted(folder.glob("*.tfrecord*"))
