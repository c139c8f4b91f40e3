#!/bin/sh
# The style checks, all of them, from the project's root: sh tests/lint.sh
set -eu
ruff check .
ruff format --check .
snakefmt --check Snakefile workflow/rules
git ls-files '*.cpp' '*.hpp' '*.cu' '*.h' | xargs clang-format --dry-run -Werror
codespell
snakemake --lint --configfile config/demo.yaml
