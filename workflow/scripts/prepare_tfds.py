"""Make a TFDS data set from an archive that is already here; nothing is downloaded.

    python prepare_tfds.py --builder cifar10:3.0.2 --data-dir data/lra/tfds \
        --archive data/lra/archives/cifar-10-binary.tar.gz \
        --record data/lra/archives/cifar-10-binary.tar.gz.source.json

Needs the TF environment.
"""

import argparse
import os
import shutil
from pathlib import Path

from lra.files import read_json, run_script, scratch_folder, sha256_file
from lra.tfds_folder import import_tfds, open_builder


def prepare(name: str, data_dir: Path, archive: Path, record: Path) -> None:
    """Prepare the data set `name` below `data_dir`.

    ValueError, and nothing prepared, when the archive is not the one that TFDS knows.
    """
    tfds = import_tfds()
    builder = open_builder(name, data_dir)
    known = {info.filename: info for info in builder.url_infos.values()}
    if len(known) != 1:
        raise ValueError(f"{name} needs {sorted(known)}, this program prepares sets of one archive")
    filename, info = known.popitem()
    sha256 = sha256_file(archive)
    for expected, whose in (
        (info.checksum, f"TFDS for {name}"),
        (read_json(record)["sha256"], record),
    ):
        if sha256 != expected:
            raise ValueError(
                f"{archive} has sha256 {sha256}, expected {expected} ({whose}): "
                "delete it and get it again"
            )
    with scratch_folder(data_dir / f".{builder.name}.tmp") as scratch:
        # TFDS takes a file with the archive's own name in its manual folder for the download.
        manual = scratch / "manual"
        manual.mkdir()
        try:
            os.link(archive.resolve(), manual / filename)
        except OSError:
            shutil.copyfile(archive, manual / filename)
        config = tfds.download.DownloadConfig(
            manual_dir=manual, extract_dir=scratch / "extracted", try_download_gcs=False
        )
        builder.download_and_prepare(download_dir=scratch / "downloads", download_config=config)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--builder", required=True, help="e.g. imdb_reviews/plain_text:1.0.0")
    parser.add_argument("--data-dir", required=True, type=Path, help="data/<run>/tfds")
    parser.add_argument("--archive", required=True, type=Path, help="the downloaded archive")
    parser.add_argument("--record", required=True, type=Path, help="the archive's .source.json")
    args = parser.parse_args()
    prepare(args.builder, args.data_dir, args.archive, args.record)


if __name__ == "__main__":
    run_script(main)
