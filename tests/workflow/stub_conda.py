"""Stand-in for conda: answers the calls that Snakemake makes of it; environments hold the stub interpreter.

stub_project.install_conda puts it on PATH as `conda`. Each environment made is a line of environments.jsonl in the base
folder: {"prefix", "definition" (the YAML's text)}. A call that Snakemake is not known to make fails.
"""

import json
import shutil
import sys
from pathlib import Path

BASE = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> None:
    match arguments:
        case ["--version"]:
            print("conda 26.7.0")
        case ["info", "--json"]:
            print(json.dumps({"conda_prefix": str(BASE), "platform": "linux-64"}))
        case ["config", "--get", "channel_priority", "--json"]:
            print(json.dumps({"get": {"channel_priority": "strict"}}))
        case ["env", "create", "--quiet", "--no-default-packages", "--file", file, "--prefix", to]:
            Path(to, "bin").mkdir(parents=True)
            shutil.copy(BASE / "stub_python", Path(to, "bin/python"))
            with open(BASE / "environments.jsonl", "a") as log:
                made = {"prefix": to, "definition": Path(file).read_text()}
                log.write(json.dumps(made) + "\n")
        case ["clean", "-y", "--tarballs"]:
            pass
        case _:
            sys.exit(f"the stand-in for conda does not know: conda {' '.join(arguments)}")


if __name__ == "__main__":
    main(sys.argv[1:])
