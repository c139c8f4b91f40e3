"""Make the environment that the tests run in: .venvs/test, with the pinned tools of tests/requirements.txt.

It sees the packages of .venvs/torch and .venvs/report, which the jobs use, instead of a second copy of each. Tests that
need TensorFlow start the interpreter of .venvs/tf, since TensorFlow and PyTorch never meet in one process; a test that
writes a model for llama.cpp starts that of .venvs/llama.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "workflow/scripts"))

import environments  # noqa: E402


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def main() -> None:
    environments.ensure_all(["tf", "torch", "report", "llama"])
    tools = lines(ROOT / "requirements.txt") + lines(ROOT / "tests/requirements.txt")
    environments.build("test", tools, also=["torch", "report"])


if __name__ == "__main__":
    try:
        main()
    except environments.EnvironmentFailed as error:
        sys.exit(f"error: {error}")
