"""Data sets in the folders of TFDS, made without network and read. The only module that imports TensorFlow."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np

from .files import require, scratch_folder

EXAMPLES_PER_READ = 512


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


def open_folder(folder: Path):
    """The TFDS builder of a data set that is there, whoever made it; ValueError when it is not."""
    require(folder / "dataset_info.json", "prepare_tfds.py or extract.py")
    tfds = import_tfds()
    from google.protobuf.json_format import ParseError

    try:
        if (folder / "features.json").exists():
            return tfds.builder_from_directory(folder)
        # TFDS before 4.0 (October 2020) left the features to the code that made the data set.
        from tensorflow_datasets.core import dataset_info, read_only_builder

        proto = dataset_info.read_proto_from_builder_dir(folder)
        if proto.name != "pathfinder32":
            raise ValueError("features.json is missing")
        features = tfds.features.FeaturesDict(
            {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)}
        )
        proto = dataset_info.update_info_proto_with_features(proto, features)
        return read_only_builder.builder_from_metadata(folder, proto)
    except (OSError, ValueError, AssertionError, ParseError) as error:
        raise ValueError(corrupt(folder, error)) from None


def count_examples(folder: Path, split: str) -> int:
    """The number of examples of a split, as the data set's description says."""
    splits = open_folder(folder).info.splits
    if split not in splits:
        raise ValueError(f"{folder} has no split {split!r}; it has {sorted(splits)}")
    return splits[split].num_examples


def read_examples(
    folder: Path, split: str, start: int, stop: int, features: list[str]
) -> Iterator[dict[str, np.ndarray]]:
    """Examples `start` to `stop` of a split in the order of its records, EXAMPLES_PER_READ at a time.

    TFDS says where they are and how they are packed; `as_dataset` of it would parse one after the other, which takes
    six times as long. Of each feature an array: bytes (texts, and images as they were packed) or int64. ValueError
    when a file is missing, cut or corrupt.
    """
    info = open_folder(folder).info
    import tensorflow as tf

    packed = info.features.get_serialized_info()
    if unknown := sorted(set(features) - packed.keys()):
        raise ValueError(f"{folder} has no features {unknown}; it has {sorted(packed)}")
    spec = {n: tf.io.FixedLenFeature(packed[n].shape, packed[n].tf_dtype) for n in features}
    # One thread: reading is cheap, and handing records over between threads costs more than it saves.
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    try:
        for file in info.splits[f"{split}[{start}:{stop}]"].file_instructions:
            records = tf.data.TFRecordDataset(file.filename).skip(file.skip).take(file.take)
            count = 0
            for some in records.batch(EXAMPLES_PER_READ).with_options(options):
                examples = tf.io.parse_example(some, spec)
                count += len(some)
                yield {name: values.numpy() for name, values in examples.items()}
            if count != file.take:
                found = f"{Path(file.filename).name} has {count} of its {file.take} records"
                raise ValueError(corrupt(folder, found))
    except tf.errors.OpError as error:
        raise ValueError(corrupt(folder, error)) from None


def corrupt(folder: Path, error: Exception | str) -> str:
    what = next(iter(str(error).splitlines()), type(error).__name__)
    return f"{folder} is cut or corrupt ({what}): delete the folder and make it again"
