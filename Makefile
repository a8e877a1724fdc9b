# make demo   set-up, then train and evaluate a small detector
# make test   set-up, then all tests
# make docs   set-up, then the documentation as a site, in build/docs
# make setup  the environment alone
#
# PYTHON   the interpreter to make the environment with
# TOOLBOX  openmmlab, or onedl for the maintained forks
# DATA     demo: a COCO-format folder of your own
# SIZE     demo: pixels that images are brought to (128; time grows with its square)
# IMAGES   demo: images in a batch (2; as many are seen in all)
# SEED     demo: the seed
# NORM     demo: ghostbn, cbn, naivecbn, mabn, brn, bgn, or bn and gn to compare with
# SUITE    test: all, or toolbox: the tests that another toolbox can break
# RECORD   test: 1 records the versions and the results in docs/versions.md
# ARGS     test: more arguments for pytest
PYTHON ?= python3
TOOLBOX ?= openmmlab
VENV := $(if $(filter openmmlab,$(TOOLBOX)),.venv,.venv-$(TOOLBOX))
# The toolbox's imports warn of what its own next release will change.
RUN := $(VENV)/bin/python -W ignore::DeprecationWarning -W ignore::FutureWarning \
	-W ignore:pkg_resources:UserWarning
SEED ?= 0
SUITE ?= all
TESTS_toolbox := tests/test_version.py tests/test_layers/test_contract.py \
	tests/test_mmdet_modules.py tests/test_detectors.py tests/test_tools/test_checkpoints.py \
	tests/test_tools/test_cli.py tests/test_tools/test_errors.py tests/test_tools/test_diagnose_norm.py \
	tests/test_tools/test_end_to_end.py::test_training_learns_and_evaluates
ifeq ($(filter $(SUITE),all toolbox),)
$(error SUITE=$(SUITE) is neither all nor toolbox)
endif
ifneq ($(and $(RECORD),$(ARGS)),)
$(error RECORD=$(RECORD) is for a whole suite: leave ARGS out)
endif
NORM ?= ghostbn
NORMS := ghostbn cbn naivecbn mabn brn bgn bn gn
ifeq ($(filter $(NORM),$(NORMS)),)
$(error NORM=$(NORM) is none of $(NORMS))
endif
WORK_DIR ?= work_dirs/demo$(if $(filter-out ghostbn,$(NORM)),_$(NORM))

.PHONY: setup demo test docs clean

setup:
	$(PYTHON) tools/setup_env.py $(VENV) --toolbox $(TOOLBOX)
	@touch $(VENV)/ready

$(VENV)/ready: setup.cfg
	$(MAKE) setup

demo: $(VENV)/ready
	$(RUN) tools/demo.py configs/demo/faster-rcnn_r18_fpn_$(NORM)-all_1xb2_shapes-coco.py \
		--work-dir $(WORK_DIR) --seed $(SEED) \
		$(if $(DATA),--data "$(DATA)") $(if $(SIZE),--size $(SIZE)) \
		$(if $(IMAGES),--images $(IMAGES))

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile \
		$(TESTS_$(SUITE)) $(if $(RECORD),--record $(SUITE)) $(ARGS)

docs: $(VENV)/ready
	$(RUN) -m sphinx -q -W --keep-going -c docs . build/docs
	@echo "open build/docs/index.html"

clean:
	rm -rf $(VENV) work_dirs/demo work_dirs/demo_* data/shapes_coco build/docs
