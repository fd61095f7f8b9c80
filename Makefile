# moba.c: every build. `make help` lists the targets.
#
#   make                                          the trainer for this machine, and the tokenizer
#   make ATTN=dense GQA=gqa KCONV=0 PRECISION=fp32 DEVICE=cpu
#
# Binaries lie side by side in build/, named by their flags; build/train_gpt is the one built last.

ifeq ($(origin CC),default)
  CC := gcc
endif
ifeq ($(origin CXX),default)
  CXX := g++
endif
BUILD ?= build

# ----------------------------------------------------------------------------
# Flags, each with its values

ATTN ?= dense
GQA ?= gqa
KCONV ?= 0
PRECISION ?= fp32

# Only the CPU operations exist so far; with CUDA's, the choice will follow nvcc and the driver.
ifeq ($(origin DEVICE),undefined)
  DEVICE := cpu
  DEVICE_REASON := (the only device of this version)
endif

allow = $(if $(filter $($(1)),$(2)),,$(error $(1)=$($(1)): must be one of: $(2)))
$(call allow,DEVICE,cpu)
$(call allow,ATTN,dense moba flashmoba)
$(call allow,GQA,gqa kdgqa dgqa pgqa)
$(call allow,KCONV,0 3 5)
$(call allow,PRECISION,fp32 fp64)

NAME := train_gpt_$(DEVICE)_$(ATTN)_$(GQA)_kconv$(KCONV)_$(PRECISION)

# ----------------------------------------------------------------------------
# Compiler. No -ffast-math: the checks for NaN and Inf must mean something, and sums keep their order.

WARNINGS := -Wall -Wextra -Werror -Wshadow -Wstrict-prototypes
CFLAGS ?= -O3 -march=native -g
COMMON := -std=gnu11 $(CFLAGS) -fno-math-errno -fno-trapping-math -fopenmp -pthread $(WARNINGS) -I. -MMD -MP
variant = -DDEVICE_CPU -DATTN_NAME='"$(1)"' -DGQA_NAME='"$(2)"' -DKCONV=$(3)
VARIANT := $(call variant,$(ATTN),$(GQA),$(KCONV))
precision = -DPRECISION_$(shell echo $(1) | tr a-z A-Z)
onednn = $(if $(filter fp64,$(1)),,-ldnnl)
TRAIN_LIBS := -lcjson -lpcre2-8 -lm

# A missing library is named before the compiler stumbles over it.
NEEDED := libdnnl-dev:oneapi/dnnl/dnnl.h libpcre2-dev:pcre2.h libcjson-dev:cjson/cJSON.h
define missing_packages
$(shell for pair in $(1); do \
  printf '#define PCRE2_CODE_UNIT_WIDTH 8\n#include <stdarg.h>\n#include <stddef.h>\n#include <setjmp.h>\n#include <%s>\n' "$${pair#*:}" \
  | $(CC) -E -x c - >/dev/null 2>&1 || echo "$${pair%%:*}"; done)
endef
needs = $(if $(call missing_packages,$(1)),$(error missing: $(call missing_packages,$(1)). Run scripts/install.sh))
BUILDING := $(filter-out help clean lint format install,$(or $(MAKECMDGOALS),all))
ifneq ($(BUILDING),)
  $(call needs,$(NEEDED))
endif

# make V=1 shows the commands.
Q := $(if $(V),,@)

.PHONY: all train tokenizer retrieval snr test test-long bench lint format clean help
all: train tokenizer retrieval

help:
	@sed -n 's/^#   //p' Makefile
	@echo "targets: all train tokenizer retrieval snr test test-long bench lint format clean"

# ----------------------------------------------------------------------------
# Programs

train: $(BUILD)/$(NAME)
	@ln -sf $(NAME) $(BUILD)/train_gpt
	@echo "$(BUILD)/train_gpt -> $(NAME) $(DEVICE_REASON)"

tokenizer: $(BUILD)/tokenizer

retrieval: $(BUILD)/retrieval

# The variants that test_programs runs beside the one that is built.
TESTED_TRAINERS := $(foreach variant,kdgqa_kconv3 dgqa_kconv5 pgqa_kconv3,$(BUILD)/train_gpt_cpu_$(ATTN)_$(variant)_fp32)

# A trainer is built as its name says: train_gpt_DEVICE_ATTN_GQA_kconvN_PRECISION.
flag = $(word $(1),$(subst _, ,$*))
$(sort $(BUILD)/$(NAME) $(TESTED_TRAINERS)): $(BUILD)/train_gpt_%: train_gpt.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(call variant,$(call flag,2),$(call flag,3),$(patsubst kconv%,%,$(call flag,4))) \
	  $(call precision,$(call flag,5)) -MF $@.d -x c $< -o $@ $(call onednn,$(call flag,5)) $(TRAIN_LIBS)

$(BUILD)/tokenizer $(BUILD)/retrieval: $(BUILD)/%: tokenizer/%.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) -MF $@.d $< -o $@ -lpcre2-8 -lcjson -lm

# The router's theory; for a checkpoint, built with the flags of the model.
snr: $(BUILD)/$(NAME:train_gpt_%=snr_%)
	@ln -sf $(NAME:train_gpt_%=snr_%) $(BUILD)/snr

$(BUILD)/$(NAME:train_gpt_%=snr_%): dev/snr.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(VARIANT) $(call precision,$(PRECISION)) -MF $@.d $< -o $@ $(call onednn,$(PRECISION)) $(TRAIN_LIBS)

# ----------------------------------------------------------------------------
# The emulator of CUDA (dev/simt): plain, or with sanitizers, which then replace CFLAGS. It lays every type over the same bytes, as
# CUDA allows.

ADDRESS_FLAGS := -O1 -march=native -g -fsanitize=address,undefined -fno-sanitize-recover=undefined
THREAD_FLAGS := -O1 -march=native -g -fsanitize=thread
simt = $(CXX) -std=gnu++17 $(1) -fno-math-errno -fno-trapping-math -fno-strict-aliasing -Wall -Wextra -Werror -Wshadow \
       -Wno-unknown-pragmas -DDEVICE_SIMT -I. -MMD -MP

EMULATOR_TESTS := test_layout test_simt test_broken

$(addprefix $(BUILD)/test/,$(EMULATOR_TESTS)): $(BUILD)/test/%: test/%.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(call simt,$(CFLAGS)) -MF $@.d -x c++ $< -o $@ -lcmocka

$(addprefix $(BUILD)/test/,$(EMULATOR_TESTS:=_address)): $(BUILD)/test/%_address: test/%.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(call simt,$(ADDRESS_FLAGS)) -MF $@.d -x c++ $< -o $@ -lcmocka

$(addprefix $(BUILD)/test/,$(EMULATOR_TESTS:=_thread)): $(BUILD)/test/%_thread: test/%.cu Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(call simt,$(THREAD_FLAGS)) -MF $@.d -x c++ $< -o $@ -lcmocka

# ----------------------------------------------------------------------------
# Tests: each program in test/ is built once, or once for each precision. cmocka's closing lines tell what passed.

TESTS := $(BUILD)/test/test_tokenizer $(BUILD)/test/test_dataloader $(BUILD)/test/test_runtime \
         $(BUILD)/test/test_checkpoint $(BUILD)/test/test_allocation $(BUILD)/test/test_programs \
         $(BUILD)/test/test_snr $(BUILD)/test/test_retrieval \
         $(foreach test,test_attention test_moba test_operations test_model,$(BUILD)/test/$(test)_fp64 $(BUILD)/test/$(test)_fp32) \
         $(addprefix $(BUILD)/test/,$(EMULATOR_TESTS) test_broken_address test_broken_thread)

$(BUILD)/test/%_fp64: test/%.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(VARIANT) $(call precision,fp64) -MF $@.d $< -o $@ -lcmocka $(TRAIN_LIBS)

$(BUILD)/test/%_fp32: test/%.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(VARIANT) $(call precision,fp32) -MF $@.d $< -o $@ -lcmocka $(call onednn,fp32) $(TRAIN_LIBS)

$(BUILD)/test/%: test/%.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(VARIANT) $(call precision,fp32) -MF $@.d $< -o $@ -lcmocka $(call onednn,fp32) $(TRAIN_LIBS)

test: all $(TESTED_TRAINERS) $(TESTS)
	@BUILD=$(BUILD) TOKENIZER=$(BUILD)/tokenizer scripts/run_tests.sh $(TESTS)

# The exhaustive matrix: the same programs under the address, undefined-behaviour and thread sanitizers, and the scripts as a
# user calls them. OpenMP's own threads are opaque to the thread sanitizer, so it sees what has threads of its own.
SANITIZED := CFLAGS="$(ADDRESS_FLAGS)"
THREADED := CFLAGS="$(THREAD_FLAGS)"
# The emulator's tests in random orders, with several seeds.
SEEDS := 2 3 4 5
EMULATOR_LONG := $(addprefix $(BUILD)/test/,$(foreach test,$(EMULATOR_TESTS),$(test) $(test)_thread))
test-long: all $(EMULATOR_LONG)
	@for seed in $(SEEDS); do SIMT_ORDER=random SIMT_ASYNC=mixed SIMT_SEED=$$seed scripts/run_tests.sh $(EMULATOR_LONG) || exit 1; done
	@$(MAKE) --no-print-directory BUILD=$(BUILD)/address $(SANITIZED) test
	@$(MAKE) --no-print-directory BUILD=$(BUILD)/thread $(THREADED) $(BUILD)/thread/test/test_dataloader
	@scripts/run_tests.sh $(BUILD)/thread/test/test_dataloader
	@BUILD=$(BUILD) scripts/run_tests.sh test/test_scripts.sh

# ----------------------------------------------------------------------------
# Benchmarks

BENCHES := $(BUILD)/bench/attention $(BUILD)/bench/moba $(BUILD)/bench/step

$(BUILD)/bench/%: dev/bench/%.c Makefile
	@mkdir -p $(@D)
	@echo "  build $@"
	$(Q)$(CC) $(COMMON) $(VARIANT) $(call precision,fp32) -MF $@.d $< -o $@ $(call onednn,fp32) $(TRAIN_LIBS)

bench: $(BENCHES)
	GOMP_SPINCOUNT=1000 $(BUILD)/bench/attention
	GOMP_SPINCOUNT=1000 $(BUILD)/bench/moba
	GOMP_SPINCOUNT=1000 $(BUILD)/bench/step

# ----------------------------------------------------------------------------
# Style

SOURCES := $(shell git ls-files '*.h' '*.c' '*.cu' '*.cuh' 2>/dev/null)
SCRIPTS := $(shell git ls-files '*.sh' '.ci/run' 2>/dev/null)

lint:
	BUILD=$(BUILD) scripts/lint.sh

format:
	clang-format -i $(SOURCES)

clean:
	rm -rf $(BUILD)

-include $(wildcard $(BUILD)/*.d $(BUILD)/test/*.d $(BUILD)/bench/*.d)
