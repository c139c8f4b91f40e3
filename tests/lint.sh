#!/bin/sh
# The style checks, all of them, from the project's root: sh tests/lint.sh
set -eu
ruff check .
ruff format --check .
snakefmt --check Snakefile workflow/rules
codespell
snakemake --lint --configfile config/demo.yaml
