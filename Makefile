# make demo     the main job on generated data: environments, archives, preprocessing, kernels, training, table, figures
# make test     the tests
# make lint     the checks that pre-commit runs
# make clean    remove what demo and tests made (environments included; real data and results stay)
#
# Python 3.11, a C++ compiler and a package index are enough; everything else is installed below .venvs/.

PYTHON ?= $(shell command -v python3.11 || echo python3)
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
SNAKEMAKE = .venvs/snakemake/bin/snakemake

.PHONY: demo test lint clean

demo: .venvs/snakemake/.ready
	$(SNAKEMAKE) all --cores $(CORES) --configfile config/demo.yaml

test: .venvs/snakemake/.ready
	.venvs/snakemake/bin/python tests/environment.py
	.venvs/test/bin/python -m pytest

lint: .venvs/snakemake/.ready
	.venvs/snakemake/bin/python tests/environment.py
	PATH="$(CURDIR)/.venvs/test/bin:$$PATH" sh tests/lint.sh

.venvs/snakemake/.ready: requirements.txt
	rm -rf .venvs/snakemake
	$(PYTHON) -m venv .venvs/snakemake
	.venvs/snakemake/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venvs data/demo results/demo
