"""Write docs/parameters.md, the page of all settings, from workflow/schemas/config.schema.yaml and config/tasks/.

    python workflow/scripts/parameters.py            (with the Python of .venvs/torch or .venvs/test)

What a key means, its unit and what SAT does with it stand in the schema, in English and Chinese (description, x-zh,
x-unit, x-sat, x-sat-zh). A test fails when page and schema differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sat import config as settings  # noqa: E402

PAGE = "docs/parameters.md"
COMMAND = "python workflow/scripts/parameters.py"
UNITS = {
    "1 / step": "1/步",
    "GPUs": "GPU",
    "batches": "批次",
    "GB": "GB",
    "blocks": "块",
    "classes": "类",
    "evaluations": "次验证",
    "examples": "样本",
    "factor": "倍数",
    "features": "特征",
    "heads": "头",
    "ids": "id",
    "keys": "键",
    "landmarks": "地标",
    "layers": "层",
    "numbers": "个数",
    "percent": "百分比",
    "pixels": "像素",
    "positions": "位置",
    "probability": "概率",
    "rounds": "轮",
    "seconds": "秒",
    "sequences": "序列",
    "share": "比例",
    "standard deviations cubed": "标准差的立方",
    "steps": "步",
    "threads": "线程",
}
HEAD = f"""# Parameters · 参数

`{COMMAND}` makes this page from `workflow/schemas/config.schema.yaml`, which checks every
configuration; change it there. The settings of one training are put together from the defaults below,
`config/tasks/<task>.yaml`, `config/attentions/<attention>.yaml` and `settings: <task>:` of the run's configuration,
later ones winning; an unknown key stops everything with its name and the nearest known one. The column SAT says what
the code of the paper does (B. Yoon et al., IEEE Access 12, 2024). "per task" stands for the values at the end.

本页由 `{COMMAND}` 根据 `workflow/schemas/config.schema.yaml` 生成,所有配置都由它检查;
请在那里修改。一次训练的设置依次由下面的默认值、`config/tasks/<task>.yaml`、`config/attentions/<attention>.yaml`
和运行配置中的 `settings: <task>:` 合并而成,后者优先;未知的键会使一切停止,并给出其名称和最接近的已知键。
"SAT" 一列说明论文代码的做法。"per task" 指页末按任务列出的值。
"""
BLOCK_HEADS = {
    "dataset": "what is read · 读取什么",
    "model": "the model and its attention · 模型与注意力",
    "training": "optimiser, evaluation, limits of the dense phase · 优化、验证与稠密阶段的界限",
    "transition": "when a run goes sparse · 何时转为稀疏",
    "pattern": "which blocks are kept · 保留哪些块",
}


def resolved(definition: dict, definitions: dict) -> dict:
    """A key's definition with what it refers to; its own words win."""
    if "$ref" not in definition:
        return definition
    return {**definitions[definition["$ref"].rsplit("/", 1)[1]], **definition}


def values(definition: dict) -> str:
    """The values that a key takes, in words."""
    if "enum" in definition:
        return ", ".join(f"`{value}`" for value in definition["enum"])
    kinds = definition.get("type", "object")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    words = " or ".join(kinds)
    for key, sign in (
        ("minimum", "≥"),
        ("exclusiveMinimum", ">"),
        ("maximum", "≤"),
        ("exclusiveMaximum", "<"),
    ):
        if key in definition:
            words += f", {sign} {definition[key]}"
    if "multipleOf" in definition:
        words += f", a multiple of {definition['multipleOf']}"
    return words


def default(definition: dict, by_task: bool) -> str:
    if by_task:
        return "per task"
    return f"`{json.dumps(definition['default'])}`" if "default" in definition else "–"


def both(english: object, chinese: object) -> str:
    """One cell: English, and below it Chinese unless it is the same."""
    cell = f"{english}" if str(english) == str(chinese) else f"{english}<br>{chinese}"
    return cell.replace("|", "\\|")


def unit(definition: dict) -> str:
    if "x-unit" not in definition:
        return "–"
    return both(definition["x-unit"], UNITS[definition["x-unit"]])


def block_table(properties: dict, definitions: dict, per_task: set[str]) -> list[str]:
    lines = [
        "| key · 键 | meaning · 含义 | unit · 单位 | values · 取值 | default · 默认 | SAT |",
        "|---|---|---|---|---|---|",
    ]
    for key, child in properties.items():
        child = resolved(child, definitions)
        cells = [
            f"`{key}`",
            both(child["description"], child["x-zh"]),
            unit(child),
            values(child),
            default(child, key in per_task),
            both(child["x-sat"], child["x-sat-zh"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def run_table(schema: dict) -> list[str]:
    lines = [
        "| key · 键 | meaning · 含义 | unit · 单位 | values · 取值 | default · 默认 |",
        "|---|---|---|---|---|",
    ]

    def add(name: str, child: dict) -> None:
        child = resolved(child, schema["$defs"])
        if "description" not in child:  # the parts of caps: one line for all
            return
        inner = child.get("properties", {}) if name != "demo" else {}
        cells = [
            f"`{name}`",
            both(child["description"], child["x-zh"]),
            unit(child),
            values(child),
            "–" if inner else default(child, False),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        for key, part in inner.items():
            add(f"{name}.{key}", part)

    for name, child in schema["properties"].items():
        add(name, child)
    return lines


def task_table(tasks: dict[str, dict], definitions: dict) -> list[str]:
    """Keys that config/tasks/ sets, a row each, and a column a task."""
    keys = [
        (block, key)
        for block in settings.BLOCKS
        for key in definitions[block]["properties"]
        if any(key in task.get(block, {}) for task in tasks.values())
    ]
    lines = [f"| key · 键 | {' | '.join(tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for block, key in keys:
        cells = [
            f"`{json.dumps(task[block][key])}`" if key in task.get(block, {}) else "–"
            for task in tasks.values()
        ]
        lines.append(f"| `{block}.{key}` | {' | '.join(cells)} |")
    return lines


def page(root: Path = ROOT) -> str:
    """The whole page. Raises KeyError for a key without one of its annotations."""
    schema = settings.schema(root)
    definitions = schema["$defs"]
    tasks = {
        name: settings.read_yaml(root / "config/tasks" / f"{name}.yaml")
        for name in settings.known("tasks", root)
    }
    lines = [HEAD]
    for block in settings.BLOCKS:
        properties = definitions[block]["properties"]
        per_task = {key for task in tasks.values() for key in task.get(block, {})}
        lines += [f"## {block}: {BLOCK_HEADS[block]}", ""]
        lines += [*block_table(properties, definitions, per_task), ""]
    lines += ["## The configuration of a run · 运行的配置", "", *run_table(schema), ""]
    lines += ["## Per task · 按任务", "", *task_table(tasks, definitions)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / PAGE)
    output = parser.parse_args(arguments).output
    partial = output.with_name(output.name + ".partial")
    partial.write_text(page(), encoding="utf-8")
    partial.replace(output)


if __name__ == "__main__":
    main()
