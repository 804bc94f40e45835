# Everything a person or a machine does with this checkout. "make" lists the targets.
#
# Targets that compile go through bin/setup, which brings what the machine lacks (see
# deploy/setup) and sets the environment that cgo needs. bin/setup itself needs only Go.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

# Arguments for the command that a target runs, as in: make run ARGS="--listen :8081"
ARGS ?=
# Packages that test, race and lint look at.
PKGS ?= ./...
# How long each fuzz target runs.
FUZZTIME ?= 20s
# Compiled by Go on first use: a minute on two cores, then from the build cache.
GOLANGCI := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
SETUP := bin/setup exec

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: bin/setup ## Build and fetch what this machine lacks, and nothing more
	@bin/setup

.PHONY: bin/setup
bin/setup:
	@CGO_ENABLED=0 go build -o bin/setup ./deploy/setup

.PHONY: build
build: bin/setup ## Build bin/lockstep
	@$(SETUP) go build -trimpath -ldflags "-X main.version=$(VERSION)" -o bin/lockstep ./cmd/lockstep

.PHONY: run
run: build ## Serve on this machine, with everything embedded; stop it with Ctrl-C
	@exec bin/lockstep serve $(ARGS)

.PHONY: demo
demo: build ## Fill a running "make run" with Go's documentation and ask it questions
	@$(SETUP) examples/demo.sh

.PHONY: test
test: bin/setup ## Vet and run all tests under the race detector
	@$(SETUP) go vet $(PKGS)
	@$(SETUP) go test -race $(ARGS) $(PKGS)

.PHONY: lint
lint: bin/setup ## Run the linters of .golangci.yml
	@$(SETUP) go run $(GOLANGCI) run $(PKGS)

.PHONY: fuzz
fuzz: bin/setup ## Run each fuzz target for FUZZTIME
	@for file in $$(grep -rlE '^func Fuzz' --include='*_test.go' . | sort); do \
		for name in $$(sed -nE 's/^func (Fuzz[A-Za-z0-9_]+)\(.*/\1/p' $$file); do \
			$(SETUP) go test $$(dirname $$file) -run '^$$' -fuzz "^$$name$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x; \
		done; \
	done

# The campaign: one seed replays its history, N counts histories.
SEED ?= 0
N ?= 200

.PHONY: campaign
campaign: bin/setup ## Run N random histories under faults; SEED=... N=1 replays one
	@$(SETUP) go test ./internal/campaign -count=1 -timeout 0 -v -run 'TestCampaign$$' -campaign.seed $(SEED) -campaign.n $(N) $(ARGS)

ROUNDS ?= 200

.PHONY: crash
crash: bin/setup ## Kill the built server, or its Postgres, ROUNDS times under load
	@LOCKSTEP_CRASH_ROUNDS=$(ROUNDS) $(SETUP) go test ./cmd/lockstep -count=1 -timeout 0 -v -run TestKillUnderLoad

.PHONY: mutants
mutants: bin/setup ## Break the protocol on purpose, one defect at a time; each must be caught
	@$(SETUP) internal/campaign/testdata/mutants/run.sh $(ARGS)

.PHONY: verify-spec
verify-spec: ## Model-check the protocol with SPIN
	@docs/spec/verify.sh $(ARGS)

.PHONY: golden
golden: bin/setup ## Write the golden files anew; read the difference before committing it
	@$(SETUP) go test $$(grep -rlE 'flag\.Bool\("update"' --include='*_test.go' . | xargs -n 1 dirname | sort -u) -update

.PHONY: clean
clean: ## Remove what was built in the checkout; the cache outside stays
	@rm -rf bin
