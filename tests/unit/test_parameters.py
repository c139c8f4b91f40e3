"""docs/parameters.md and the schema it is made from say the same, in both languages."""

import parameters
import pytest

from sat import config

DEFINITIONS = config.schema()["$defs"]
KEYS = [(block, key) for block in config.BLOCKS for key in DEFINITIONS[block]["properties"]]


@pytest.mark.parametrize(("block", "key"), KEYS, ids=map(".".join, KEYS))
def test_every_key_is_explained_in_both_languages(block, key):
    definition = parameters.resolved(DEFINITIONS[block]["properties"][key], DEFINITIONS)
    for annotation in ("description", "x-zh", "x-sat", "x-sat-zh"):
        assert definition.get(annotation), (
            f"workflow/schemas/config.schema.yaml: {block}.{key} has no {annotation}"
        )
    assert any("\u4e00" <= letter <= "\u9fff" for letter in definition["x-zh"])
    numeric = {"integer", "number"} & set(
        definition["type"] if isinstance(definition.get("type"), list) else [definition.get("type")]
    )
    assert not numeric or definition.get("x-unit"), f"{block}.{key} has no x-unit"
    assert definition.get("x-unit", "steps") in parameters.UNITS


def test_the_page_is_the_schema():
    path = config.ROOT / parameters.PAGE
    assert path.read_text(encoding="utf-8") == parameters.page(), (
        f"{parameters.PAGE} differs from the schema: run `{parameters.COMMAND}`"
    )


def test_every_key_of_a_run_is_on_the_page():
    page = parameters.page()
    for key in config.schema()["properties"]:
        assert f"| `{key}` |" in page
    assert "| `kernels.cuda` |" in page and "| `training.batch_size` | " in page
