"""The other sources of a task, and the extra tasks."""

import pytest


@pytest.mark.parametrize(
    ("changes", "task", "expected"),
    [
        (
            {"read_from": {"pathfinder": "pathfinder_tfds"}},
            "pathfinder",
            {"download pathfinder_tfds.gz", "extract_pathfinder_tfds"},
        ),
        (
            {"read_from": {"retrieval": "aan_mirror"}},
            "retrieval",
            {f"download new_aan_pairs.{name}.tsv" for name in ("train", "eval", "test")},
        ),
        (
            {"read_from": {"listops": "listops_tsv"}},
            "listops",
            {f"download basic_{name}.tsv" for name in ("train", "val", "test")},
        ),
        ({}, "agnews", {"download ag_news_csv.tar.gz", "prepare_ag_news_subset"}),
        (
            {},
            "yelp",
            {"download yelp_review_polarity_csv.tgz", "prepare_yelp_polarity_reviews"},
        ),
    ],
)
def test_other_sources_and_extra_tasks(fresh, changes, task, expected):
    fresh.configure(tasks=[task], **changes)
    assert fresh.planned("data") == expected | {f"preprocess {task}"}


def test_extra_task_has_its_other_name(fresh):
    fresh.configure(tasks=["news1"])
    assert "train agnews sat 1001" in fresh.planned("news1")
