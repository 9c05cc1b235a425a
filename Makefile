# SPDX-License-Identifier: GPL-2.0
#
# Each target calls a script. Documentation/setup.md describes them.

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test quick test-debug torture conformance overcommit bench bench-quick check module rustdoc shell setup clean distclean

help:
	@echo 'make demo         set up, build, and merge memory of real processes in a guest'
	@echo 'make test         set up, build, and run every test'
	@echo 'make quick        the checks and the quicker guest tests, before each commit (ten minutes)'
	@echo 'make test-debug   the guest tests and the torture test in the debug kernel'
	@echo 'make torture      random operations on memory that merges (SECONDS=60 SEED= OPS= NOT= WORKERS=10)'
	@echo 'make conformance  the kernel'"'"'s own KSM selftests, with in-tree KSM and with rksm'
	@echo 'make overcommit   52 KVM guests in a third of their memory, with in-tree KSM and with rksm'
	@echo 'make bench        all benchmarks, of both engines (under an hour)'
	@echo 'make bench-quick  instructions of the two main workloads (two minutes)'
	@echo 'make check        rustfmt, clippy, rustdoc, host tests, without a guest'
	@echo 'make module       build/rksm.ko'
	@echo 'make rustdoc      documentation of every item of the module, in build/rustdoc/rksm'
	@echo 'make shell        start a guest, ready to load the module'
	@echo 'make setup        set up the Debian root and the kernel tree only'
	@echo 'make clean        remove build/'
	@echo 'make distclean    remove build/ and the cache'
	@echo
	@echo 'RKSM_CACHE=DIR    the cache (default: ~/.cache/rksm)'
	@echo 'RKSM_MIRROR=URL   the Debian archive (default: that of this machine'"'"'s apt)'
	@echo 'KERNEL=VERSION    a kernel of the archive, such as 7.3.4+deb13-amd64'
	@echo 'KDIR=DIR          build against a prepared kernel tree'

setup:
	@scripts/setup

module: setup
	@scripts/build-module

rustdoc: setup
	@scripts/build-module --rustdoc

demo: module
	@tests/demo/run

test: module
	@scripts/test

quick: module
	@scripts/test --quick

test-debug:
	@scripts/setup --debug
	@RKSM_KERNEL=debug scripts/build-module
	@scripts/test-debug

torture: module
	@tests/torture/run --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED)) $(if $(OPS),--ops $(OPS)) \
		$(if $(NOT),--not $(NOT)) $(if $(or $(WORKERS),$(PLAYERS)),--workers $(or $(WORKERS),$(PLAYERS)))

conformance: module
	@scripts/conformance

overcommit: module
	@scripts/overcommit $(if $(GUESTS),--guests $(GUESTS))

bench: module
	@scripts/bench

bench-quick: module
	@scripts/bench --quick

check: setup
	@bash -c '. scripts/lib.sh; stages_begin build/tally; stage build/tally check scripts/check; stages_done build/tally'

shell: module
	@scripts/shell || [ $$? -lt 97 ] # below 97: the status of the last command in the guest

clean:
	rm -rf build

distclean: clean
	@scripts/setup --remove
