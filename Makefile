# Everything is set up in .venv with pinned versions; nothing needs installing by hand.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find mvmoe_deploy exporters bench models -type f -not -name '*.pyc') pyproject.toml
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test fuzz lint types docs schema clean

# Reads a sign in nine scripts with the zoo's routed model and at most one expert in memory, then measures the model
# against its dense baseline on labelled characters; last, two photos with the zoo's model for photos.
demo: SCRIPTS := models/zoo/scripts
demo: .venv/run
	$(BIN)/python -m zipfile -e $(SCRIPTS)/sample/val.zip .demo/characters
	$(BIN)/mvmoe-export $(SCRIPTS)/dense.safetensors --target onnx --images .demo/characters --out .demo/dense.mvmoe --force
	$(BIN)/mvmoe-export $(SCRIPTS)/moe.safetensors --target onnx --layout swappable --images .demo/characters --out .demo/moe.mvmoe --force
	$(BIN)/python -P -m mvmoe_deploy.models.zoo.scripts read .demo/moe.mvmoe docs/cafe.png --text docs/cafe.txt
	$(BIN)/mvmoe-bench .demo/dense.mvmoe .demo/moe.mvmoe --data $(SCRIPTS)/sample --plot .demo/bench.png
	@echo "Accuracy of 500 images. Of 23,700: dense 74.85 %, routed 75.97 % (models/zoo/scripts/moe.md)."
	$(BIN)/mvmoe-export models/zoo/moe.safetensors --target onnx --images docs/photos --out .demo/photos.mvmoe --force
	$(BIN)/mvmoe-run .demo/photos.mvmoe docs/photos/chelsea.jpg docs/photos/coffee.jpg --max-resident 1

test: .venv/dev
	$(BIN)/pytest -n auto --dist loadgroup  # not python -m pytest, which would find the checkout first

# Thousands of damaged and hostile files, of which none may crash, hang or be answered wrongly; some minutes.
fuzz: .venv/dev
	$(BIN)/python tests/fuzz/fuzz.py

# Ruff checks every Python file of the checkout; mypy the installed package, and the scripts in docs/.
lint: .venv/dev types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	cd .venv && bin/mypy --config-file ../pyproject.toml  # from there, so that it checks the installed package
	cd .venv && bin/mypy --config-file ../pyproject.toml ../docs/*.py

# The documentation, in site/. Strict: a broken link or a module that cannot be found is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python docs/offline.py site

# docs/manifest.schema.json and docs/selftest.schema.json, from the code. A test fails while they are stale.
schema: .venv/docs
	$(BIN)/python docs/schema.py

clean:
	rm -rf .venv .demo build dist site *.egg-info

.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed (make PYTHON=...)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

# The package is installed, not linked: tests, type checks and the API pages see what users get. The folder build is
# removed first, because setuptools would find modules there that are no more.
.venv/run: EXTRA := bench,backbones
.venv/dev: EXTRA := dev
.venv/docs: EXTRA := docs
.venv/run .venv/dev .venv/docs: .venv/bin/pip constraints.txt $(SOURCES)
	rm -rf build
	$(PIP) '.[$(EXTRA)]'
	$(PIP) --no-deps --force-reinstall .
	touch $@
